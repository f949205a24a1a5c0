"""How many videos the vision tower encodes in one step of the engine.

vLLM's scheduler has a budget for it, counted in placeholders. At ratio 0.1 it would let the tower
encode ten times the frames as at 1.0 in one step, while every running request waits for its next
token and every new one for its first. Here a video counts as what the tower makes of it, so that a
step takes as long as at 1.0 and the videos behind the first are answered one after the other.
"""

from typing import Any

from vllm.v1.core.encoder_cache_manager import EncoderCacheManager
from vllm.v1.request import Request

from scissor_vllm.video_fields import NUM_VIDEO_TOKENS

CACHE_MANAGER = f"{__name__}.UncompressedBudgetCacheManager"
"""For ``encoder_cache_manager_cls`` of vLLM's ``--ec-manager-config``."""


class UncompressedBudgetCacheManager(EncoderCacheManager):
    """vLLM's manager, which also holds back a video that the step's tower has no room for.

    Whatever it takes, a step's first input is encoded: the budget covers the longest video that
    the server admits at 1.0, and nothing waits for ever.
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
        """Return whether vLLM's budget and the cache have room, and the tower as well."""
        if encoder_compute_budget >= self._step_budget:
            # Nothing was taken out of it: a step begins.
            self._step_budget = encoder_compute_budget
            self._num_encoded = 0
        num_tokens = num_tower_tokens(request, input_id)
        if self._num_encoded and self._num_encoded + num_tokens > self._step_budget:
            return False
        if not super().can_allocate(
            request, input_id, encoder_compute_budget, num_embeds_to_schedule
        ):
            return False
        self._num_encoded += num_tokens
        return True


def num_tower_tokens(request: Request, input_id: int) -> int:
    """Return how many tokens the tower makes of an input, before compression."""
    item = request.mm_features[input_id].data
    field = item.get(NUM_VIDEO_TOKENS) if item is not None else None
    if field is None:
        # No video, or in shared memory, where only the worker looks.
        return int(request.get_num_encoder_embeds(input_id))
    return int(field.data)
