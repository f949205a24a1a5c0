"""Samples the memory of a server's processes, and fits how fast it grows."""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

WARM_UP_SHARE = 1 / 3
"""Share of a run in which caches fill: it is not in the fit."""
MIN_SAMPLES = 6
SHOWN_MIB = 50
"""Processes that never had as much are not listed."""


@dataclass
class MemorySampler:
    """Samples memory and open files of a process and its descendants, in a thread.

    Args:
        pid: of the process; None samples nothing.
        interval_seconds: between samples.
    """

    pid: int | None
    interval_seconds: float = 5.0
    samples: list[dict[str, Any]] = field(default_factory=list)
    """``seconds``, ``mib`` and ``num_files`` of all processes, and ``processes`` by name."""
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> MemorySampler:
        if self.pid is not None:
            self._thread = threading.Thread(target=self._run, args=(self.pid,), daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self, pid: int) -> None:
        begin = time.monotonic()
        while True:
            with contextlib.suppress(psutil.NoSuchProcess):
                seconds = round(time.monotonic() - begin, 1)
                self.samples.append({"seconds": seconds, **sample(pid)})
            if self._stop.wait(self.interval_seconds):
                return


def sample(pid: int) -> dict[str, Any]:
    """Return MiB and open files of a process and its descendants, together and by process.

    A page that n processes share counts as 1/n of a page in each. Pages of files are left out: the
    system drops them when it needs room, and other servers share them.

    Raises:
        psutil.NoSuchProcess: it has ended.
    """
    root = psutil.Process(pid)
    sizes: dict[str, float] = {}
    num_files = 0
    for process in (root, *root.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            sizes[f"{process.name()} {process.pid}"] = round(_mib_of(process.pid), 1)
            num_files += process.num_fds()
    return {"mib": round(sum(sizes.values()), 1), "num_files": num_files, "processes": sizes}


def _mib_of(pid: int) -> float:
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    # Of "Pss_Anon:    1234 kB".
    sizes = {name: size for name, size, *_ in map(str.split, rollup)}
    return sum(int(sizes[name]) for name in ("Pss_Anon:", "Pss_Shmem:")) / 1024


def growth(samples: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return how memory and open files grew after the warm-up, None of too short a run.

    The slopes are of least squares, in units an hour.
    """
    if len(samples) < MIN_SAMPLES:
        return None
    begin = samples[-1]["seconds"] * WARM_UP_SHARE
    fitted = [entry for entry in samples if entry["seconds"] >= begin]
    names = sorted({name for entry in fitted for name in entry["processes"]})
    series = {name: [entry["processes"].get(name, 0.0) for entry in fitted] for name in names}
    hours = np.array([entry["seconds"] for entry in fitted]) / 3600

    def slope(values: list[float]) -> float:
        return round(float(np.polyfit(hours, values, 1)[0]), 1)

    total = [entry["mib"] for entry in fitted]
    return {
        "fitted_seconds": round(fitted[-1]["seconds"] - fitted[0]["seconds"], 1),
        "mib": [min(total), max(total)],
        "mib_per_hour": slope(total),
        "files_per_hour": slope([float(entry["num_files"]) for entry in fitted]),
        "processes_mib_per_hour": {
            name: slope(values) for name, values in series.items() if max(values) >= SHOWN_MIB
        },
    }
