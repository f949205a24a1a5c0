"""Draws summarized cells: throughput, latency, and the trade-off with accuracy.

An accuracy file is a JSON list of objects: ``method`` (a label of the results), ``retention_ratio``
(a number, or null for requests without one), ``accuracy``, and if known the bounds of its
confidence interval, ``low`` and ``high``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scissor_vllm.loadtest.results import ResultError
from scissor_vllm.loadtest.workload import STOCK

Row = dict[str, Any]
MARKERS = "osD^vP*X"
_STYLES = ("-", "--", ":", "-.")


def save_plots(
    rows: Sequence[Row], folder: Path, accuracy: Sequence[dict[str, Any]] | None = None
) -> list[Path]:
    """Write the plots that the rows allow as PNG files, and return their paths.

    ``throughput.png``: requests/s against the ratio, a line per label and concurrency.
    ``latency.png``: TTFT against requests/s, a line per label and ratio.
    ``accuracy.png``, with an accuracy file: accuracy against requests/s, a line per label.

    Raises:
        ResultError: matplotlib is missing, or no row fits the accuracy file.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ResultError("plots need matplotlib: pip install 'scissor-vllm[bench]'") from error
    matplotlib.use("Agg")
    figures = {"throughput": throughput_figure(rows), "latency": latency_figure(rows)}
    if accuracy is not None:
        figures["accuracy"] = accuracy_figure(rows, accuracy)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"{name}.png")
        save_figure(figure, paths[-1])
    return paths


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    unfinished = path.with_name(path.name + ".part")
    figure.savefig(unfinished, dpi=150, format="png")
    unfinished.replace(path)


def throughput_figure(rows: Sequence[Row]) -> Any:
    """Return requests/s against the ratio; cells without a ratio are horizontal lines."""
    figure, axes = _figure("retention ratio (fraction of video tokens kept)", "requests/s")
    labels = _distinct(rows, "label")
    loads = list(dict.fromkeys(map(_load, rows)))
    for label in labels:
        for load in loads:
            color = f"C{loads.index(load) % 10}"
            style = _STYLES[labels.index(label) % len(_STYLES)]
            cells = [row for row in rows if row["label"] == label and _load(row) == load]
            points = sorted(
                (float(row["retention_ratio"]), row["requests_per_second"])
                for row in cells
                if _is_number(row["retention_ratio"])
            )
            if points:
                marker = MARKERS[labels.index(label) % len(MARKERS)]
                name = f"{label}, {load}"
                axes.plot(*zip(*points, strict=True), style, marker=marker, color=color, label=name)
            for row in cells:
                if row["retention_ratio"] == STOCK:
                    axes.axhline(
                        row["requests_per_second"],
                        linestyle=":",
                        color=color,
                        label=f"{label}, no ratio, {load}",
                    )
    return _finish(figure, axes)


def latency_figure(rows: Sequence[Row]) -> Any:
    """Return the median TTFT against requests/s; a line's points are its concurrencies."""
    figure, axes = _figure("requests/s", "time to first token, p50, s")
    labels, ratios = _distinct(rows, "label"), _distinct(rows, "retention_ratio")
    for label in labels:
        for ratio in ratios:
            cells = [
                row
                for row in rows
                if row["label"] == label
                and row["retention_ratio"] == ratio
                and row["ttft_p50_seconds"] is not None
            ]
            cells.sort(key=lambda row: (row["max_concurrency"] or 0, row["requests_per_second"]))
            if cells:
                axes.plot(
                    [row["requests_per_second"] for row in cells],
                    [row["ttft_p50_seconds"] for row in cells],
                    _STYLES[labels.index(label) % len(_STYLES)],
                    marker=MARKERS[labels.index(label) % len(MARKERS)],
                    color=f"C{ratios.index(ratio) % 10}",
                    label=f"{label}, {'no ratio' if ratio == STOCK else f'ratio {ratio}'}",
                )
                for row in cells:
                    _annotate(axes, row["requests_per_second"], row["ttft_p50_seconds"], _at(row))
    return _finish(figure, axes)


