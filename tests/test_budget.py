"""A budget in the processors of the families: K of each video, in the prompt and in the cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vllm.config import ModelConfig
from vllm.exceptions import VLLMValidationError
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.cache.base import MultiModalProcessorOnlyCache
from vllm.multimodal.processing import TimingContext
from vllm.multimodal.processing.inputs import ProcessorInputs

from scissor_vllm.demo.model import demo_model_path
from scissor_vllm.plugin import register
from scissor_vllm.retention import (
    RETENTION,
    RETENTION_REPORT,
    RetentionReport,
    count_retained,
    highest_ratio,
    num_retained_tokens,
)
from scissor_vllm.video_fields import NUM_RETAINED, NUM_VIDEO_TOKENS
from tests.families import build_qwen2_5_vl, build_qwen3_vl

BUILDERS: dict[str, Callable[[Path], Any] | None] = {
    "llava-onevision": None,
    "qwen2.5-vl": build_qwen2_5_vl,
    "qwen3-vl": build_qwen3_vl,
}


class Processor:
    """A family's processor, with a cache if requested."""

    def __init__(self, model: Path, has_cache: bool, **settings: Any) -> None:
        config = ModelConfig(model=str(model), dtype="float32", mm_processor_kwargs=settings)
        self.cache = MultiModalProcessorOnlyCache(config) if has_cache else None
        self.processor = MULTIMODAL_REGISTRY.create_processor(config)

    def run(
        self,
        num_frames: tuple[int, ...],
        over_http: dict[str, object] | None = None,
        **options: Any,
    ) -> tuple[list[tuple[int, int]], list[str], RetentionReport, int]:
        """Return N and K of videos with so many frames, their identities, the report and how
        many tokens the prompt has.
        """
        videos = [self._video(count) for count in num_frames]
        text = self.processor.dummy_inputs.get_dummy_text({"video": len(videos)})
        prompt = self.processor.info.get_tokenizer().encode(text)
        items = self.processor.info.parse_mm_data({"video": videos})
        report = RetentionReport()
        inputs = ProcessorInputs(
            prompt,
            items,
            hf_processor_mm_kwargs=options,
            media_io_kwargs={RETENTION: {RETENTION_REPORT: report, **(over_http or {})}},
            cache=self.cache,
        )
        result = self.processor.apply(inputs, TimingContext(enabled=False))
        counts = [
            (int(item[NUM_VIDEO_TOKENS].data), int(item[NUM_RETAINED].data))
            for item in result["mm_kwargs"]["video"]
        ]
        length = len(result["prompt_token_ids"])
        return counts, result["mm_hashes"]["video"], report, length

    @staticmethod
    def _video(num_frames: int) -> Any:
        shape = (num_frames, 64, 96, 3)
        frames = np.random.default_rng(num_frames).integers(0, 256, shape, dtype=np.uint8)
        metadata = {
            "fps": 2.0,
            "total_num_frames": num_frames,
            "duration": num_frames / 2,
            "video_backend": "opencv",
            "frames_indices": list(range(num_frames)),
            "do_sample_frames": False,
        }
        return frames, metadata


