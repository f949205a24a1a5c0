"""Runs Triton's kernels on the CPU, in a new process: Triton chooses its interpreter at import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def run_interpreted(program: str) -> subprocess.CompletedProcess[str]:
    """Run a Python program in which Triton interprets kernels; skip the test without Triton."""
    return python_interpreting("-c", program)


def python_interpreting(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in which Triton interprets kernels; skip the test without Triton."""
    pytest.importorskip("triton", reason="needs Triton")
    return subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
