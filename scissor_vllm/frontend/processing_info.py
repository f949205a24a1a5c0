"""The processor's view of a model: the operator's settings and the number of a video's tokens."""

from __future__ import annotations

import copy
from abc import abstractmethod
from dataclasses import replace

from vllm.multimodal.processing import InputProcessingContext

from scissor_vllm.frontend.frame_cache import FRAMES
from scissor_vllm.models import FP8_MODELS, MERGING_TOWERS, NO_IMAGE_RUNS
from scissor_vllm.settings import (
    ALLOW_COMPRESS_IMAGES,
    TOWER_FP8_MAX_RATIO,
    TOWER_MERGING_MAX_RATIO,
    CacheSizes,
    RetentionPolicy,
    TowerFP8,
    TowerMerging,
    without_own_keys,
)


def without_retention_settings(ctx: InputProcessingContext) -> InputProcessingContext:
    """Return a copy of the context without our keys in the engine's ``mm_processor_kwargs``.

    vLLM passes all of these options to the Hugging Face processor, which rejects ours.
    """
    model_config = copy.copy(ctx.model_config)
    mm_config = copy.copy(model_config.get_multimodal_config())
    mm_config.mm_processor_kwargs = without_own_keys(mm_config.mm_processor_kwargs or {})
    model_config.multimodal_config = mm_config
    return replace(ctx, model_config=model_config)


class RetentionProcessingInfo:
    """Mixin of a model's processing info, placed before vLLM's class.

    It reads the operator's settings. A family's class counts the tokens of a video.
    """

    def __init__(self, ctx: InputProcessingContext) -> None:
        mm_config = ctx.model_config.get_multimodal_config()
        self.retention_policy = RetentionPolicy.from_mm_processor_kwargs(
            mm_config.mm_processor_kwargs
        )
        self.cache_sizes = CacheSizes.of(
            mm_config.mm_processor_kwargs, mm_config.mm_processor_cache_gb
        )
        self.tower_merging = TowerMerging.from_mm_processor_kwargs(mm_config.mm_processor_kwargs)
        self.tower_fp8 = TowerFP8.from_mm_processor_kwargs(mm_config.mm_processor_kwargs)
        FRAMES.resize(self.cache_sizes.frames)
        super().__init__(without_retention_settings(ctx))  # type: ignore[call-arg]
        if self.tower_merging.max_ratio > 0 and self.get_patch_size() is None:
            raise ValueError(
                f"{TOWER_MERGING_MAX_RATIO} cannot be set for this model: patches are merged in "
                f"{MERGING_TOWERS} only; leave it out"
            )
        if self.tower_fp8.max_ratio > 0 and not self.has_fp8_tower():
            raise ValueError(
                f"{TOWER_FP8_MAX_RATIO} cannot be set for this model: MLPs are computed in FP8 in "
                f"SigLIP's tower of {' and '.join(FP8_MODELS)} only; leave it out"
            )
        if self.retention_policy.allows_compress_images and not self.get_num_frames_of_image():
            raise ValueError(
                f"{ALLOW_COMPRESS_IMAGES} cannot be set for this model: {NO_IMAGE_RUNS}; leave it "
                "out"
            )

    @abstractmethod
    def get_num_compressible_tokens(self, *, width: int, height: int, num_frames: int) -> int:
        """Return N: the tokens of a video that compression acts on."""

    @abstractmethod
    def get_num_fixed_tokens(self) -> int:
        """Return the number of placeholders after a video's tokens; they are never compressed."""

    def get_patch_size(self) -> int | None:
        """Return the side of the tower's patches in pixels, None if the tower merges no patches."""
        return None

    def has_fp8_tower(self) -> bool:
        """Return whether the tower can have MLPs in FP8."""
        return False

    def get_num_frames_of_image(self) -> int:
        """Return how many equal frames stand for an image of a run, 0 without such runs.

        They are the frames that share tokens, so an image shares its tokens with no other.
        """
        return 0
