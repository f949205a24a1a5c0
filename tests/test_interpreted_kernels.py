"""Runs the laws of ``interpreted_kernels.py``: CUDA kernels on the CPU by Triton's interpreter."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests import interpreted_kernels
from tests.interpreter import python_interpreting

SLOW = tuple(interpreted_kernels.SLOW)


def run(*laws: str) -> dict[str, dict[str, Any]]:
    process = python_interpreting("-m", "tests.interpreted_kernels", *laws)
    results = [json.loads(line) for line in process.stdout.splitlines()]
    assert process.returncode == 0, process.stderr
    return {result["law"]: result for result in results}


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    """All laws but the slow ones, in one process."""
    return run()


@pytest.mark.parametrize("law", interpreted_kernels.LAWS)
def test_interpreted(law: str, results: dict[str, dict[str, Any]]) -> None:
    assert results[law]["error"] is None, results[law]["error"]


@pytest.mark.slow
@pytest.mark.parametrize("law", SLOW)
def test_interpreted_at_length(law: str) -> None:
    result = run(law)[law]
    assert result["error"] is None, result["error"]
