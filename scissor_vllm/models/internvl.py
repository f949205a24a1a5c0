"""InternVL 3 and 3.5 with compressed videos, in both formats of their checkpoints.

The changes are those of ``frame_runs`` for 1-D positions. The text within a video numbers its
frames ("Frame1: ..."). A frame is one tile.
"""

from typing import Any

from vllm.model_executor.models import interns1 as stock_hf
from vllm.model_executor.models import internvl as stock
from vllm.multimodal import MULTIMODAL_REGISTRY

from scissor_vllm.frontend.processing_info import RetentionProcessingInfo
from scissor_vllm.models.frame_runs import (
    FramesOfVideo,
    SequentialFrameRunsModel,
    SequentialFrameRunsProcessor,
)


class TilesProcessingInfo(RetentionProcessingInfo):
    """Mixin of both formats' processing info."""

    def get_num_compressible_tokens(self, *, width: int, height: int, num_frames: int) -> int:
        """Return T*P: every frame is resized to one tile."""
        return num_frames * int(self.get_hf_processor().image_seq_length)  # type: ignore[attr-defined]

    def get_num_fixed_tokens(self) -> int:
        """Return 0: nothing follows a video."""
        return 0


class TilesProcessor(SequentialFrameRunsProcessor):
    """Mixin of both formats' processor."""

    def _get_num_prepared_tokens(self, processed: Any, index: int) -> int:
        num_frames = int(processed["video_num_patches"][index])
        return num_frames * int(self.info.get_hf_processor().image_seq_length)


class TilesModel(SequentialFrameRunsModel):
    """Mixin of both formats' model."""

    num_image_token: int
    pixels_field: str

    @property
    def tokens_per_frame(self) -> int:
        """P."""
        return self.num_image_token

    def _videos(self, fields: dict[str, Any], num_tokens: list[int]) -> list[FramesOfVideo]:
        per_frame = self.num_image_token
        frames = fields[self.pixels_field].split([count // per_frame for count in num_tokens])
        return [FramesOfVideo(pixels, per_frame, self.extract_feature) for pixels in frames]  # type: ignore[attr-defined]


class InternVLProcessingInfo(TilesProcessingInfo, stock.InternVLProcessingInfo):
    """Counts a video's tokens."""


class InternVLProcessor(TilesProcessor, stock.InternVLMultiModalProcessor):
    """Gives a video K placeholders and those of its text."""

    pixel_fields = ("pixel_values_flat_video",)

    def _video_pad(self) -> int:
        return int(self.info.get_hf_processor().ctx_video_token_id)


@MULTIMODAL_REGISTRY.register_processor(
    InternVLProcessor, info=InternVLProcessingInfo, dummy_inputs=stock.InternVLDummyInputsBuilder
)
class InternVLChatModel(TilesModel, stock.InternVLChatModel):
    """Encodes a video to exactly K rows and its text."""

    pixels_field = "pixel_values_flat_video"


class InternS1ProcessingInfo(TilesProcessingInfo, stock_hf.InternS1ProcessingInfo):
    """Counts a video's tokens."""


class InternS1Processor(TilesProcessor, stock_hf.InternS1MultiModalProcessor):
    """Gives a video K placeholders and those of its text."""

    pixel_fields = ("pixel_values_videos",)

    def _video_pad(self) -> int:
        tokenizer = self.info.get_tokenizer()
        return int(tokenizer.convert_tokens_to_ids(self.info.get_hf_processor().video_token))


@MULTIMODAL_REGISTRY.register_processor(
    InternS1Processor,
    info=InternS1ProcessingInfo,
    dummy_inputs=stock_hf.InternS1DummyInputsBuilder,
)
class InternS1ForConditionalGeneration(TilesModel, stock_hf.InternS1ForConditionalGeneration):
    """Encodes a video to exactly K rows and its text, for checkpoints in transformers' format."""

    pixels_field = "pixel_values_videos"
