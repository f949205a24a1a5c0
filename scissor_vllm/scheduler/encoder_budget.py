"""Bounds the time of one engine step that encodes videos.

vLLM's scheduler budgets the vision tower in placeholders. At ratio 0.1 it would encode ten times as
many frames in one step as at 1.0, while all running requests wait. Here a video counts with what it
costs: its tokens before compression in the tower, those that are kept in the language model. So a
step takes about as long as at 1.0. Counted with the tower's tokens alone, a step would have one
video, and most of a step is then the host launching the language model.
"""

import math
from typing import Any

from vllm.v1.core.encoder_cache_manager import EncoderCacheManager
from vllm.v1.request import Request

from scissor_vllm.video_fields import NUM_VIDEO_TOKENS

CACHE_MANAGER = f"{__name__}.UncompressedBudgetCacheManager"
"""For ``encoder_cache_manager_cls`` of vLLM's ``--ec-manager-config``."""

_TOWER_SHARE = 1 / 3
"""Share of the tower in the time of a token at ratio 1.0. On an H200 under load vLLM's tower takes
0.2 of a video's time with LLaVA-OneVision-7B's shapes, and 0.4 with Qwen2.5-VL-7B's."""


class UncompressedBudgetCacheManager(EncoderCacheManager):
    """vLLM's manager, with a limit on the cost of one step's videos.

    The first input of a step is always admitted, so no input waits forever.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._step_budget = 0
        self._cost = 0

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
            self._cost = 0
        cost = cost_in_tokens(request, input_id)
        if self._cost and self._cost + cost > self._step_budget:
            return False
        if not super().can_allocate(
            request, input_id, encoder_compute_budget, num_embeds_to_schedule
        ):
            return False
        self._cost += cost
        return True


def cost_in_tokens(request: Request, input_id: int) -> int:
    """Return how many tokens at ratio 1.0 take as long as an input."""
    num_placeholders = int(request.get_num_encoder_embeds(input_id))
    item = request.mm_features[input_id].data
    field = item.get(NUM_VIDEO_TOKENS) if item is not None else None
    if field is None:
        # No video, or data in shared memory, which only the worker reads.
        return num_placeholders
    num_tokens = int(field.data)
    return math.ceil(_TOWER_SHARE * num_tokens + (1 - _TOWER_SHARE) * num_placeholders)
