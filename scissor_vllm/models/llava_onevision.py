"""LLaVA-OneVision with compressed videos.

Changed against vLLM's class:
- a video of T frames with P tokens each has K + 1 placeholders in place of T*P + 1: compression
  acts on the frames' tokens, the newline that ends a video stays;
- videos of a batch with any ratio below 1.0, or of unlike length, go through the vision tower one
  by one;
- checkpoints saved by transformers 5 load, whose vision tower lacks the ``vision_model`` level;
- checkpoints without a newline, as ``scissor-vllm convert`` marks them, have K placeholders for a
  video; where images have none either, a request with an image is refused.
"""

import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import regex as re
import torch
from transformers import BatchFeature
from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.models import llava_onevision as stock
from vllm.model_executor.models.interfaces import MultiModalEmbeddings
from vllm.model_executor.models.utils import WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY

from scissor_vllm.pixels import FRAME_OF, VIDEO_FRAMES, VideoPixels, stacked, take_video_pixels
from scissor_vllm.processor import (
    NUM_RETAINED,
    NUM_VIDEO_TOKENS,
    RetentionProcessingInfo,
    RetentionProcessor,
)
from scissor_vllm.tower import VideoCompression

_POOLING_STRIDE = 2
_TOWER_PARTS = "embeddings|encoder|post_layernorm|pre_layrnorm|head"


def has_newline(config: Any) -> bool:
    """Return whether the model has a newline vector: vLLM's class and transformers' always do."""
    return bool(getattr(config, "use_image_newline_parameter", True))


def num_video_newlines(config: Any) -> int:
    """Return how many newlines end a video, 0 or 1."""
    position = getattr(config, "mm_newline_position", "one_token")
    return int(has_newline(config) and position != "no_token")


class LlavaOnevisionProcessingInfo(RetentionProcessingInfo, stock.LlavaOnevisionProcessingInfo):
    """Counts a video's tokens without its newline."""

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Return vLLM's limits, no images where there is no newline to end their lines."""
        limits = super().get_supported_mm_limits()
        return limits if has_newline(self.get_hf_config()) else {"video": limits["video"]}

    def get_num_video_tokens(self, *, image_width: int, image_height: int, num_frames: int) -> int:
        """Return T*P and the newline, if there is one."""
        frame = self._get_num_frame_tokens(image_width=image_width, image_height=image_height)
        return num_frames * frame + self.get_num_fixed_tokens()

    def get_num_compressible_tokens(self, *, width: int, height: int, num_frames: int) -> int:
        """Return T*P."""
        with_newline = self.get_num_video_tokens(
            image_width=width, image_height=height, num_frames=num_frames
        )
        return with_newline - self.get_num_fixed_tokens()

    def get_num_fixed_tokens(self) -> int:
        """Return 1, the newline, or 0 without one."""
        return num_video_newlines(self.get_hf_config())


class LlavaOnevisionProcessor(RetentionProcessor, stock.LlavaOnevisionMultiModalProcessor):
    """Gives a video K placeholders and the newline's."""

    def _get_num_prepared_tokens(self, processed: BatchFeature, index: int) -> int:
        if VIDEO_FRAMES in processed:
            num_frames, height, width, _ = processed[VIDEO_FRAMES][index].shape
            if FRAME_OF in processed:
                num_frames = len(processed[FRAME_OF][index])
        else:
            num_frames, _, height, width = processed["pixel_values_videos"][index].shape
        side = self.info.get_hf_config().vision_config.image_size
        if (height, width) != (side, side):
            raise VLLMValidationError(
                f"the vision tower takes frames of {side}x{side}, but video {index} was resized to "
                f"{width}x{height}: leave size and crop_size out of mm_processor_kwargs",
                parameter="mm_processor_kwargs",
            )
        return self.info.get_num_compressible_tokens(
            width=width, height=height, num_frames=num_frames
        )


@MULTIMODAL_REGISTRY.register_processor(
    LlavaOnevisionProcessor,
    info=LlavaOnevisionProcessingInfo,
    dummy_inputs=stock.LlavaOnevisionDummyInputsBuilder,
)
class LlavaOnevisionForConditionalGeneration(stock.LlavaOnevisionForConditionalGeneration):
    """Encodes a video to exactly K rows and the newline."""

    hf_to_vllm_mapper = (
        WeightsMapper(
            orig_to_new_regex={
                re.compile(rf"^(model\.)?vision_tower\.(?={_TOWER_PARTS})"): (
                    r"\1vision_tower.vision_model."
                )
            }
        )
        | stock.LlavaOnevisionForConditionalGeneration.hf_to_vllm_mapper
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if not has_newline(self.config):
            # Left in place, the loader would miss its value in the checkpoint.
            self.register_parameter("image_newline", None)
        vision = self.config.vision_config
        side = math.ceil(vision.image_size // vision.patch_size / _POOLING_STRIDE)
        self.video_dtype = vllm_config.model_config.dtype
        self.video_compression = VideoCompression(vllm_config, tokens_per_frame=side * side)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load as vLLM does, also while serving."""
        self.video_compression.forget_features()
        return super().load_weights(weights)

    def embed_multimodal(self, **kwargs: object) -> MultiModalEmbeddings:
        """Return (K + 1, D) for each video, (K, D) without a newline; images, and equally long
        videos that are all kept whole, as vLLM does.
        """
        newline = self._video_newline()
        self.video_compression.warm_up(newline.shape[1], newline.dtype, newline.device)
        num_retained = kwargs.pop(NUM_RETAINED, None)
        kwargs.pop(NUM_VIDEO_TOKENS, None)
        if not isinstance(num_retained, torch.Tensor):
            return super().embed_multimodal(**kwargs)
        counts = num_retained.flatten().tolist()
        videos = take_video_pixels(kwargs, self.video_dtype)
        if not videos:
            inputs = self._parse_and_validate_video_input(**kwargs)
            assert inputs is not None
            videos = [VideoPixels(pixels) for pixels in inputs["pixel_values_videos"]]
        # For videos of unlike length vLLM 0.32 and 0.33 return tensors of a shape that their own
        # engine refuses.
        alike = len(set(map(len, videos))) == 1
        if alike and len(newline) and self.video_compression.keeps_all(videos, counts):
            with self.video_compression.stage("tower", newline.device):
                return super().embed_multimodal(pixel_values_videos=stacked(videos))
        encode = partial(self._video_pixels_to_features, self.vision_tower)
        return tuple(
            torch.cat([rows, newline]) for rows in self.video_compression(videos, counts, encode)
        )

    def _video_newline(self) -> torch.Tensor:
        """Return (1, D), or (0, D) where no newline ends a video."""
        if not num_video_newlines(self.config):
            weight = self.multi_modal_projector.linear_2.weight
            return weight.new_empty(0, len(weight))
        return self.image_newline[None]
