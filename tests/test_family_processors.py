"""Each family's processor beside stock vLLM's, without an engine: K placeholders, all of a video's
text, caches apart by ratio, and what vLLM's issues tell of odd requests.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm.config import ModelConfig
from vllm.exceptions import VLLMValidationError
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import InputProcessingContext, TimingContext
from vllm.multimodal.processing.inputs import ProcessorInputs
from vllm.utils.import_utils import resolve_obj_by_qualname

from scissor_vllm import num_retained_tokens
from scissor_vllm.frontend.frame_cache import FRAMES
from scissor_vllm.frontend.patch_transport import sends_frames
from scissor_vllm.models import IMAGE_RUN_MODELS, MODELS
from scissor_vllm.plugin import register
from scissor_vllm.retention import RETENTION, RETENTION_REPORT, RetentionReport
from scissor_vllm.video_fields import NUM_RETAINED, NUM_VIDEO_TOKENS, VIDEO_TEXT
from tests.families import (
    FAMILIES,
    PICTURE,
    SHORT,
    TALL,
    VARIANTS,
    WIDE,
    Family,
    Media,
    Question,
    marks_of,
    tiny_families,
)

PIXELS = {"pixel_values_videos"}
"""Fields that travel as frames in some families, see ``test_patches.py``."""


@dataclass
class Processors:
    """Ours and stock's processor for one family."""

    family: Family

    @cached_property
    def ours(self) -> Any:
        config = ModelConfig(model=str(self.family.folder), dtype="float32", trust_remote_code=True)
        return MULTIMODAL_REGISTRY.create_processor(config)

    @cached_property
    def stock(self) -> Any:
        info = _stock_class(self.ours.info)(self.ours.info.ctx)
        return _stock_class(self.ours)(info, _stock_class(self.ours.dummy_inputs)(info))

    @cached_property
    def pad(self) -> int:
        """The token that videos' placeholders are."""
        if hasattr(self.ours, "_video_pad"):
            return int(self.ours._video_pad())
        return int(self.ours.info.get_hf_config().video_token_index)

    def run(self, which: Any, data: Any, media: tuple[Media, ...], **options: object) -> Any:
        """Return the engine's input for a prompt about media, given as ``data``."""
        prompt = Question(media).prompt(marks_of(self.family.folder))
        tokens = which.info.get_tokenizer().encode(prompt)
        items = which.info.parse_mm_data(data)
        inputs = ProcessorInputs(tokens, items, hf_processor_mm_kwargs=options)
        return which.apply(inputs, TimingContext(enabled=False))

    def ask(self, *media: Media, ratio: float, **options: object) -> Any:
        """Return ours for media."""
        data = Question(media).data()
        return self.run(self.ours, data, media, retention_ratio=ratio, **options)

    def ask_with_room(self, max_engine_tokens: int, *media: Media, ratio: float) -> Any:
        """Return ours, as for a request that goes to an engine that takes so many tokens."""
        question = Question(media)
        tokens = self.ours.info.get_tokenizer().encode(
            question.prompt(marks_of(self.family.folder))
        )
        report = RetentionReport(max_engine_tokens=max_engine_tokens)
        inputs = ProcessorInputs(
            tokens,
            self.ours.info.parse_mm_data(question.data()),
            hf_processor_mm_kwargs={"retention_ratio": ratio},
            media_io_kwargs={RETENTION: {RETENTION_REPORT: report}},
        )
        return self.ours.apply(inputs, TimingContext(enabled=False))

    def ask_stock(self, *media: Media, **options: object) -> Any:
        """Return stock's for media."""
        return self.run(self.stock, Question(media).data(), media, **options)

    def placeholders(self, made: Any) -> list[list[int]]:
        """Return the tokens of each video in the prompt."""
        tokens = made["prompt_token_ids"]
        places = made["mm_placeholders"]["video"]
        return [tokens[place.offset : place.offset + place.length] for place in places]


