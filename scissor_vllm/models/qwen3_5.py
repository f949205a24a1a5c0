"""Qwen3.5 and Qwen3.6, dense and MoE, with compressed videos: the changes of ``qwen3_vl``.

Their towers have DeepStack only if the config names its layers. The published configs do not.
"""

from vllm.model_executor.models import qwen3_5 as stock
from vllm.model_executor.models.qwen3_vl import Qwen3VLDummyInputsBuilder
from vllm.multimodal import MULTIMODAL_REGISTRY

from scissor_vllm.models.patch_grid import PatchGridProcessingInfo
from scissor_vllm.models.qwen3_vl import Qwen3VLProcessor, Qwen3VLVideos


class Qwen3_5ProcessingInfo(PatchGridProcessingInfo, stock.Qwen3_5ProcessingInfo):  # noqa: N801
    """Counts a video's tokens."""

    merges_patches = True


class Qwen3_5MoeProcessingInfo(  # noqa: N801
    PatchGridProcessingInfo, stock.Qwen3_5MoeProcessingInfo
):
    """Counts a video's tokens."""

    merges_patches = True


@MULTIMODAL_REGISTRY.register_processor(
    Qwen3VLProcessor, info=Qwen3_5ProcessingInfo, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class Qwen3_5ForConditionalGeneration(  # noqa: N801
    Qwen3VLVideos, stock.Qwen3_5ForConditionalGeneration
):
    """Encodes a video to exactly K rows and its text."""


@MULTIMODAL_REGISTRY.register_processor(
    Qwen3VLProcessor, info=Qwen3_5MoeProcessingInfo, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class Qwen3_5MoeForConditionalGeneration(  # noqa: N801
    Qwen3VLVideos, stock.Qwen3_5MoeForConditionalGeneration
):
    """Encodes a video to exactly K rows and its text."""
