"""Text within a video: sent to the worker, and inserted among the rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config.multimodal import MultiModalConfig
from vllm.utils.import_utils import resolve_obj_by_qualname

from scissor_vllm.models import MODELS, gemma4
from scissor_vllm.models.frame_runs import (
    FrameRunsModel,
    FramesOfVideo,
    SequentialFrameRunsModel,
    text_within,
    with_text,
)
from scissor_vllm.models.glm4v import Glm4vVideos
from scissor_vllm.worker.feature_cache import Sharing

PAD = 7
VIDEOS = [
    [1, 2, PAD, PAD, 3, PAD, PAD, 4],
    [PAD, PAD, 5, PAD],
    [1, PAD, 2, 3, PAD, 4],
    [PAD] * 5,
    [9, PAD],
    [PAD, 9],
]


@pytest.mark.parametrize("tokens", VIDEOS)
def test_a_videos_tokens_come_back_from_its_text_and_their_number(tokens: list[int]) -> None:
    assert with_text(text_within(tokens, PAD), tokens.count(PAD), PAD) == tokens


class Model(FrameRunsModel):
    """Embeds a token as ten times its id."""

    def _embed_text(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens[:, None] * 10.0


def laid_out(tokens: list[int], members: list[int]) -> tuple[list[float], list[int]]:
    """The plain rule: text where it is, a row where its member is; rows are minus their members."""
    expected, numbers, pads_before = [], [], 0
    for number, token in enumerate(tokens):
        if token == PAD:
            stands = [member for member in members if member == pads_before]
            expected += [-float(member) for member in stands]
            numbers += [number] * len(stands)
            pads_before += 1
        else:
            expected.append(token * 10.0)
            numbers.append(number)
    return expected, numbers


@pytest.mark.parametrize("tokens", VIDEOS)
@pytest.mark.parametrize("which", ["all", "first", "last", "even", "twice"])
def test_a_row_stands_in_the_run_of_its_members_frame(tokens: list[int], which: str) -> None:
    everything = list(range(tokens.count(PAD)))
    members = {
        "all": everything,
        "first": everything[:1],
        "last": everything[-1:],
        "even": everything[::2],
        "twice": [everything[0], everything[0]],
    }[which]
    rows = -torch.tensor(members, dtype=torch.float32)[:, None]
    laid_out_rows, numbers = Model()._among_text(
        rows, torch.tensor(members), text_within(tokens, PAD)
    )
    assert (laid_out_rows.flatten().tolist(), numbers.tolist()) == laid_out(tokens, members)


def test_glms_images_are_no_runs_of_its_videos() -> None:
    image_token, begin_image, end_image, begin_video = 7, 8, 9, 10

    class Videos(Glm4vVideos):
        def __init__(self) -> None:
            self.config: Any = type(
                "Config",
                (),
                {
                    "image_token_id": image_token,
                    "image_start_token_id": begin_image,
                    "video_start_token_id": begin_video,
                },
            )

    image = [begin_image, *[image_token] * 3, end_image]
    video = [begin_video, begin_image, *[image_token] * 3, end_image]
    assert Videos()._video_runs([1, *image, 1, *video, 1, *image]) == [(9, 12)]


@pytest.mark.parametrize("architecture", MODELS)
def test_a_server_that_prunes_as_well_does_not_start(architecture: str) -> None:
    model = resolve_obj_by_qualname(MODELS[architecture].replace(":", "."))
    if not issubclass(model, FrameRunsModel):
        pytest.skip("vLLM's class does not prune")
    pruning = MultiModalConfig(video_pruning_rate=0.5)
    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(get_multimodal_config=lambda: pruning)
    )
    with pytest.raises(ValueError, match="--video-pruning-rate and scissor_vllm exclude"):
        model(vllm_config=config)


@pytest.mark.parametrize("architecture", MODELS)
def test_without_a_language_model_no_family_with_text_in_its_videos_starts(
    architecture: str,
) -> None:
    model = resolve_obj_by_qualname(MODELS[architecture].replace(":", "."))
    if not getattr(model, "has_text_within", False):
        pytest.skip("its videos have no text")
    alone = MultiModalConfig(mm_encoder_only=True)
    config: Any = SimpleNamespace(model_config=SimpleNamespace(get_multimodal_config=lambda: alone))
    with pytest.raises(ValueError, match=r"an encode-only instance .* use ec_role ec_both"):
        model(vllm_config=config)


@pytest.mark.parametrize("architecture", MODELS)
def test_a_model_forgets_its_features_when_the_encoder_cache_is_reset(architecture: str) -> None:
    model = resolve_obj_by_qualname(MODELS[architecture].replace(":", "."))
    forgotten: list[str] = []
    alone = model.__new__(model)
    torch.nn.Module.__init__(alone)
    alone.video_compression = SimpleNamespace(forget_features=lambda: forgotten.append("features"))
    alone._aligned_mlps = SimpleNamespace(refresh=lambda: forgotten.append("copies"))
    alone.forget_encoded()
    copies = architecture == "Qwen2_5_VLForConditionalGeneration"
    assert forgotten == ["features", *["copies"] * copies]


class FirstWorkers(Sharing):
    """Gives the first worker's tokens, which are zeros."""

    def share(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(tokens)


@pytest.mark.parametrize("sharing", [FirstWorkers(), None])
@pytest.mark.parametrize("num_retained", [5, 6])
def test_gemmas_workers_compress_the_same_tokens(
    num_retained: int, sharing: Sharing | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = []

    def rows(self: Any, video: FramesOfVideo, *others: object) -> None:
        encoded.append(video.encode(video.pixels))

    monkeypatch.setattr(SequentialFrameRunsModel, "_rows", rows)
    monkeypatch.setattr(gemma4, "make_sharing", lambda: sharing)
    model = gemma4.Gemma4ForConditionalGeneration
    ones = torch.ones(3, 2, 4)
    video = FramesOfVideo(torch.arange(3), 2, lambda pixels: ones)
    model._rows(model.__new__(model), video, num_retained, torch.empty(2, 0), None)
    is_shared = sharing is not None and num_retained < 6
    assert torch.equal(encoded[0], torch.zeros_like(ones) if is_shared else ones)