def _stock_class(of: Any) -> Any:
    """Return vLLM's own class of ours."""
    return next(each for each in type(of).__mro__ if each.__module__.startswith("vllm."))


@pytest.fixture(scope="module")
def all_processors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Processors]]:
    register()
    torch.compiler.set_stance("force_eager")
    families = tiny_families(tmp_path_factory.mktemp("processors"))
    yield {name: Processors(family) for name, family in families.items()}
    torch.compiler.set_stance("default")
    FRAMES.resize(0)


@pytest.fixture(
    params=[*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS)]
)
def processors(request: pytest.FixtureRequest, all_processors: dict[str, Processors]) -> Processors:
    return all_processors[request.param]


def test_ratio_one_gives_the_engine_what_stock_gives(processors: Processors) -> None:
    media = processors.family.mixed or (WIDE,)
    ours, stock = processors.ask(*media, ratio=1.0), processors.ask_stock(*media)
    assert ours["prompt_token_ids"] == stock["prompt_token_ids"]
    assert ours["mm_hashes"] == stock["mm_hashes"]
    for modality, places in stock["mm_placeholders"].items():
        for mine, place in zip(ours["mm_placeholders"][modality], places, strict=True):
            assert (mine.offset, mine.length) == (place.offset, place.length)
            assert mine.get_num_embeds() == place.get_num_embeds()
    for modality, items in stock["mm_kwargs"].items():
        for mine, item in zip(ours["mm_kwargs"][modality], items, strict=True):
            for name, field in item.items():
                if name in mine and (modality, name) not in {("video", each) for each in PIXELS}:
                    assert _same(mine[name].data, field.data), name


def test_a_models_images_are_compressed_if_it_is_listed(processors: Processors) -> None:
    info = processors.ours.info
    listed = bool(set(info.ctx.model_config.architectures) & set(IMAGE_RUN_MODELS))
    assert (info.get_num_frames_of_image() > 0) == listed
    settings = info.ctx.model_config.get_multimodal_config()
    settings.mm_processor_kwargs = {"allow_compress_images": True}
    try:
        if listed:
            type(info)(info.ctx)
        else:
            with pytest.raises(ValueError, match="allow_compress_images cannot be set for this"):
                type(info)(info.ctx)
    finally:
        settings.mm_processor_kwargs = None


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    return bool(left == right)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=12)
@given(
    width=st.integers(28, 400),
    height=st.integers(28, 400),
    num_frames=st.integers(2, 20),
    ratio=st.one_of(st.sampled_from([0.999, 0.5, 0.01]), st.floats(0.01, 1.0)),
)
def test_any_ratio_of_any_video_is_k_placeholders_among_all_of_its_text(
    processors: Processors, width: int, height: int, num_frames: int, ratio: float
) -> None:
    media = Media(width, height, num_frames)
    try:
        stock = processors.ask_stock(media)
    except Exception:  # A size that the family refuses.
        with pytest.raises((ValueError, VLLMValidationError)):
            processors.ask(media, ratio=ratio)
        return
    (whole,), pad = processors.placeholders(stock), processors.pad
    (tokens,) = processors.placeholders(processors.ask(media, ratio=ratio))
    assert tokens.count(pad) == num_retained_tokens(whole.count(pad), ratio)
    assert [token for token in tokens if token != pad] == [t for t in whole if t != pad]


def test_of_several_videos_beside_an_image_each_has_its_k(processors: Processors) -> None:
    media = processors.family.mixed
    if not media:
        pytest.skip("vLLM's class takes one video alone")
    made = processors.ask(*media, ratio=0.3)
    videos = [each for each in media if each.num_frames]
    num_tokens = [processors.family.num_tokens[each] for each in videos]
    kept = [tokens.count(processors.pad) for tokens in processors.placeholders(made)]
    assert kept == [num_retained_tokens(count, 0.3) for count in num_tokens]
    items = made["mm_kwargs"]["video"]
    assert [int(item[NUM_VIDEO_TOKENS].data) for item in items] == num_tokens
    assert [int(item[NUM_RETAINED].data) for item in items] == kept
    assert len(made["mm_placeholders"]["image"]) == 1


