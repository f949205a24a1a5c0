"""Tables of a summary in Markdown and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence

from bench.accuracy.statistics import NUM_RESAMPLES, SEED, Estimate
from bench.accuracy.summary import OVERALL, Cell, Comparison, Summary

_LARGEST_P = 0.0001


def markdown(summary: Summary, baseline: str) -> str:
    """Return the tables: mean over skills, share of ratio 1.0 kept, differences, each skill."""
    comparisons = summary.compare(baseline)
    parts = [
        f"Accuracy in %, mean over {len(summary.skills)} skills (95 % interval)",
        _accuracies(summary, OVERALL),
    ]
    if any(cell.relative for cell in summary.cells if cell.retention_ratio < 1):
        parts += ["Of its own accuracy at ratio 1.0, in %", _relatives(summary)]
    if comparisons:
        parts += [
            f"{baseline} less the other, in points of the mean over skills, on the same questions "
            "(95 % interval; questions that only it, only the other got right; McNemar's exact p)",
            _differences(summary, comparisons),
            "\n".join(behind(comparisons)),
        ]
    for skill in summary.skills:
        parts += [
            f"{skill}, in % (95 % interval; always the commonest answer: "
            f"{100 * summary.commonest_share(skill):.1f})",
            _accuracies(summary, skill),
        ]
    return "\n\n".join([*parts, "\n".join(notes(summary))])


def behind(comparisons: Sequence[Comparison]) -> list[str]:
    """Return a line for each other label: the ratios at which the first is better, and the rest."""
    lines = []
    for other in dict.fromkeys(comparison.other for comparison in comparisons):
        below = [c for c in comparisons if c.other == other and c.retention_ratio < 1]
        not_ahead = [c for c in below if not c.difference.low > 0]
        if not below:
            continue
        if not_ahead:
            places = ", ".join(
                f"{c.retention_ratio:g} ({_points(c.difference)})" for c in not_ahead
            )
            lines.append(
                f"- {below[0].label} is NOT ahead of {other} by more than the interval at {places}."
            )
        else:
            lines.append(
                f"- {below[0].label} is ahead of {other} by more than the interval at every ratio "
                "below 1.0."
            )
    return lines


def notes(summary: Summary) -> list[str]:
    """Return notes on the meaning of the numbers."""
    lines = [
        "- Mean over skills: each skill weighs the same; bootstrap over videos, "
        f"{NUM_RESAMPLES} draws, seed {SEED}; too narrow where a skill's answers are all alike. "
        "A skill: Wilson's interval, questions independent."
    ]
    for cell in summary.cells:
        if cell.skill == OVERALL and cell.num_failed:
            lines.append(
                f"- {cell.label} at {cell.retention_ratio:g}: {cell.num_failed} of "
                f"{cell.num_questions} questions have no answer and are in no number here."
            )
    for key in ("commit", "gpu", "cpu", "versions"):
        values = {str(run.environment.get(key)): run.label for run in summary.runs}
        if len(values) > 1:
            lines.append(f"- The labels were measured with different {key}: {', '.join(values)}.")
    models = {str(run.server.get("model_path") or run.server.get("model")) for run in summary.runs}
    if len(models) > 1:
        lines.append(f"- The labels are of different models: {', '.join(sorted(models))}.")
    if len(summary.video_bytes) > 1:
        lines.append("- The files' videos differ in size: they were not encoded alike.")
    return lines


def csv_table(summary: Summary) -> str:
    """Return every cell as a line; shares are fractions, empty if missing."""
    rows = [_values(cell) for cell in summary.cells]
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _values(cell: Cell) -> dict[str, object]:
    none = Estimate(math.nan, math.nan, math.nan)
    values = {
        "label": cell.label,
        "retention_ratio": cell.retention_ratio,
        "skill": cell.skill,
        "num_questions": cell.num_questions,
        "num_answered": cell.num_answered,
        "num_failed": cell.num_failed,
        "num_correct": cell.num_correct,
        "retained_tokens": round(cell.retained_tokens, 2),
    }
    for name, estimate in (("accuracy", cell.accuracy), ("relative", cell.relative or none)):
        values[name] = round(estimate.value, 6)
        values[f"{name}_low"] = round(estimate.low, 6)
        values[f"{name}_high"] = round(estimate.high, 6)
    return {key: "" if value != value else value for key, value in values.items()}


def _accuracies(summary: Summary, skill: str) -> str:
    def text(label: str, ratio: float) -> str:
        cell = summary.cell(label, ratio, skill)
        return "" if cell is None else _percent(cell.accuracy)

    return _grid("", summary.labels, summary.ratios, text)


def _relatives(summary: Summary) -> str:
    def text(label: str, ratio: float) -> str:
        cell = summary.cell(label, ratio)
        return "" if cell is None or cell.relative is None else _percent(cell.relative)

    return _grid("", summary.labels, [ratio for ratio in summary.ratios if ratio < 1], text)


def _differences(summary: Summary, comparisons: Sequence[Comparison]) -> str:
    found = {(c.other, c.retention_ratio): c for c in comparisons}

    def text(other: str, ratio: float) -> str:
        c = found.get((other, ratio))
        if c is None:
            return ""
        p = f"< {_LARGEST_P}" if c.p_value < _LARGEST_P else f"{c.p_value:.2g}"
        return f"{_points(c.difference)}; {c.num_only_label}, {c.num_only_other}; p {p}"

    others = list(dict.fromkeys(c.other for c in comparisons))
    return _grid("less", others, summary.ratios, text)


def _grid(
    corner: str, labels: Sequence[str], ratios: Sequence[float], text: Callable[[str, float], str]
) -> str:
    lines = [[corner, *(f"{ratio:g}" for ratio in ratios)]]
    lines += [[label, *(text(label, ratio) for ratio in ratios)] for label in labels]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    lines.insert(1, ["-" * max(3, width) for width in widths])
    return "\n".join(
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def _percent(estimate: Estimate) -> str:
    if math.isnan(estimate.value):
        return ""
    value, low, high = (100 * x for x in (estimate.value, estimate.low, estimate.high))
    return f"{value:.1f} ({low:.1f} to {high:.1f})"


def _points(estimate: Estimate) -> str:
    value, low, high = (100 * x for x in (estimate.value, estimate.low, estimate.high))
    return f"{value:+.1f}, {low:+.1f} to {high:+.1f}"
