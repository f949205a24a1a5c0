"""The videos that a step of the engine may encode, counted in tokens before compression."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import torch
from vllm.config.ec_manager_config import EncoderCacheManagerConfig

from scissor_vllm.scheduler.encoder_budget import CACHE_MANAGER, UncompressedBudgetCacheManager
from scissor_vllm.video_fields import NUM_VIDEO_TOKENS

BUDGET = 8192
_NUMBERS = itertools.count()


def make_request(*videos: tuple[int, int | None]) -> Any:
    """A request of videos (K, N); N is None for other inputs."""
    name = f"request-{next(_NUMBERS)}"
    features = [
        SimpleNamespace(
            identifier=f"{name}-{place}",
            data=None
            if num_tokens is None
            else {NUM_VIDEO_TOKENS: SimpleNamespace(data=torch.tensor(num_tokens))},
        )
        for place, (_, num_tokens) in enumerate(videos)
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


def test_a_step_encodes_as_many_frames_as_at_ratio_one() -> None:
    step = Step(make_manager())
    requests = [make_request((629, 6272)) for _ in range(3)]
    assert [step.encodes(request) for request in requests] == [True, False, False]


def test_short_videos_share_a_step() -> None:
    step = Step(make_manager())
    requests = [make_request((101, 1000)) for _ in range(10)]
    assert sum(step.encodes(request) for request in requests) == 8


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
    request = make_request((400, 4000), (400, 4000), (400, 4000))
    assert [step.encodes(request, place) for place in range(3)] == [True, True, False]


def test_a_full_cache_refuses_as_vllms_does() -> None:
    manager = make_manager(cache_size=1000)
    assert Step(manager).encodes(make_request((629, 6272)))
    assert not Step(manager).encodes(make_request((629, 6272)))


def test_vllm_finds_it_by_its_name() -> None:
    config = EncoderCacheManagerConfig(encoder_cache_manager_cls=CACHE_MANAGER)
    assert config.get_encoder_cache_manager_obj() is UncompressedBudgetCacheManager
