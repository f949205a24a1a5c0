"""The videos that a step of the engine may encode, counted in tokens that the tower computes."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import torch
from vllm.config.ec_manager_config import EncoderCacheManagerConfig

from scissor_vllm.scheduler.encoder_budget import CACHE_MANAGER, UncompressedBudgetCacheManager
from scissor_vllm.video_fields import NUM_ENCODED_TOKENS

BUDGET = 8192
_NUMBERS = itertools.count()


def make_request(*videos: tuple[int, int | None]) -> Any:
    """A request of videos (K, encoded tokens); these are None for other inputs."""
    name = f"request-{next(_NUMBERS)}"
    features = [
        SimpleNamespace(
            identifier=f"{name}-{place}",
            data=None
            if num_encoded is None
            else {NUM_ENCODED_TOKENS: SimpleNamespace(data=torch.tensor(num_encoded))},
        )
        for place, (_, num_encoded) in enumerate(videos)
    ]
    return SimpleNamespace(
        request_id=name,
        mm_features=features,
        get_num_encoder_embeds=lambda place: videos[place][0],
    )


class Step:
    """Do one step as vLLM's scheduler does."""

    def __init__(self, manager: UncompressedBudgetCacheManager) -> None:
        self.manager = manager
        self.left = BUDGET

    def encodes(self, request: Any, place: int = 0) -> bool:
        if not self.manager.can_allocate(request, place, self.left, 0):
            return False
        self.manager.allocate(request, place)
        self.left -= request.get_num_encoder_embeds(place)
        return True


def make_manager(cache_size: int = 10 * BUDGET) -> UncompressedBudgetCacheManager:
    config: Any = None
    manager = UncompressedBudgetCacheManager.create_manager(
        cache_size=cache_size, vllm_config=config
    )
    assert isinstance(manager, UncompressedBudgetCacheManager)
    return manager


def num_videos(num_retained: int, num_encoded: int) -> int:
    """How many of twenty equal videos the first step encodes."""
    step = Step(make_manager())
    requests = [make_request((num_retained, num_encoded)) for _ in range(20)]
    encoded = [step.encodes(request) for request in requests]
    assert encoded == sorted(encoded, reverse=True)
    return sum(encoded)


def test_a_step_encodes_more_videos_the_fewer_of_their_tokens_are_computed() -> None:
    for num_retained in (1, 628):
        numbers = [num_videos(num_retained, round(share * 6272)) for share in (1, 0.6, 0.35, 0.28)]
        assert numbers == [1, 2, 3, 4]


def test_the_tower_computes_no_more_tokens_than_vllms_budget_however_few_are_kept() -> None:
    for num_encoded in (100, 1000, 3000, 8192):
        assert num_videos(1, num_encoded) == min(20, BUDGET // num_encoded)
        # Not fewer kept ones than placeholders that vLLM counts.
        assert num_videos(num_encoded, num_encoded) == min(20, BUDGET // num_encoded)


def test_a_merged_video_of_which_much_is_kept_counts_as_vllm_counts_it() -> None:
    assert num_videos(4000, 1000) == 2


def test_the_next_step_begins_anew() -> None:
    manager = make_manager()
    for request in [make_request((629, 6272)) for _ in range(4)]:
        assert Step(manager).encodes(request)


def test_the_first_of_a_step_is_encoded_however_long_it_is() -> None:
    step = Step(make_manager())
    assert step.encodes(make_request((3277, 32768)))
    assert not step.encodes(make_request((2, 4)))


def test_other_inputs_count_as_vllm_counts_them() -> None:
    step = Step(make_manager())
    assert step.encodes(make_request((6000, None)))
    assert not step.encodes(make_request((3000, None)))
    assert step.encodes(make_request((2000, None)))


def test_the_videos_of_one_request_are_counted_one_by_one() -> None:
    step = Step(make_manager())
    request = make_request(*[(400, 1600)] * 7)
    places = [step.encodes(request, place) for place in range(7)]
    assert places == [True] * 5 + [False] * 2


def test_a_full_cache_refuses_as_vllms_does() -> None:
    manager = make_manager(cache_size=1000)
    assert Step(manager).encodes(make_request((629, 6272)))
    assert not Step(manager).encodes(make_request((629, 6272)))


def test_vllm_finds_it_by_its_name() -> None:
    config = EncoderCacheManagerConfig(encoder_cache_manager_cls=CACHE_MANAGER)
    assert config.get_encoder_cache_manager_obj() is UncompressedBudgetCacheManager
