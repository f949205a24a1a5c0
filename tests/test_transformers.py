"""Qwen-VL's models give transformers' log probabilities, fed the same rows and positions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from scissor_vllm.compression import CompressedTokens
from tests import test_qwen2_5_vl, test_qwen3_vl
from tests.families import WIDE, Family, Question

Logprobs = Callable[..., torch.Tensor]
"""Of a model, its folder and a question, and of the rule that gives a row its position."""

FAMILIES = pytest.mark.parametrize(
    ("name", "logprobs"),
    [
        ("qwen2_5_vl", test_qwen2_5_vl.logprobs_by_transformers),
        ("qwen3_vl", test_qwen3_vl.logprobs_by_transformers),
    ],
    ids=["qwen2_5_vl", "qwen3_vl"],
)


@FAMILIES
def test_transformers_fed_the_same_rows_and_positions_agrees(
    name: str, logprobs: Logprobs, families: dict[str, Family]
) -> None:
    family = families[name]
    for question in family.single:
        expected = logprobs(family.model, family.folder, question)
        for token, logprob in family.whole[question].first.items():
            assert logprob == pytest.approx(float(expected[token]), abs=1e-2), question


@FAMILIES
def test_other_positions_would_be_seen(
    name: str, logprobs: Logprobs, families: dict[str, Family]
) -> None:
    def first_member(tokens: torch.Tensor, compressed: CompressedTokens, row: int) -> int | None:
        members = (compressed.assignment == row).nonzero().flatten().tolist()
        return members[0] if members else None

    family = families[name]
    question = Question((WIDE,), 0.1)
    other = logprobs(family.model, family.folder, question, first_member)
    answer = family.whole[question].first
    assert max(abs(value - float(other[token])) for token, value in answer.items()) > 2e-2
