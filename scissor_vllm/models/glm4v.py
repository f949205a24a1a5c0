"""GLM-4.1V, GLM-4.5V and GLM-4.6V, dense and MoE, with compressed videos.

Changes beyond those of ``patch_grid``:
- Text within a video gives each frame's time, after the frame's tokens.
- A video's placeholders are the image token. The token that begins a video tells a prompt's videos
  from its images.
"""

from collections.abc import Mapping
from typing import Any

from transformers.models.glm4v.image_processing_glm4v import smart_resize
from transformers.video_utils import VideoMetadata
from vllm.model_executor.models import glm4_1v as stock
from vllm.multimodal import MULTIMODAL_REGISTRY

from scissor_vllm.models.patch_grid import (
    PatchGridModel,
    PatchGridProcessingInfo,
    PatchGridProcessor,
)


class Glm4vProcessingInfo(PatchGridProcessingInfo, stock.Glm4vProcessingInfo):
    """Counts a video's tokens."""

    def get_num_compressible_tokens(
        self,
        *,
        width: int,
        height: int,
        num_frames: int,
        mm_kwargs: Mapping[str, object] | None = None,
    ) -> int:
        """Return T*P of the frames as the video processor resizes them."""
        processor = self.get_video_processor()
        num_frames = max(num_frames, processor.temporal_patch_size)
        requested = self.ctx.get_merged_mm_kwargs(mm_kwargs or {}).get("size")
        size = (
            {**dict(processor.size), **requested}
            if isinstance(requested, Mapping)
            else processor.size
        )
        temporal, patch, merge = (
            int(processor.temporal_patch_size),
            int(processor.patch_size),
            int(processor.merge_size),
        )
        # transformers has a method for this since 5.18 only.
        rows, columns = smart_resize(
            num_frames=num_frames,
            height=height,
            width=width,
            temporal_factor=temporal,
            factor=patch * merge,
            min_pixels=size["shortest_edge"],
            max_pixels=size["longest_edge"],
        )
        num_temporal = -(-num_frames // temporal)
        return int(num_temporal * (rows // patch // merge) * (columns // patch // merge))


class Glm4vProcessor(PatchGridProcessor, stock.Glm4vMultiModalProcessor):
    """Gives a video K placeholders and those of its text."""

    def _video_pad(self) -> int:
        return int(self.info.get_hf_config().image_token_id)

    def _count_frames(self, video: Any, options: Mapping[str, object]) -> int:
        # The Hugging Face processor samples frames if vLLM's loader decoded all of them.
        known = dict(video[1])
        if not known.pop("do_sample_frames", True):
            return super()._count_frames(video, options)
        metadata = VideoMetadata(
            **{name: value for name, value in known.items() if name in _METADATA}
        )
        return len(self.info.get_video_processor().sample_frames(metadata=metadata))


_METADATA = frozenset(VideoMetadata.__dataclass_fields__)


class Glm4vVideos(PatchGridModel):
    """Mixin of both models."""

    @property
    def video_token(self) -> int:
        """Token id of a video's placeholders, apart from text within the video."""
        return int(self.config.image_token_id)

    def _video_runs(self, tokens: list[int]) -> list[tuple[int, int]]:
        begin = [int(self.config.video_start_token_id), int(self.config.image_start_token_id)]
        runs = super()._video_runs(tokens)
        return [(first, stop) for first, stop in runs if list(tokens[first - 2 : first]) == begin]


@MULTIMODAL_REGISTRY.register_processor(
    Glm4vProcessor, info=Glm4vProcessingInfo, dummy_inputs=stock.Glm4vDummyInputsBuilder
)
class Glm4vForConditionalGeneration(Glm4vVideos, stock.Glm4vForConditionalGeneration):
    """Encodes a video to exactly K rows and its text."""


@MULTIMODAL_REGISTRY.register_processor(
    Glm4vProcessor, info=Glm4vProcessingInfo, dummy_inputs=stock.Glm4vDummyInputsBuilder
)
class Glm4vMoeForConditionalGeneration(Glm4vVideos, stock.Glm4vMoeForConditionalGeneration):
    """Encodes a video to exactly K rows and its text."""
