"""Runs all tests that need a GPU, and writes their counts with the hardware and versions.

    python -m bench.gpu_tests [--output FILE] [PYTEST ARGUMENT ...]

It needs a CUDA device, torch, Triton and pytest. Test files that import a missing package, usually
vLLM, are left out, and the result names them with the reason. Without ``--output`` the result is
``bench/results/gpu-tests-GPU-COMMIT.json``. The exit status is 1 if a test failed or none ran.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from scissor_vllm.loadtest.record import environment, write_json

ROOT = Path(__file__).resolve().parents[1]
_IS_GPU_TEST = re.compile(r"mark\.gpu\b")


class Counter:
    """A pytest plugin that counts outcomes."""

    def __init__(self) -> None:
        self.counts = {"passed": 0, "failed": 0, "skipped": 0}
        self.failed: list[str] = []
        self.skipped: dict[str, str] = {}
        self.seconds: dict[str, float] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a test by the outcome of its call, or of its setup if it was not called."""
        if report.when == "call":
            self.seconds[report.nodeid] = round(report.duration, 2)
        if report.when != "call" and report.passed:
            return
        self.counts[report.outcome] += 1
        if report.failed:
            self.failed.append(report.nodeid)
        if report.skipped and isinstance(report.longrepr, tuple):
            self.skipped[report.nodeid] = report.longrepr[2]


def gpu_test_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """Return the files with GPU tests that can be imported, and the other files with the reason."""
    files, left_out = [], {}
    for path in sorted(folder.glob("test_*.py")):
        if not _IS_GPU_TEST.search(path.read_text()):
            continue
        try:
            importlib.import_module(f"{folder.name}.{path.stem}")
        except ModuleNotFoundError as error:
            left_out[path.name] = f"needs {error.name}, which is not installed"
        except pytest.skip.Exception as error:
            left_out[path.name] = str(error)
        else:
            files.append(path)
    return files, left_out


def default_output(result: dict[str, Any]) -> Path:
    """Return the default path of a result."""
    gpu = re.sub(r"[^a-z0-9]+", "-", str(result["gpu"]).lower().removeprefix("nvidia ")).strip("-")
    commit = str(result["environment"].get("commit") or "unknown")[:7]
    return ROOT / "bench" / "results" / f"gpu-tests-{gpu}-{commit}.json"


def main(arguments: list[str] | None = None) -> int:
    """Run the tests; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, help="file for the result")
    args, pytest_arguments = parser.parse_known_args(arguments)
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device: run this on a host with a GPU")
    files, left_out = gpu_test_files(ROOT / "tests")
    counter, begin = Counter(), time.perf_counter()
    # The fixtures of the suite need vLLM and a server; GPU tests use none of them.
    flags = ["-m", "gpu", "--noconftest", "-q", "-p", "no:cacheprovider"]
    code = pytest.main([*flags, *pytest_arguments, *map(str, files)], plugins=[counter])
    result: dict[str, Any] = {
        "environment": environment(),
        "gpu": torch.cuda.get_device_name(),
        "seconds": round(time.perf_counter() - begin, 1),
        **counter.counts,
        "failures": counter.failed,
        "skips": counter.skipped,
        "files_left_out": left_out,
        "seconds_by_test": counter.seconds,
    }
    output = args.output or default_output(result)
    write_json(output, result)
    print(f"{counter.counts}, left out: {left_out or 'none'}; written to {output}")
    return int(code != pytest.ExitCode.OK or counter.counts["passed"] == 0)


if __name__ == "__main__":
    sys.exit(main())