def test_caches_are_apart_by_ratio_for_videos_alone(processors: Processors) -> None:
    media = (PICTURE, WIDE) if processors.family.mixed else (WIDE,)
    hashes = [processors.ask(*media, ratio=ratio)["mm_hashes"] for ratio in (1.0, 0.5, 0.25)]
    assert len({each["video"][0] for each in hashes}) == 3
    assert len({tuple(each.get("image", ())) for each in hashes}) == 1


# What vLLM's issues tell of odd requests: ours answers where stock does, or refuses.

ODD: dict[str, dict[str, Any]] = {
    "num_frames without fps": {"num_frames": 4},
    "fps with max_frames": {"fps": 1.0, "max_frames": 4},
    "num_frames and fps": {"num_frames": 4, "fps": 1.0},
    "more frames than there are": {"num_frames": 99},
}


def odd_videos() -> dict[str, Any]:
    """Return videos with metadata that does not fit their frames."""
    pixels, told = WIDE.pixels(), WIDE.metadata()
    count = len(pixels)
    return {
        "a header that counts one frame more": (pixels, told | {"total_num_frames": count + 1}),
        "an index more than frames": (
            pixels,
            told | {"total_num_frames": count + 1, "frames_indices": list(range(count + 1))},
        ),
        "an index less than frames": (pixels, told | {"frames_indices": list(range(count - 1))}),
        "frames to be sampled": (pixels, told | {"do_sample_frames": True}),
        "no rate": (pixels, told | {"fps": None}),
        "a rate of zero": (pixels, told | {"fps": 0.0}),
    }


@pytest.mark.parametrize("odd", [*ODD, *odd_videos()])
@pytest.mark.parametrize("ratio", [0.5, pytest.param(1.0, marks=pytest.mark.slow)])
def test_an_odd_request_is_answered_as_stock_does_or_refused(
    processors: Processors, odd: str, ratio: float
) -> None:
    media = (WIDE,)
    options = ODD.get(odd, {})
    data = {"video": [odd_videos()[odd]]} if odd in odd_videos() else Question(media).data()
    pad = processors.pad
    try:
        stock = processors.run(processors.stock, data, media, **options)
        (whole,) = processors.placeholders(stock)
    except Exception:
        whole = None
    # vLLM answers a TypeError with 400 as well; an option's name in it tells what to leave out.
    refusals = (ValueError, VLLMValidationError, *((TypeError,) if options else ()))
    try:
        ours = processors.run(processors.ours, data, media, retention_ratio=ratio, **options)
    except refusals:
        assert whole is None or odd.startswith("an index")
        return
    (tokens,) = processors.placeholders(ours)
    (item,) = ours["mm_kwargs"]["video"]
    num_tokens = int(item[NUM_VIDEO_TOKENS].data)
    assert tokens.count(pad) == num_retained_tokens(num_tokens, ratio)
    if whole is not None:
        assert whole.count(pad) == num_tokens
        assert [token for token in tokens if token != pad] == [t for t in whole if t != pad]


def test_a_video_with_its_audio_is_refused_below_one(
    all_processors: dict[str, Processors],
) -> None:
    for name in ("nemotron", "nemotron_omni"):
        with pytest.raises(VLLMValidationError, match=r"must be 1\.0 or absent, got 0\.5.*audio"):
            all_processors[name].ask(WIDE, ratio=0.5, use_audio_in_video=True)
        with pytest.raises(
            VLLMValidationError, match=r"must be at least \d+ or absent, got 1: .*au"
        ):
            all_processors[name].ask(
                WIDE, ratio=1.0, max_retained_video_tokens=1, use_audio_in_video=True
            )


