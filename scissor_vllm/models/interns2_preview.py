"""Intern-S2-Preview with compressed videos: the changes of ``qwen3_5`` and no more."""

from vllm.model_executor.models import interns2_preview as stock
from vllm.model_executor.models.qwen3_vl import Qwen3VLDummyInputsBuilder
from vllm.multimodal import MULTIMODAL_REGISTRY

from scissor_vllm.models.patch_grid import PatchGridProcessingInfo
from scissor_vllm.models.qwen3_vl import Qwen3VLProcessor, Qwen3VLVideos


class InternS2PreviewProcessingInfo(PatchGridProcessingInfo, stock.InternS2PreviewProcessingInfo):
    """Counts a video's tokens."""

    merges_patches = True


@MULTIMODAL_REGISTRY.register_processor(
    Qwen3VLProcessor, info=InternS2PreviewProcessingInfo, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class InternS2PreviewForConditionalGeneration(
    Qwen3VLVideos, stock.InternS2PreviewForConditionalGeneration
):
    """Encodes a video to exactly K rows and its text."""
