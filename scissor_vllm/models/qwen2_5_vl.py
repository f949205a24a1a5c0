"""Qwen2.5-VL with compressed videos: the changes of ``patch_grid``, and faster MLPs on a GPU.

Only compressed videos pass these MLPs, see ``worker.aligned_mlp``.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from vllm.model_executor.models import qwen2_5_vl as stock
from vllm.multimodal import MULTIMODAL_REGISTRY

from scissor_vllm.models.patch_grid import (
    PatchGridModel,
    PatchGridProcessingInfo,
    PatchGridProcessor,
)


class Qwen2_5_VLProcessingInfo(PatchGridProcessingInfo, stock.Qwen2_5_VLProcessingInfo):  # noqa: N801
    """Counts a video's tokens."""

    compresses_images = True
    merges_patches = True


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

    has_text_within = False
    place_fields = (*PatchGridModel.place_fields, "second_per_grid_ts")

    _aligned_mlps: Any = None

    def forget_encoded(self) -> None:
        """Drop cached features of old weights, and copy the MLPs' weights again."""
        super().forget_encoded()
        if self._aligned_mlps is not None:
            self._aligned_mlps.refresh()

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load weights as vLLM does, and drop what was made of the old ones."""
        self._aligned_mlps = None
        return super().load_weights(weights)

    @contextmanager
    def _tower_of_compressed(self) -> Iterator[None]:
        with super()._tower_of_compressed(), self._aligned():
            yield

    def _aligned(self) -> AbstractContextManager[Any]:
        """Return a context in which the tower uses aligned MLPs on a GPU."""
        if next(self.visual.parameters()).device.type != "cuda":
            return nullcontext()
        if self._aligned_mlps is None:
            from scissor_vllm.worker.aligned_mlp import AlignedMLPs

            self._aligned_mlps = AlignedMLPs(self.visual)
        context: AbstractContextManager[Any] = self._aligned_mlps.in_use()
        return context

    def _warm_up_tower(self) -> None:
        vision = self.config.vision_config
        merge, patch = vision.spatial_merge_size, vision.patch_size
        width = vision.in_channels * vision.temporal_patch_size * patch**2
        weight = next(self.visual.parameters())
        with self._tower_of_compressed():
            self.visual(weight.new_zeros(merge**2, width), grid_thw=[[1, merge, merge]])
        super()._warm_up_tower()
