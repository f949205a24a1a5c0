"""EXAONE 4.5 with compressed videos: the changes of ``patch_grid``.

The language model has 1-D positions, so rows carry none.
"""

from vllm.model_executor.models import exaone4_5 as stock
from vllm.model_executor.models.qwen2_vl import (
    Qwen2VLDummyInputsBuilder,
    Qwen2VLMultiModalProcessor,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from scissor_vllm.models.patch_grid import (
    PatchGridModel,
    PatchGridProcessingInfo,
    PatchGridProcessor,
)


class Exaone4_5ProcessingInfo(PatchGridProcessingInfo, stock.Exaone4_5_ProcessingInfo):  # noqa: N801
    """Counts a video's tokens."""


class Exaone4_5Processor(PatchGridProcessor, Qwen2VLMultiModalProcessor):  # noqa: N801
    """Gives a video K placeholders."""


@MULTIMODAL_REGISTRY.register_processor(
    Exaone4_5Processor, info=Exaone4_5ProcessingInfo, dummy_inputs=Qwen2VLDummyInputsBuilder
)
class Exaone4_5_ForConditionalGeneration(  # noqa: N801
    PatchGridModel, stock.Exaone4_5_ForConditionalGeneration
):
    """Encodes a video to exactly K rows."""

    has_text_within = False
