"""Measures each cell in turn and saves the result file after each."""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scissor_vllm.loadtest.client import ChatSettings, measure
from scissor_vllm.loadtest.clips import Clip
from scissor_vllm.loadtest.results import ResultFile, find_cell
from scissor_vllm.loadtest.server import Metrics, UsageSampler, check_health, difference
from scissor_vllm.loadtest.summary import summarize
from scissor_vllm.loadtest.workload import Cell, build_requests


@dataclass(frozen=True)
class Load:
    """Number of requests in a cell."""

    num_prompts: int | None
    """Measured requests; None: 4 times the concurrency, at least 16."""
    num_warmups: int | None
    """Warm-up requests; None: the concurrency, at most 32."""

    def prompts(self, cell: Cell) -> int:
        """Return the number of measured requests of a cell."""
        if self.num_prompts is not None:
            return self.num_prompts
        return max(16, 4 * (cell.max_concurrency or 16))

    def warmups(self, cell: Cell) -> int:
        """Return the number of warm-up requests of a cell."""
        if self.num_warmups is not None:
            return self.num_warmups
        return min(32, cell.max_concurrency or 16)

    def num_clips(self, cells: Sequence[Cell]) -> int:
        """Return the number of clips with which no request of a cell repeats a clip."""
        return max(self.prompts(cell) + self.warmups(cell) for cell in cells)


def sweep(
    file: ResultFile,
    run: dict[str, Any],
    cells: Sequence[Cell],
    clips: Sequence[Clip],
    settings: ChatSettings,
    load: Load,
    *,
    metrics_url: str,
    metrics_interval_seconds: float,
    keep_itl: bool,
) -> None:
    """Measure the missing cells of a run, and save after each.

    A cell is measured again if none of its requests was answered.

    Raises:
        ServerError: the server stopped answering; earlier cells are saved.
    """
    metrics = Metrics(metrics_url)
    for number, cell in enumerate(cells, 1):
        name = f"[{number}/{len(cells)}] {run['label']}, {cell.name}"
        previous = find_cell(run, cell)
        if previous is not None and summarize(run, previous)["completed"]:
            print(f"{name}: measured before, left as it is", flush=True)
            continue
        measured = _measure_cell(
            name, cell, clips, settings, load, metrics, metrics_interval_seconds, keep_itl
        )
        row = summarize(run, measured)
        if not row["completed"]:
            check_health(settings.base_url)
        if previous is not None:
            run["cells"].remove(previous)
        run["cells"].append(measured)
        file.save()
        print(
            f"{name}: {row['requests_per_second']:.2f} requests/s"
            + (f", {row['failed']} failed: {row['errors']}" if row["failed"] else ""),
            flush=True,
        )


def _measure_cell(
    name: str,
    cell: Cell,
    clips: Sequence[Clip],
    settings: ChatSettings,
    load: Load,
    metrics: Metrics,
    interval_seconds: float,
    keep_itl: bool,
) -> dict[str, Any]:
    from tqdm import tqdm

    warmups, requests = build_requests(
        clips,
        cell,
        num_prompts=load.prompts(cell),
        num_warmups=load.warmups(cell),
        seed=settings.seed,
    )
    before = metrics.read()
    if warmups:
        with tqdm(total=len(warmups), desc=f"{name}: warm-up", unit="request") as progress:
            warmed = asyncio.run(measure(warmups, cell, settings, progress=progress))
        before = metrics.read_after(before, warmed.num_completed)
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    sampler = UsageSampler(metrics.url, interval_seconds if before else 0)
    with tqdm(total=len(requests), desc=name, unit="request") as progress, sampler:
        measured = asyncio.run(
            measure(requests, cell, settings, progress=progress, keep_itl=keep_itl)
        )
    after = metrics.read_after(before, measured.num_completed)
    return {
        **cell.as_dict(),
        "started_at": started,
        "num_warmups": len(warmups),
        "duration_seconds": measured.duration_seconds,
        "requests": measured.requests,
        "server_metrics": difference(before, after),
        "kv_cache": {
            "num_tokens": before.num_kv_cache_tokens if before else None,
            "samples": sampler.samples,
        },
    }