def test_gemma_that_attends_both_ways_within_a_frame_is_refused_below_one(
    all_processors: dict[str, Processors], tmp_path: Path
) -> None:
    family = all_processors["gemma4"].family
    folder = tmp_path / "gemma"
    family.build(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["use_bidirectional_attention"] = "vision"
    path.write_text(json.dumps(config))
    both_ways = Processors(Family(lambda folder: None, family.num_tokens, folder))
    whole = both_ways.ask(TALL, ratio=1.0)
    stock = both_ways.ask_stock(TALL)
    assert whole["prompt_token_ids"] == stock["prompt_token_ids"]
    with pytest.raises(VLLMValidationError, match=r"got 0\.5: this checkpoint attends both ways"):
        both_ways.ask(TALL, ratio=0.5)
    (num_tokens,) = (tokens.count(both_ways.pad) for tokens in both_ways.placeholders(stock))
    budgeted = both_ways.ask(TALL, ratio=1.0, max_retained_video_tokens=num_tokens)
    assert budgeted["prompt_token_ids"] == stock["prompt_token_ids"]
    with pytest.raises(
        VLLMValidationError, match=rf"must be at least {num_tokens} or absent, got 5: this checkp"
    ):
        both_ways.ask(TALL, ratio=1.0, max_retained_video_tokens=5)
    with pytest.raises(VLLMValidationError, match=r"got one that has \d+: send fewer frames, or"):
        both_ways.ask_with_room(num_tokens - 1, TALL, ratio=1.0)


def test_what_the_engine_counts_of_a_video_is_what_is_compared(processors: Processors) -> None:
    """Text that stands within a video is counted too."""
    for ratio in (1.0, 0.5):
        made = processors.ask(SHORT, ratio=ratio)
        (place,) = made["mm_placeholders"]["video"]
        num_embeds = place.get_num_embeds()
        room = processors.ask_with_room(num_embeds, SHORT, ratio=ratio)
        assert room["prompt_token_ids"] == made["prompt_token_ids"]
        with pytest.raises(VLLMValidationError, match=f"got one that has {num_embeds}: "):
            processors.ask_with_room(num_embeds - 1, SHORT, ratio=ratio)


def test_a_videos_placeholders_are_not_tokenized(
    processors: Processors, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes an eighth of the time for preparing a video, and vLLM drops the tokens."""
    if not sends_frames(processors.ours.info.get_hf_processor()):
        pytest.skip("its Hugging Face processor is as vLLM loads it")
    lengths: list[int] = []
    call = InputProcessingContext.call_hf_processor

    def recording(self: Any, *args: Any, **options: Any) -> Any:
        output = call(self, *args, **options)
        lengths.extend(map(len, output.get("input_ids", ())))
        return output

    monkeypatch.setattr(InputProcessingContext, "call_hf_processor", recording)
    (item,) = processors.ask(SHORT, ratio=0.5)["mm_kwargs"]["video"]
    assert max(lengths, default=0) < int(item[NUM_VIDEO_TOKENS].data)


def test_text_within_a_video_goes_to_the_worker_with_a_compressed_video_alone(
    processors: Processors,
) -> None:
    (whole,) = processors.ask(SHORT, ratio=1.0)["mm_kwargs"]["video"]
    assert VIDEO_TEXT not in whole
    if hasattr(processors.ours, "_video_pad"):
        (item,) = processors.ask(SHORT, ratio=0.5)["mm_kwargs"]["video"]
        (tokens,) = processors.placeholders(processors.ask_stock(SHORT))
        ids = [token for token in tokens if token != processors.pad]
        assert item[VIDEO_TEXT].data[0].tolist() == ids
        (architecture,) = processors.ours.info.ctx.model_config.architectures
        model = resolve_obj_by_qualname(MODELS[architecture].replace(":", "."))
        assert model.has_text_within == bool(ids)