def accuracy_figure(rows: Sequence[Row], accuracy: Sequence[dict[str, Any]]) -> Any:
    """Return accuracy against requests/s at the highest load that all labels share.

    Raises:
        ResultError: no label and ratio of the accuracy file was measured.
    """
    measured = {(row["label"], row["retention_ratio"]) for row in rows}
    known = [a for a in accuracy if (a["method"], _ratio(a)) in measured]
    if not known:
        raise ResultError(
            "no method and retention_ratio of the accuracy file is a label and ratio of the "
            f"results, which have {sorted(measured)}: name them alike"
        )
    methods = list(dict.fromkeys(a["method"] for a in known))
    load = max(
        (_load(row) for row in rows),
        key=lambda load: (
            len({row["label"] for row in rows if _load(row) == load} & set(methods)),
            max(row["requests_per_second"] for row in rows if _load(row) == load),
        ),
    )
    rates = {
        (row["label"], row["retention_ratio"]): row["requests_per_second"]
        for row in rows
        if _load(row) == load
    }
    figure, axes = _figure(f"requests/s at {load}", "accuracy")
    for number, method in enumerate(methods):
        points = [
            (rates[method, _ratio(a)], a)
            for a in known
            if a["method"] == method and (method, _ratio(a)) in rates
        ]
        # A line from the highest ratio down; "stock" comes first.
        points.sort(key=lambda point: _ratio(point[1]), reverse=True)
        if not points:
            continue
        below = [a["accuracy"] - a.get("low", a["accuracy"]) for _, a in points]
        above = [a.get("high", a["accuracy"]) - a["accuracy"] for _, a in points]
        axes.errorbar(
            [rate for rate, _ in points],
            [a["accuracy"] for _, a in points],
            yerr=[below, above],
            marker=MARKERS[number % len(MARKERS)],
            capsize=3,
            label=method,
        )
        for rate, a in points:
            _annotate(axes, rate, a["accuracy"], _ratio(a))
    return _finish(figure, axes, from_zero=False)


def read_accuracy(path: Path) -> list[dict[str, Any]]:
    """Return the entries of an accuracy file.

    Raises:
        ResultError: it has another form.
    """
    try:
        entries = json.loads(path.read_text())
        for entry in entries:
            float(entry["accuracy"])
            _ratio(entry)
            str(entry["method"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResultError(
            f"{path} must be a JSON list of objects with method, retention_ratio and accuracy, "
            f"low and high if known; reading it gave {type(error).__name__}: {error}"
        ) from error
    return list(entries)


def _ratio(entry: dict[str, Any]) -> str:
    ratio = entry["retention_ratio"]
    return STOCK if ratio in (None, STOCK) else str(float(ratio))


def _figure(x: str, y: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    return figure, axes


def _finish(figure: Any, axes: Any, *, from_zero: bool = True) -> Any:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    if from_zero:
        axes.set_ylim(bottom=0)
    return figure


def _annotate(axes: Any, x: float, y: float, text: str) -> None:
    axes.annotate(text, (x, y), textcoords="offset points", xytext=(4, 4), fontsize="x-small")


def _load(row: Row) -> str:
    parts = []
    if row["max_concurrency"] is not None:
        parts.append(f"concurrency {row['max_concurrency']}")
    if row["request_rate_per_second"] is not None:
        parts.append(f"{row['request_rate_per_second']:g} requests/s sent")
    return ", ".join(parts) or "no bound"


def _at(row: Row) -> str:
    rate = row["request_rate_per_second"]
    return f"{row['max_concurrency'] or ''}" if rate is None else f"{rate:g}/s"


def _is_number(text: str) -> bool:
    return text != STOCK and "," not in text


def _distinct(rows: Sequence[Row], key: str) -> list[str]:
    return list(dict.fromkeys(row[key] for row in rows))
