"""Draws accuracy against the ratio: the mean over skills, and a panel a skill."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from bench.accuracy.questions import HarnessError
from bench.accuracy.summary import OVERALL, Summary
from scissor_vllm.loadtest.plot import MARKERS, save_figure

_COLUMNS = 3


def save_plots(summary: Summary, folder: Path) -> list[Path]:
    """Write ``accuracy-overall.png`` and ``accuracy-by-skill.png`` and return their paths.

    Raises:
        HarnessError: matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise HarnessError("plots need matplotlib: pip install 'scissor-vllm[bench]'") from error
    matplotlib.use("Agg")
    figures = {
        "accuracy-overall": panels(summary, [OVERALL]),
        "accuracy-by-skill": panels(summary, [OVERALL, *summary.skills]),
    }
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"{name}.png")
        save_figure(figure, paths[-1])
    return paths


def panels(summary: Summary, skills: list[str]) -> Any:
    """Return a figure with a panel a skill: a line a label, its interval of 95 % a band."""
    from matplotlib.figure import Figure

    columns = min(_COLUMNS, len(skills))
    rows = math.ceil(len(skills) / columns)
    size = (8, 5) if len(skills) == 1 else (4.5 * columns, 3.2 * rows)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    for panel, skill in zip(axes, skills, strict=False):
        _draw(panel, summary, skill)
    for panel in axes[len(skills) :]:
        panel.set_visible(False)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, fontsize="small", loc="outside right upper")
    return figure


def _draw(axes: Any, summary: Summary, skill: str) -> None:
    for number, label in enumerate(summary.labels):
        cells = [cell for r in summary.ratios if (cell := summary.cell(label, r, skill))]
        ratios = [cell.retention_ratio for cell in cells]
        color = f"C{number % 10}"
        axes.plot(
            ratios,
            [cell.accuracy.value for cell in cells],
            marker=MARKERS[number % len(MARKERS)],
            markersize=4,
            linestyle="-" if number < 10 else "--",
            color=color,
            label=label,
        )
        axes.fill_between(
            ratios,
            [cell.accuracy.low for cell in cells],
            [cell.accuracy.high for cell in cells],
            color=color,
            alpha=0.12,
            linewidth=0,
        )
    axes.axhline(
        summary.commonest_share(skill), color="0.5", linestyle=":", label="commonest answer"
    )
    axes.set_xscale("log")
    axes.set_xticks(summary.ratios, [f"{ratio:g}" for ratio in summary.ratios])
    axes.minorticks_off()
    axes.tick_params(axis="x", labelsize="x-small")
    axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.3)
    axes.set_title("mean over skills" if skill == OVERALL else skill, fontsize="medium")
    axes.set_xlabel("retention ratio (fraction of video tokens kept)", fontsize="small")
    axes.set_ylabel("accuracy", fontsize="small")
