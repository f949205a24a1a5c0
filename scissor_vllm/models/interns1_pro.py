"""Intern-S1-Pro with compressed videos: the changes of ``qwen3_vl`` and no more."""

from vllm.model_executor.models import interns1_pro as stock
from vllm.model_executor.models.qwen3_vl import Qwen3VLDummyInputsBuilder
from vllm.multimodal import MULTIMODAL_REGISTRY

from scissor_vllm.models.patch_grid import PatchGridProcessingInfo
from scissor_vllm.models.qwen3_vl import Qwen3VLProcessor, Qwen3VLVideos


class InternS1ProProcessingInfo(PatchGridProcessingInfo, stock.InternS1ProProcessingInfo):
    """Counts a video's tokens."""

    merges_patches = True


@MULTIMODAL_REGISTRY.register_processor(
    Qwen3VLProcessor, info=InternS1ProProcessingInfo, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class InternS1ProForConditionalGeneration(Qwen3VLVideos, stock.InternS1ProForConditionalGeneration):
    """Encodes a video to exactly K rows and its text."""
