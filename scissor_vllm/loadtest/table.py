"""Tables of result files: plain text, CSV and Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from typing import Any

from scissor_vllm.loadtest.summary import STAGES

Row = dict[str, Any]
MEBIBYTE = 2**20
_CACHES_OFF = {
    "prefix": "--no-enable-prefix-caching",
    "mm": "--mm-processor-cache-gb 0",
    "frames": "--mm-processor-cache-gb 0",
    "features": "--mm-processor-cache-gb 0",
}
"""The server's flag by cache."""


def _number(key: str, digits: int, factor: float = 1.0) -> Callable[[Row], str]:
    def text(row: Row) -> str:
        value = row.get(key)
        return "" if value is None else f"{value * factor:.{digits}f}"

    return text


def _plain(key: str) -> Callable[[Row], str]:
    return lambda row: "" if row.get(key) is None else f"{row[key]:g}"


def _text(key: str) -> Callable[[Row], str]:
    return lambda row: str(row[key])


def _percentiles(name: str, digits: int) -> Callable[[Row], str]:
    def text(row: Row) -> str:
        values = [row[f"{name}_p{p}_seconds"] for p in (50, 90, 99)]
        if None in values:
            return ""
        return " / ".join(f"{value * 1000:.{digits}f}" for value in values)

    return text


CELL = {
    "label": _text("label"),
    "ratio": _text("retention_ratio"),
    "concurrency": _plain("max_concurrency"),
    "rate/s": _plain("request_rate_per_second"),
}
COLUMNS: dict[str, Callable[[Row], str]] = {
    **CELL,
    "ok": _plain("completed"),
    "failed": _plain("failed"),
    "requests/s": _number("requests_per_second", 2),
    "x stock": _number("requests_per_second_over_stock", 2),
    "goodput/s": _number("goodput_requests_per_second", 2),
    "video s/s": _number("video_seconds_per_second", 1),
    "TTFT ms p50/90/99": _percentiles("ttft", 0),
    "TPOT ms p50/90/99": _percentiles("tpot", 1),
    "E2E ms p50/90/99": _percentiles("e2e", 0),
    "prompt tokens": _number("prompt_tokens", 0),
    "video tokens kept": _number("retained_video_tokens", 0),
    "KV MiB/request": _number("kv_cache_bytes_per_request", 1, 1 / MEBIBYTE),
    "KV in use %": _number("kv_cache_usage_mean", 1, 100),
}
STAGE_COLUMNS: dict[str, Callable[[Row], str]] = {
    **CELL,
    **{stage.replace("_", " "): _number(f"stage_{stage}_seconds", 1, 1000) for stage in STAGES},
}
MARKDOWN_COLUMNS: dict[str, Callable[[Row], str]] = {
    **CELL,
    "requests/s": COLUMNS["requests/s"],
    "x stock": COLUMNS["x stock"],
    "TTFT p50 / p90 / p99, ms": COLUMNS["TTFT ms p50/90/99"],
    "TPOT p50, ms": _number("tpot_p50_seconds", 1, 1000),
    "E2E p50, ms": _number("e2e_p50_seconds", 0, 1000),
    "goodput/s": COLUMNS["goodput/s"],
    "video tokens": COLUMNS["video tokens kept"],
    "KV cache, MiB a request": COLUMNS["KV MiB/request"],
    "failed": lambda row: str(row["failed"] or ""),
}


def text_table(rows: Sequence[Row]) -> str:
    """Return the measured values and the server's stages, if any, as aligned columns."""
    parts = [_align(*_fill(COLUMNS, rows))]
    if any(row[f"stage_{stage}_seconds"] is not None for row in rows for stage in STAGES):
        parts.append("Server's time in each stage, ms a request (prefill holds tower and compress)")
        parts.append(_align(*_fill(STAGE_COLUMNS, rows)))
    parts += notes(rows)
    return "\n\n".join(parts)


def markdown_table(rows: Sequence[Row]) -> str:
    """Return a table for a README; columns that are empty throughout are left out."""
    names, lines = _fill(MARKDOWN_COLUMNS, rows)
    header = [names, ["---"] * len(names)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [*header, *lines])


def csv_table(rows: Sequence[Row]) -> str:
    """Return every value of every cell, units in the names."""
    if not rows:
        return ""
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def notes(rows: Sequence[Row]) -> list[str]:
    """Return warnings about the numbers: cache hits, preemptions, clips sent twice."""
    lines = []
    for cache, remedy in _CACHES_OFF.items():
        rate = max((row[f"{cache}_cache_hit_rate"] or 0.0 for row in rows), default=0.0)
        # All prompts share the chat template's first tokens.
        if rate > 0.05:
            lines.append(
                f"Up to {rate:.0%} of a cell's lookups in the server's {cache} cache were hits: to "
                f"measure without, start it with {remedy}."
            )
    preempted = [row for row in rows if row["preemptions"]]
    if preempted:
        most = max(preempted, key=lambda row: row["preemptions"] / max(1, row["completed"]))
        lines.append(
            f"Requests were preempted in {len(preempted)} cells, {most['preemptions']:.0f} times "
            f"in one of {most['completed']} requests: the KV cache was full, and they were "
            "prefilled again. To measure without, start the server with a larger one."
        )
    repeats = [row for row in rows if row["distinct_videos"] < row["completed"] + row["failed"]]
    if repeats:
        fewest = min(row["distinct_videos"] for row in repeats)
        lines.append(
            f"Videos were sent more than once in {len(repeats)} cells ({fewest} distinct)."
        )
    return lines


def _fill(
    columns: dict[str, Callable[[Row], str]], rows: Sequence[Row]
) -> tuple[list[str], list[list[str]]]:
    """Return names and lines of the non-empty columns."""
    cells = {name: [text(row) for row in rows] for name, text in columns.items()}
    used = [name for name, column in cells.items() if any(column)]
    return used, [[cells[name][i] for name in used] for i in range(len(rows))]


def _align(names: list[str], lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(names, *lines, strict=True)]
    return "\n".join(
        "  ".join(
            text.ljust(width) if i < 2 else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in [names, *lines]
    )