@pytest.fixture(scope="module", params=BUILDERS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    register()
    build = BUILDERS[request.param]
    if build is None:
        return demo_model_path()
    folder = tmp_path_factory.mktemp(request.param) / "model"
    build(folder)
    return folder


@pytest.fixture(params=[False, True], ids=["no cache", "cache"])
def processor(request: pytest.FixtureRequest, model: Path) -> Processor:
    return Processor(model, request.param)


def test_videos_keep_the_same_share_of_a_budget_with_and_without_cache_hits(
    processor: Processor,
) -> None:
    for num_frames in ((12,), (12, 4), (4, 12, 8), (8,), (12, 4)):
        whole, _, _, whole_length = processor.run(num_frames)
        num_tokens = [count for count, _ in whole]
        budget = sum(num_tokens) // 3
        counts, _, report, length = processor.run(num_frames, max_retained_video_tokens=budget)
        expected = count_retained(num_tokens, 1.0, budget, 0.01)
        assert counts == list(zip(num_tokens, expected.num_retained, strict=True))
        assert sum(report.num_retained) == budget
        assert report.num_tokens == num_tokens
        assert (report.max_retained, report.retention_ratio) == (budget, expected.ratio)
        assert whole_length - length == sum(num_tokens) - budget


def test_memory_is_profiled_with_whole_videos_whatever_the_default_budget(model: Path) -> None:
    plain, budgeted = (
        Processor(model, False, **settings).processor.get_dummy_mm_inputs({"video": 1})
        for settings in ({}, {"max_retained_video_tokens": 1})
    )
    assert budgeted["mm_placeholders"] == plain["mm_placeholders"]
    (item,) = budgeted["mm_kwargs"]["video"]
    assert int(item[NUM_RETAINED].data) == int(item[NUM_VIDEO_TOKENS].data) > 1


def test_a_video_that_is_named_alone_has_the_ratio_where_the_budget_is_the_default(
    model: Path,
) -> None:
    def run(processor: Processor, video: Any, **options: Any) -> tuple[Any, RetentionReport]:
        inner = processor.processor
        prompt = inner.info.get_tokenizer().encode(inner.dummy_inputs.get_dummy_text({"video": 1}))
        report = RetentionReport()
        inputs = ProcessorInputs(
            prompt,
            inner.info.parse_mm_data({"video": [video]}),
            mm_uuid_items={"video": ["a-clip"]},
            hf_processor_mm_kwargs=options,
            media_io_kwargs={RETENTION: {RETENTION_REPORT: report}},
            cache=processor.cache,
        )
        return inner.apply(inputs, TimingContext(enabled=False)), report

    processor = Processor(model, True, max_retained_video_tokens=10**6)
    sent, report = run(processor, Processor._video(12), retention_ratio=0.5)
    assert report.max_retained == 10**6
    named, report = run(processor, None, retention_ratio=0.5)
    assert named["mm_placeholders"] == sent["mm_placeholders"]
    # The budget is not in force.
    assert report.max_retained is None
    assert report.retention_ratio == 0.5
    with pytest.raises(VLLMValidationError, match="video 0 is named by its uuid alone"):
        run(processor, None, max_retained_video_tokens=10**6)


def test_the_cache_key_depends_on_the_number_of_kept_tokens(processor: Processor) -> None:
    with_others = processor.run((12, 4), max_retained_video_tokens=23)
    kept = with_others[0][0][1]
    again = processor.run((12,), max_retained_video_tokens=kept)
    assert again[0] == [with_others[0][0]]
    assert again[1] == with_others[1][:1]
    other = processor.run((12,), max_retained_video_tokens=kept + 1)
    assert other[0][0][1] == kept + 1
    assert other[1] != again[1]
    # What is not cut by the budget is found by its ratio, as without one.
    for ratio in (0.2, 1.0):
        plain = processor.run((4,), retention_ratio=ratio)
        loose = processor.run((4,), retention_ratio=ratio, max_retained_video_tokens=10**6)
        assert (plain[0], plain[1]) == (loose[0], loose[1])


def test_a_field_of_the_body_overrides_a_processor_option(processor: Processor) -> None:
    counts, _, report, _ = processor.run(
        (12,), {"max_retained_video_tokens": 15}, max_retained_video_tokens=14
    )
    assert counts[0][1] == report.max_retained == 15


def test_a_ratio_that_is_left_to_the_server_is_asked_once_with_the_videos_tokens(
    processor: Processor,
) -> None:
    asked: list[list[int]] = []

    def choose(num_tokens: list[int], least: float, most: float) -> float:
        assert (least, most) == (0.0, 1.0)
        asked.append(list(num_tokens))
        return 0.5

    bounds = {"auto_bounds": (0.1, 1.0), "target_ttft_ms": 1000}
    info = processor.processor.info
    for name, value in bounds.items():
        object.__setattr__(info.retention_policy, name, value)
    counts, _, report, _ = processor.run((12, 4), {"retention_ratio": "auto", "auto": choose})
    assert asked == [[count for count, _ in counts]]
    assert report.retention_ratio == 0.5
    assert [kept for _, kept in counts] == list(count_retained(asked[0], 0.5).num_retained)
    with pytest.raises(VLLMValidationError, match="chosen by an API server for chats"):
        processor.run((4,), retention_ratio="auto")


# ---- What the engine takes of a video ----


@pytest.mark.parametrize("has_cache", [False, True])
def test_a_video_of_more_tokens_than_the_engine_takes_is_refused_with_a_ratio_that_fits(
    has_cache: bool,
) -> None:
    register()
    processor = Processor(demo_model_path(), has_cache)
    ((num_tokens, _),), *_ = processor.run((12,))
    most = num_tokens // 3

    def run(ratio: float, **more: Any) -> int:
        report = RetentionReport(max_engine_tokens=most)
        over_http = {RETENTION_REPORT: report, "retention_ratio": ratio, **more}
        ((_, kept),), *_ = processor.run((12,), over_http)
        return kept

    with pytest.raises(VLLMValidationError) as refused:
        run(1.0)
    assert str(refused.value).startswith(
        f"a video may have {most} tokens after compression on this server, got one that has "
        f"{num_tokens + 1}: ask for a retention_ratio of 0.3"
    )
    fitting = float(str(refused.value).split("retention_ratio of ")[1].split(" or less, send")[0])
    # The demo's model adds one token.
    assert run(fitting) == most - 1
    with pytest.raises(VLLMValidationError, match=f"ask for a retention_ratio of {fitting} or"):
        run(round(fitting + 0.0001, 4))
    assert run(1.0, max_retained_video_tokens=most - 1) == most - 1
    with pytest.raises(VLLMValidationError, match=f"got one that has {most + 1}: ask for a"):
        run(1.0, max_retained_video_tokens=most)


def test_where_no_allowed_ratio_fits_none_is_named(model: Path) -> None:
    processor = Processor(model, False, min_retention_ratio=0.5)
    for max_engine_tokens in (1, 20):
        report = RetentionReport(max_engine_tokens=max_engine_tokens)
        with pytest.raises(VLLMValidationError, match=r"has \d+: send fewer frames, or have"):
            processor.run((64,), {RETENTION_REPORT: report, "retention_ratio": 1.0})


def test_the_server_chooses_among_the_ratios_that_the_engine_takes() -> None:
    register()
    processor = Processor(demo_model_path(), False)
    info = processor.processor.info
    for name, value in {"auto_bounds": (0.1, 1.0), "target_ttft_ms": 1000}.items():
        object.__setattr__(info.retention_policy, name, value)
    highest: list[float] = []

    def choose(num_tokens: list[int], least: float, most: float) -> float:
        highest.append(most)
        return most

    def run(num_frames: tuple[int, ...], most: int | None) -> tuple[list[int], int]:
        report = RetentionReport(max_engine_tokens=most)
        over_http = {RETENTION_REPORT: report, "retention_ratio": "auto", "auto": choose}
        counts, _, _, length = processor.run(num_frames, over_http)
        return [kept for _, kept in counts], length

    whole, length = run((12, 4), None)
    # The longest video decides. The demo's model adds a token to each.
    kept, _ = run((12, 4), whole[0] // 3)
    assert kept[0] == whole[0] // 3 - 1
    info.ctx.model_config.max_model_len = length
    # One more for the answer.
    kept, shorter = run((12, 4), 10 * whole[0])
    assert length - 3 <= shorter < length
    assert highest[0] == 1.0 > highest[2] > highest[1]


@pytest.mark.parametrize(
    ("num_tokens", "num_retained", "ratio"),
    [(3872, 2047, 0.5286), (10, 10, 1.0), (10, 11, 1.0), (3, 1, 0.3333), (100000, 1, 0.0)],
)
def test_the_highest_ratio_of_four_decimals_keeps_no_more(
    num_tokens: int, num_retained: int, ratio: float
) -> None:
    assert highest_ratio(num_tokens, num_retained) == ratio
    if ratio:
        assert num_retained_tokens(num_tokens, ratio) <= num_retained
    if ratio < 1:
        assert num_retained_tokens(num_tokens, round(ratio + 0.0001, 4)) > num_retained
