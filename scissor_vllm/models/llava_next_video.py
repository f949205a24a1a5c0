"""LLaVA-NeXT-Video with compressed videos: the changes of ``frames`` and no more.

A prompt has one video and no images, as in vLLM.
"""

from vllm.model_executor.models import llava_next_video as stock
from vllm.multimodal import MULTIMODAL_REGISTRY

from scissor_vllm.models.frames import (
    WITH_TOWER_LEVEL,
    FramesModel,
    FramesProcessingInfo,
    FramesProcessor,
)


class LlavaNextVideoProcessingInfo(FramesProcessingInfo, stock.LlavaNextVideoProcessingInfo):
    """Counts a video's tokens."""


class LlavaNextVideoProcessor(FramesProcessor, stock.LlavaNextVideoMultiModalProcessor):
    """Gives a video K placeholders."""


@MULTIMODAL_REGISTRY.register_processor(
    LlavaNextVideoProcessor,
    info=LlavaNextVideoProcessingInfo,
    dummy_inputs=stock.LlavaNextVideoDummyInputsBuilder,
)
class LlavaNextVideoForConditionalGeneration(
    FramesModel, stock.LlavaNextVideoForConditionalGeneration
):
    """Encodes a video to exactly K rows."""

    hf_to_vllm_mapper = (
        WITH_TOWER_LEVEL | stock.LlavaNextVideoForConditionalGeneration.hf_to_vllm_mapper
    )

    @property
    def tokens_per_frame(self) -> int:
        """P of the pooled grid."""
        return int(self.pooled_grid_length**2)
