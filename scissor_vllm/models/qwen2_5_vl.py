"""Qwen2.5-VL with compressed videos: what ``patch_grid`` says, and nothing of its own."""

from vllm.model_executor.models import qwen2_5_vl as stock
from vllm.multimodal import MULTIMODAL_REGISTRY

from scissor_vllm.models.patch_grid import (
    PatchGridModel,
    PatchGridProcessingInfo,
    PatchGridProcessor,
)


class Qwen2_5_VLProcessingInfo(PatchGridProcessingInfo, stock.Qwen2_5_VLProcessingInfo):  # noqa: N801
    """Counts a video's tokens."""


class Qwen2_5_VLProcessor(PatchGridProcessor, stock.Qwen2_5_VLMultiModalProcessor):  # noqa: N801
    """Gives a video K placeholders."""


@MULTIMODAL_REGISTRY.register_processor(
    Qwen2_5_VLProcessor,
    info=Qwen2_5_VLProcessingInfo,
    dummy_inputs=stock.Qwen2_5_VLDummyInputsBuilder,
)
class Qwen2_5_VLForConditionalGeneration(  # noqa: N801
    PatchGridModel, stock.Qwen2_5_VLForConditionalGeneration
):
    """Encodes a video to exactly K rows."""

    place_fields = (*PatchGridModel.place_fields, "second_per_grid_ts")
