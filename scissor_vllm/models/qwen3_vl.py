"""Qwen3-VL, dense and MoE, with compressed videos. Changes beyond those of ``patch_grid``:

- Text within a video gives each frame's time. All of it stays. A frame's kept tokens follow its
  time, as in the uncompressed prompt. Their number is unknown before encoding, so all K
  placeholders stand in the first frame. ``embed_multimodal`` returns rows and text in true order.
- A token's DeepStack features follow its values. Those of a row are the mean over its members.
"""

from collections.abc import Mapping
from typing import Any

from transformers.video_utils import VideoMetadata
from vllm.model_executor.models import qwen3_vl as stock
from vllm.model_executor.models import qwen3_vl_moe as stock_moe
from vllm.multimodal import MULTIMODAL_REGISTRY

from scissor_vllm.models.patch_grid import (
    PatchGridModel,
    PatchGridProcessingInfo,
    PatchGridProcessor,
)


class Qwen3VLProcessingInfo(PatchGridProcessingInfo, stock.Qwen3VLProcessingInfo):
    """Counts a video's tokens."""

    compresses_images = True
    merges_patches = True


class Qwen3VLMoeProcessingInfo(PatchGridProcessingInfo, stock_moe.Qwen3VLMoeProcessingInfo):
    """Counts a video's tokens."""

    compresses_images = True
    merges_patches = True


class Qwen3VLProcessor(PatchGridProcessor, stock.Qwen3VLMultiModalProcessor):
    """Gives a video K placeholders and those of its text."""

    def _count_frames(self, video: Any, options: Mapping[str, object]) -> int:
        # The Hugging Face processor samples frames if vLLM's loader decoded all of them.
        scoped = self.info._merge_and_resolve_mm_processor_kwargs(options)
        settings = scoped.get("videos_kwargs", {})
        known = dict(video[1])
        samples = known.pop("do_sample_frames", False)
        if not settings.get("do_sample_frames", samples):
            return super()._count_frames(video, options)
        sampled = self.info.get_video_processor().sample_frames(
            metadata=VideoMetadata(**known),
            num_frames=settings.get("num_frames"),
            fps=settings.get("fps"),
        )
        return len(sampled)


class Qwen3VLVideos(PatchGridModel):
    """Mixin of both models."""

    @property
    def row_width(self) -> int:
        """Number of values in a row, with DeepStack's."""
        levels = getattr(self.config.vision_config, "deepstack_visual_indexes", None) or ()
        return self.token_width * (1 + len(levels))


@MULTIMODAL_REGISTRY.register_processor(
    Qwen3VLProcessor,
    info=Qwen3VLProcessingInfo,
    dummy_inputs=stock.Qwen3VLDummyInputsBuilder,
)
class Qwen3VLForConditionalGeneration(Qwen3VLVideos, stock.Qwen3VLForConditionalGeneration):
    """Encodes a video to exactly K rows and its text."""


@MULTIMODAL_REGISTRY.register_processor(
    Qwen3VLProcessor,
    info=Qwen3VLMoeProcessingInfo,
    dummy_inputs=stock.Qwen3VLDummyInputsBuilder,
)
class Qwen3VLMoeForConditionalGeneration(
    Qwen3VLVideos, stock_moe.Qwen3VLMoeForConditionalGeneration
):
    """Encodes a video to exactly K rows and its text."""
