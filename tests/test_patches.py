"""Frames that travel in place of patches: the tower gets what Hugging Face's processor makes."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import (
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)
from transformers.image_processing_backends import TorchvisionBackend

from scissor_vllm.frontend import frame_transport as pixels
from scissor_vllm.frontend.patch_transport import sending_frames, sends_frames
from scissor_vllm.worker.patches import PatchShape
from tests.families import build_qwen_tokenizer

UNSAMPLED = {"do_sample_frames": False, "return_tensors": "pt"}


@pytest.fixture(scope="module", params=["qwen2.5", "qwen3"])
def processor(request: pytest.FixtureRequest) -> Any:
    """A family's processor as vLLM loads it."""
    tokenizer = build_qwen_tokenizer()
    if request.param == "qwen3":
        size = {"shortest_edge": 32 * 32 * 8, "longest_edge": 32 * 32 * 400}
        video = Qwen3VLVideoProcessor(size=size)
        return Qwen3VLProcessor(
            Qwen2VLImageProcessor(patch_size=16), tokenizer, video, tokenizer.chat_template
        )
    size = {"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * 64}
    video = Qwen2VLVideoProcessor(size=size)
    return Qwen2_5_VLProcessor(Qwen2VLImageProcessor(), tokenizer, video, tokenizer.chat_template)


def frames(num_frames: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_frames)
    shape = (num_frames, 3, height, width)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def patches_in_the_model(changed: Any, output: Any, dtype: torch.dtype) -> torch.Tensor:
    """Return patches as the model makes them of what the changed processor sends."""
    video_processor = changed.video_processor
    _, height, width = output["video_grid_thw"][0].tolist()
    sent = output["pixel_values_videos"]
    shape = PatchShape(
        video_processor.patch_size, video_processor.temporal_patch_size, video_processor.merge_size
    )
    scale = video_processor.pixel_normalization if sent.dtype == torch.uint8 else None
    return shape.patches_of(
        sent,
        (height * video_processor.patch_size, width * video_processor.patch_size),
        scale,
        dtype,
    )


def give_threads(num_threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixels, "threads_per_video", lambda: num_threads)
    monkeypatch.setattr(pixels, "take_cpus", lambda wanted: nullcontext(max(1, wanted)))


@pytest.mark.parametrize("size", [(24, 200, 320), (17, 400, 120), (2, 64, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_decoded", [True, False])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_the_tower_gets_the_same_patches_to_the_bit(
    processor: Any,
    size: tuple[int, int, int],
    dtype: torch.dtype,
    is_decoded: bool,
    num_threads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    give_threads(num_threads, monkeypatch)
    video: Any = frames(*size)
    if is_decoded:
        video = video.permute(0, 2, 3, 1).contiguous().numpy()
    changed = sending_frames(processor)
    assert sends_frames(changed)
    expected = processor.video_processor([video], **UNSAMPLED)
    output = changed.video_processor([video], **UNSAMPLED)
    assert torch.equal(output["video_grid_thw"], expected["video_grid_thw"])
    assert output["pixel_values_videos"].dtype == torch.uint8
    assert output["pixel_values_videos"].shape == expected["pixel_values_videos"].shape
    # vLLM rounds to the model's dtype where the processor runs.
    assert torch.equal(
        patches_in_the_model(changed, output, dtype), expected["pixel_values_videos"].to(dtype)
    )


@pytest.mark.parametrize(
    "options",
    [
        {"image_mean": [0.1, 0.2, 0.3]},
        {"image_std": [0.4] * 3},
        {"do_normalize": False},
        {"do_normalize": False, "do_rescale": False},
        {"rescale_factor": 1 / 128},
    ],
)
def test_what_a_request_asks_of_the_processor_is_done_there(
    processor: Any, options: dict[str, Any]
) -> None:
    video = frames(4, 96, 128)
    changed = sending_frames(processor)
    expected = processor.video_processor([video], **UNSAMPLED, **options)["pixel_values_videos"]
    output = changed.video_processor([video], **UNSAMPLED, **options)
    assert output["pixel_values_videos"].dtype == torch.float32
    assert torch.equal(patches_in_the_model(changed, output, torch.float32), expected.float())


def test_where_vllm_normalizes_frames_go_as_they_are(processor: Any) -> None:
    video, raw = frames(4, 96, 128), {"do_normalize": False, "do_rescale": False}
    changed = sending_frames(processor, vllm_normalizes=True)
    expected = processor.video_processor([video], **UNSAMPLED, **raw)["pixel_values_videos"]
    output = changed.video_processor([video], **UNSAMPLED, **raw)
    patches = patches_in_the_model(changed, output, torch.float32)
    assert patches.dtype == expected.dtype == torch.uint8
    assert torch.equal(patches, expected)


def test_a_part_of_a_video_makes_a_part_of_its_patches(processor: Any) -> None:
    changed = sending_frames(processor)
    output = changed.video_processor([frames(8, 96, 128)], **UNSAMPLED)
    whole = patches_in_the_model(changed, output, torch.float32)
    per_patch = len(whole) // 4
    part = {**output, "pixel_values_videos": output["pixel_values_videos"][per_patch:]}
    assert torch.equal(patches_in_the_model(changed, part, torch.float32), whole[per_patch:])


def test_the_processor_that_vllm_keeps_is_not_changed(processor: Any) -> None:
    video = frames(4, 96, 128)
    before = processor.video_processor([video], **UNSAMPLED)["pixel_values_videos"]
    changed = sending_frames(processor)
    assert changed is sending_frames(processor)
    assert not sends_frames(processor)
    assert type(changed.video_processor).__name__ == type(processor.video_processor).__name__
    after = processor.video_processor([video], **UNSAMPLED)["pixel_values_videos"]
    assert torch.equal(before, after)


def test_a_processor_made_of_other_steps_is_left_as_it_is(processor: Any) -> None:
    class Other:
        video_processor = object()

    other = Other()
    assert sending_frames(other) is other
    assert not sends_frames(other)


def test_each_frame_is_resized_once_by_one_of_a_few_threads(
    processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, int]] = []
    resize = TorchvisionBackend.resize

    def watched(self: Any, image: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        calls.append((threading.current_thread().name, len(image)))
        return resize(self, image, *args, **options)

    give_threads(3, monkeypatch)
    monkeypatch.setattr(TorchvisionBackend, "resize", watched)
    sending_frames(processor).video_processor([frames(26, 96, 128)], **UNSAMPLED)
    assert sorted(count for _, count in calls) == [8, 9, 9]
    assert all(name.startswith("resize") for name, _ in calls)
