"""Models give transformers' log probabilities, fed the same rows at the same positions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from scissor_vllm.compression import CompressedTokens
from tests import test_llava_next_video, test_qwen2_5_vl, test_qwen3_vl
from tests.families import WIDE, Family, Question, first_step_difference

QWEN = {
    "qwen2_5_vl": test_qwen2_5_vl.logprobs_by_transformers,
    "qwen3_vl": test_qwen3_vl.logprobs_by_transformers,
}


def check_agreement(
    family: Family, logprobs_of: Callable[[Family, Question], torch.Tensor]
) -> None:
    for question in family.single:
        expected = logprobs_of(family, question)
        assert first_step_difference(family.whole[question], expected) < 1e-2, question


def test_transformers_fed_the_same_rows_agrees(families: dict[str, Family]) -> None:
    check_agreement(families["llava_next_video"], test_llava_next_video.logprobs_by_transformers)


@pytest.mark.parametrize("name", QWEN)
def test_transformers_fed_the_same_rows_and_positions_agrees(
    name: str, families: dict[str, Family]
) -> None:
    check_agreement(
        families[name],
        lambda family, question: QWEN[name](family.model, family.folder, question),
    )


@pytest.mark.parametrize("name", QWEN)
def test_other_positions_would_be_seen(name: str, families: dict[str, Family]) -> None:
    def first_member(tokens: torch.Tensor, compressed: CompressedTokens, row: int) -> int | None:
        members = (compressed.assignment == row).nonzero().flatten().tolist()
        return members[0] if members else None

    family = families[name]
    question = Question((WIDE,), 0.1)
    other = QWEN[name](family.model, family.folder, question, first_member)
    assert first_step_difference(family.whole[question], other) > 2e-2
