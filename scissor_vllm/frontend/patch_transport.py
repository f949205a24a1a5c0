"""Sends resized frames to towers that take patches, as Qwen-VL's do.

Hugging Face's processor of these families resizes uint8 frames and cuts them into patches. vLLM
normalizes the patches on the device (``--mm-device-do-normalize``, on by default). Here the
processor only resizes. Frames travel in the tensor of the patches, and the model cuts them on its
device. This saves three quarters of the processor's CPU time (``bench/qwen_processor.py``). The
tower's input is bitwise equal because the operations are the same.

The processor also writes a text with thousands of placeholders for each video, and tokenizes it.
vLLM drops these ids and writes a prompt's placeholders itself, so here a video keeps its one token.
"""

from __future__ import annotations

import copy
from functools import cache, lru_cache
from typing import Any

import torch
from transformers.processing_utils import ProcessorMixin
from transformers.video_processing_utils import BaseVideoProcessor

from scissor_vllm.frontend.frame_transport import get_normalization, in_threads, rgb_view

_NUM_CHANNELS = 3


@lru_cache(maxsize=16)
def sending_frames(hf_processor: Any, vllm_normalizes: bool = False) -> Any:
    """Return a copy of a Hugging Face processor that returns a video's frames instead of patches.

    A processor whose video processor lacks the necessary methods is returned unchanged.

    Args:
        hf_processor: the processor that vLLM loads.
        vllm_normalizes: whether vLLM's class takes uint8 (``--mm-device-do-normalize``).
    """
    original = getattr(hf_processor, "video_processor", None)
    if original is None or not all(
        hasattr(original, step) for step in ("patchify", "rescale_and_normalize")
    ):
        return hf_processor
    changed = copy.copy(hf_processor)
    kind: Any = _of_frames(original.__class__)
    # Copied without its constructor, whose parameters differ by family.
    video_processor = kind.__new__(kind)
    video_processor.__dict__.update(vars(original))
    video_processor.vllm_normalizes = vllm_normalizes
    video_processor.pixel_normalization = None if vllm_normalizes else get_normalization(original)
    changed.video_processor = video_processor
    if _writes_placeholders(hf_processor.__class__):
        changed.__class__ = _leaving_video_tokens(hf_processor.__class__)
    return changed


def sends_frames(hf_processor: Any) -> bool:
    """Return whether a processor was made by :func:`sending_frames`."""
    return isinstance(getattr(hf_processor, "video_processor", None), _VideoFrames)


class _VideoFrames:
    """Mixin of a Hugging Face video processor, placed before it."""

    vllm_normalizes: bool
    pixel_normalization: torch.Tensor | None
    """Normalization for our model to apply, None for none."""

    def _prepare_input_videos(self, videos: Any, **options: Any) -> Any:
        """Return frames with channels first, in the decoder's memory format where possible."""
        parent: Any = super()
        views = [rgb_view(video) for video in videos]
        if any(view is None for view in views):
            return parent._prepare_input_videos(videos=videos, **options)
        options["input_data_format"] = "channels_first"
        return parent._prepare_input_videos(videos=views, **options)

    def rescale_and_normalize(
        self,
        images: torch.Tensor,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: Any,
        image_std: Any,
    ) -> torch.Tensor:
        """Return uint8 frames unchanged if the model does the same normalization, else float."""
        processor: Any = self
        asked = (do_rescale, rescale_factor, do_normalize, tuple(image_mean), tuple(image_std))
        usual = (
            True,
            processor.rescale_factor,
            True,
            tuple(processor.image_mean),
            tuple(processor.image_std),
        )
        if images.dtype == torch.uint8 and self.pixel_normalization is not None and asked == usual:
            return images
        parent: Any = super()
        result: torch.Tensor = parent.rescale_and_normalize(
            images, do_rescale, rescale_factor, do_normalize, image_mean, image_std
        )
        # The request asks for unnormalized pixels, but uint8 would be normalized later.
        return result if self.vllm_normalizes or result.is_floating_point() else result.float()

    def patchify(
        self, videos: torch.Tensor, patch_size: int, merge_size: int, temporal_patch_size: int
    ) -> tuple[torch.Tensor, int, int, int]:
        """Return frames in the shape of patches, and their grid.

        Args:
            videos: (B, T, C, H, W).
            patch_size: of both sides.
            merge_size: patches that make a token, in each direction.
            temporal_patch_size: frames of a patch; the last frame is repeated to fill one.
        """
        if padding := -videos.shape[1] % temporal_patch_size:
            videos = torch.cat([videos, videos[:, -1:].expand(-1, padding, -1, -1, -1)], dim=1)
        num_videos, num_frames, _, height, width = videos.shape
        grid = num_frames // temporal_patch_size, height // patch_size, width // patch_size
        frames = videos.permute(0, 1, 3, 4, 2)
        return frames.reshape(num_videos, grid[0] * grid[1] * grid[2], -1), *grid


def _writes_placeholders(processor: Any) -> bool:
    """Return whether a class of Hugging Face's has its own text for a video."""
    return (
        issubclass(processor, ProcessorMixin)
        and processor.replace_video_token is not ProcessorMixin.replace_video_token
    )


@cache
def _leaving_video_tokens(processor: type) -> type:
    return type(processor.__name__, (_LeavesVideoTokens, processor), {})


class _LeavesVideoTokens:
    """Mixin of a Hugging Face processor, placed before it."""

    video_token: str

    def replace_video_token(self, *args: Any, **options: Any) -> str:
        """Return the text that stands for a video: the token that it has in the prompt."""
        return self.video_token


class _InThreads(BaseVideoProcessor):
    """Mixin after a Hugging Face video processor, which chooses the size; this class resizes."""

    def resize(self, image: torch.Tensor, size: Any, **options: Any) -> torch.Tensor:
        """Return resized videos (B, T, C, H, W) in channels-last memory format."""

        def resize(frames: torch.Tensor) -> torch.Tensor:
            resized: torch.Tensor = parent.resize(image=frames, size=size, **options)
            return resized.permute(0, 2, 3, 1)

        parent: Any = super()
        videos = [in_threads(resize, frames).permute(0, 3, 1, 2) for frames in image]
        return videos[0][None] if len(videos) == 1 else torch.stack(videos)


@cache
def _of_frames(video_processor: type) -> type:
    # vLLM looks video processors up by class name.
    bases = (_VideoFrames, video_processor, _InThreads)
    return type(video_processor.__name__, bases, {})
