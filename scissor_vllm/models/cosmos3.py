"""Cosmos 3 (Reason) with compressed videos: the changes of ``qwen3_vl`` and no more."""

from vllm.model_executor.models import cosmos3 as stock
from vllm.model_executor.models.qwen3_vl import Qwen3VLDummyInputsBuilder
from vllm.multimodal import MULTIMODAL_REGISTRY

from scissor_vllm.models.patch_grid import PatchGridProcessingInfo
from scissor_vllm.models.qwen3_vl import Qwen3VLProcessor, Qwen3VLVideos


class Cosmos3ProcessingInfo(PatchGridProcessingInfo, stock.Cosmos3ProcessingInfo):
    """Counts a video's tokens."""

    merges_patches = True


@MULTIMODAL_REGISTRY.register_processor(
    Qwen3VLProcessor, info=Cosmos3ProcessingInfo, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class Cosmos3ForConditionalGeneration(Qwen3VLVideos, stock.Cosmos3ForConditionalGeneration):
    """Encodes a video to exactly K rows and its text."""
