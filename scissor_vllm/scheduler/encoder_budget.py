"""Bounds the time of one engine step that encodes videos.

vLLM's scheduler budgets the vision tower in placeholders. At ratio 0.1 it would encode ten times as
many frames in one step as at 1.0, while all running requests wait. Here a video counts as the
tokens that the tower computes for it. Without merged patches those are all of its tokens, as in
vLLM at 1.0. Three such videos in a step gave no more requests/s than one (docs/benchmarks.md). With
merged patches they are fewer, so several videos share a step.
"""

from typing import Any

from vllm.v1.core.encoder_cache_manager import EncoderCacheManager
from vllm.v1.request import Request

from scissor_vllm.video_fields import NUM_ENCODED_TOKENS

CACHE_MANAGER = f"{__name__}.UncompressedBudgetCacheManager"
"""For ``encoder_cache_manager_cls`` of vLLM's ``--ec-manager-config``."""


class UncompressedBudgetCacheManager(EncoderCacheManager):
    """vLLM's manager, with a limit on the tokens that the tower computes in a step.

    The first input of a step is always admitted, so no input waits forever.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._step_budget = 0
        self._num_encoded = 0

    def can_allocate(
        self,
        request: Request,
        input_id: int,
        encoder_compute_budget: int,
        num_embeds_to_schedule: int,
    ) -> bool:
        """Return whether vLLM's budget, the cache and the step have room."""
        if encoder_compute_budget >= self._step_budget:
            # An untouched budget marks the start of a step.
            self._step_budget = encoder_compute_budget
            self._num_encoded = 0
        num_tokens = num_encoded_tokens(request, input_id)
        if self._num_encoded and self._num_encoded + num_tokens > self._step_budget:
            return False
        if not super().can_allocate(
            request, input_id, encoder_compute_budget, num_embeds_to_schedule
        ):
            return False
        self._num_encoded += num_tokens
        return True


def num_encoded_tokens(request: Request, input_id: int) -> int:
    """Return how many tokens the tower computes for an input, or its placeholders.

    Its placeholders count where it is no video, or where its data is in shared memory, which only
    the worker reads.
    """
    item = request.mm_features[input_id].data
    field = item.get(NUM_ENCODED_TOKENS) if item is not None else None
    if field is None:
        return int(request.get_num_encoder_embeds(input_id))
    return int(field.data)
