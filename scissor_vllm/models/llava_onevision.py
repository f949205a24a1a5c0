"""LLaVA-OneVision with compressed videos. Changes beyond those of ``frames``:

- A video of T frames with P tokens each has K + 1 placeholders in place of T*P + 1. Compression
  acts on the frames' tokens; the newline that ends a video stays.
- vLLM's class encodes uncompressed videos only if all videos of the batch have the same length.
- In checkpoints without a newline, as ``scissor-vllm convert`` marks them, a video has K
  placeholders. If images have no newline either, a request with an image is refused.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models import llava_onevision as stock
from vllm.multimodal import MULTIMODAL_REGISTRY

from scissor_vllm.models.frames import (
    WITH_TOWER_LEVEL,
    FramesModel,
    FramesProcessingInfo,
    FramesProcessor,
)
from scissor_vllm.worker.video_pixels import VideoPixels

_POOLING_STRIDE = 2


def has_newline(config: Any) -> bool:
    """Return whether the model has a newline vector; stock classes always have one."""
    return bool(getattr(config, "use_image_newline_parameter", True))


def num_video_newlines(config: Any) -> int:
    """Return the number of newlines at the end of a video, 0 or 1."""
    position = getattr(config, "mm_newline_position", "one_token")
    return int(has_newline(config) and position != "no_token")


class LlavaOnevisionProcessingInfo(FramesProcessingInfo, stock.LlavaOnevisionProcessingInfo):
    """Counts a video's tokens without its newline."""

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Return vLLM's limits; without a newline vector, images are not allowed."""
        limits = super().get_supported_mm_limits()
        return limits if has_newline(self.get_hf_config()) else {"video": limits["video"]}

    def get_num_video_tokens(self, *, image_width: int, image_height: int, num_frames: int) -> int:
        """Return T*P, plus 1 if a newline ends the video."""
        frame = self._get_num_frame_tokens(image_width=image_width, image_height=image_height)
        return num_frames * frame + self.get_num_fixed_tokens()

    def get_num_fixed_tokens(self) -> int:
        """Return 1 for the newline, 0 without one."""
        return num_video_newlines(self.get_hf_config())


class LlavaOnevisionProcessor(FramesProcessor, stock.LlavaOnevisionMultiModalProcessor):
    """Gives a video K placeholders and the newline's."""


@MULTIMODAL_REGISTRY.register_processor(
    LlavaOnevisionProcessor,
    info=LlavaOnevisionProcessingInfo,
    dummy_inputs=stock.LlavaOnevisionDummyInputsBuilder,
)
class LlavaOnevisionForConditionalGeneration(
    FramesModel, stock.LlavaOnevisionForConditionalGeneration
):
    """Encodes a video to exactly K rows and the newline."""

    hf_to_vllm_mapper = (
        WITH_TOWER_LEVEL | stock.LlavaOnevisionForConditionalGeneration.hf_to_vllm_mapper
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if not has_newline(self.config):
            # Otherwise the loader would expect the parameter in the checkpoint.
            self.register_parameter("image_newline", None)

    @property
    def tokens_per_frame(self) -> int:
        """P of the pooled grid."""
        vision = self.config.vision_config
        side = math.ceil(vision.image_size // vision.patch_size / _POOLING_STRIDE)
        return int(side * side)

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        # Pooling is a weighted mean, so it commutes with the projector's last layer, which then
        # has a quarter of the tokens.
        shown = self.vision_tower(
            pixels, feature_select_strategy=self.config.vision_feature_select_strategy
        )
        projector = self.multi_modal_projector
        pooled = self.apply_pooling(projector.act(projector.linear_1(shown)))
        tokens: torch.Tensor = projector.linear_2(pooled)
        return tokens

    def _rows_behind(self) -> torch.Tensor:
        """Return the newline (1, D), or (0, D) if no newline ends a video."""
        if not num_video_newlines(self.config):
            return super()._rows_behind()
        return self.image_newline[None]

    def _is_for_vllm(self, videos: list[VideoPixels]) -> bool:
        # For videos of different lengths the class of vLLM 0.32 and 0.33 returns tensors that the
        # engine rejects. It also always adds a newline.
        return len(set(map(len, videos))) == 1 and num_video_newlines(self.config) == 1
