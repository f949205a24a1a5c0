"""Qwen2-VL with compressed videos: the changes of ``patch_grid`` and no more."""

from vllm.model_executor.models import qwen2_vl as stock
from vllm.multimodal import MULTIMODAL_REGISTRY

from scissor_vllm.models.patch_grid import (
    PatchGridModel,
    PatchGridProcessingInfo,
    PatchGridProcessor,
)


class Qwen2VLProcessingInfo(PatchGridProcessingInfo, stock.Qwen2VLProcessingInfo):
    """Counts a video's tokens."""

    merges_patches = True


class Qwen2VLProcessor(PatchGridProcessor, stock.Qwen2VLMultiModalProcessor):
    """Gives a video K placeholders."""


@MULTIMODAL_REGISTRY.register_processor(
    Qwen2VLProcessor, info=Qwen2VLProcessingInfo, dummy_inputs=stock.Qwen2VLDummyInputsBuilder
)
class Qwen2VLForConditionalGeneration(PatchGridModel, stock.Qwen2VLForConditionalGeneration):
    """Encodes a video to exactly K rows."""

    has_text_within = False

    @property
    def token_width(self) -> int:
        """Number of a row's values: this config calls the language model's width so."""
        return int(self.config.vision_config.hidden_size)
