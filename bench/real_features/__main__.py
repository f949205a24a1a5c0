"""Compresses real features of real videos by every method, and prints a table of figures.

    python -m bench.real_features [--split test] [--json FILE] [--picture FILE]
    python -m bench.real_features --split validation --dial 0 0.1 0.15 0.25 0.5 1

The first call downloads DINOv2 ViT-S/14 and the videos into ``--folder``, 160 MB, and computes the
features in minutes. ``--dial`` adds average linkage with these exponents between average (0) and
Ward (1). Figures are explained in ``figures.py``. They say how well rows stand for tokens. They do
not say what a language model answers: no language model is asked.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields
from pathlib import Path

import torch

from bench.real_features.features import LAYERS, SEQUENCES, Sequence, load_features
from bench.real_features.figures import Figures
from bench.real_features.tasks import Row, Task, compressor, dial_name, measure_task, rows_name
from bench.row_variants import VARIANTS
from scissor_vllm import num_retained_tokens
from scissor_vllm.compression import METHODS, Compressor
from scissor_vllm.loadtest.record import environment, write_json

DEFAULT_METHODS = (
    *("average-linkage", "scc-windows", "scc", "uniform", "uniform+merge"),
    *("kitoke", "floc", "floc+merge", "k-center", "k-center+merge"),
)
DEFAULT_RATIOS = (0.25, 0.1, 0.05, 0.02)
BASELINE = "scc-windows"
"""The method that others are counted ahead of."""

LOWER_IS_BETTER = ("fvu", "change_by_noise", "change_by_shift")
COUNTED = ("coverage", "fvu", "coverage_in_window")


def measure_all(tasks: list[Task], num_jobs: int) -> list[Row]:
    """Return the figures of every method, ratio, sequence and layer, with these as keys."""
    rows = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_jobs, context) as pool:
        for task, part in zip(tasks, pool.map(measure_task, tasks), strict=True):
            rows += part
            print(f"{task.sequence}, layer {task.layer}", file=sys.stderr, flush=True)
    return rows


def _of_another_video(sequence: Sequence, sequences: list[Sequence]) -> Sequence:
    """Return the next sequence of another video, round about."""
    at = sequences.index(sequence)
    later = sequences[at + 1 :] + sequences[:at]
    return next(other for other in later if other.video != sequence.video)


def table(rows: list[Row], ratio: float) -> str:
    """Return a Markdown table of means over sequences and layers at a ratio."""
    names = [field.name for field in fields(Figures)]
    lines = [
        f"| K/N = {ratio:g} | " + " | ".join(name.replace("_", " ") for name in names)
        + f" | ahead of {BASELINE} |",
        "| --- |" + " ---: |" * (len(names) + 1),
    ]  # fmt: skip
    at_ratio = [row for row in rows if row["ratio"] == ratio]
    for method in dict.fromkeys(row["method"] for row in at_ratio):
        cells = [row for row in at_ratio if row["method"] == method]
        means = [f"{statistics.fmean(cell[name] for cell in cells):.3f}" for name in names]
        lines.append(f"| `{method}` | {' | '.join(means)} | {_ahead(cells, at_ratio)} |")
    return "\n".join(lines)


def _ahead(cells: list[Row], rows: list[Row]) -> str:
    """Return in how many cells a method is ahead of the baseline in all of COUNTED."""
    baseline = {(row["sequence"], row["layer"]): row for row in rows if row["method"] == BASELINE}
    if not baseline or cells[0]["method"] == BASELINE:
        return "-"
    ahead = 0
    for cell in cells:
        baseline_cell = baseline[cell["sequence"], cell["layer"]]
        sign = {name: -1 if name in LOWER_IS_BETTER else 1 for name in COUNTED}
        ahead += all(sign[name] * cell[name] > sign[name] * baseline_cell[name] for name in COUNTED)
    return f"{ahead} of {len(cells)}"


def draw(
    path: Path, methods: Mapping[str, Compressor], frames: torch.Tensor, title: str, ratio: float
) -> None:
    """Draw what tokens become: every fourth frame, colours by the tokens' principal components.

    Args:
        path: of the picture.
        methods: by name, a line of frames each.
        frames: (T + 1, P, D) float32, P a square; the last frame is left out.
        title: of the picture.
        ratio: K/N.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tokens = frames[:-1]
    flat = tokens.flatten(0, 1)
    kept = num_retained_tokens(len(flat), ratio)
    centre = flat.mean(dim=0)
    axes = torch.linalg.svd(flat - centre, full_matrices=False).Vh[:3].T
    low, high = ((flat - centre) @ axes).quantile(torch.tensor([0.02, 0.98]), dim=0)
    side, shown = round(tokens.shape[1] ** 0.5), range(0, len(tokens), 4)
    lines = {"tokens": flat}
    for name, compress in methods.items():
        compressed = compress(tokens, kept)
        nearest = torch.nn.functional.normalize(flat, dim=1) @ torch.nn.functional.normalize(
            compressed.tokens, dim=1
        ).T  # fmt: skip
        row = compressed.assignment
        lines[name] = compressed.tokens[torch.where(row >= 0, row, nearest.argmax(dim=1))]
    figure, plots = pyplot.subplots(
        len(lines), len(shown), figsize=(1.6 * len(shown), 1.6 * len(lines)), squeeze=False
    )
    for line, (name, replaced) in zip(plots, lines.items(), strict=True):
        colours = (((replaced - centre) @ axes - low) / (high - low)).clamp(0, 1)
        pictures = colours.view(len(tokens), side, side, 3).numpy()
        for plot, number in zip(line, shown, strict=True):
            plot.imshow(pictures[number], interpolation="nearest")
            plot.set_xticks([])
            plot.set_yticks([])
        line[0].set_ylabel(name, fontsize=7)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.real_features", description=(__doc__ or "").splitlines()[0]
    )
    add = parser.add_argument
    add("--folder", type=Path, default=Path("build/real-features"), help="of downloads")
    add("--split", choices=["test", "validation"], default="test")
    add("--methods", nargs="+", choices=METHODS, default=list(DEFAULT_METHODS), metavar="METHOD")
    add("--dial", nargs="*", type=float, default=[], help="exponents between average and Ward")
    add("--rows", nargs="*", choices=VARIANTS, default=[], metavar="VARIANT",
        help="other rows of average linkage, as in bench.row_order")  # fmt: skip
    add("--retention-ratio", nargs="+", type=float, default=list(DEFAULT_RATIOS))
    add("--layers", nargs="+", type=int, choices=LAYERS, default=list(LAYERS))
    add("--jobs", type=int, default=os.cpu_count(), help="processes")
    add("--json", type=Path, help="file for all figures")
    add("--picture", type=Path, help="file for a picture of one sequence at the second ratio")
    add("--drawn", help="name of the sequence that is drawn")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write."""
    args = parse(arguments)
    methods = (*args.methods, *map(dial_name, args.dial), *map(rows_name, args.rows))
    features = load_features(args.folder)
    sequences = [sequence for sequence in SEQUENCES if sequence.split == args.split]
    tasks = []
    for sequence in sequences:
        needle_source = _of_another_video(sequence, sequences)
        for layer in args.layers:
            pair = features[sequence.name][layer], features[needle_source.name][layer]
            ratios = tuple(args.retention_ratio)
            tasks.append(Task(sequence.name, layer, *pair, ratios, methods))
    rows = measure_all(tasks, args.jobs)
    for ratio in args.retention_ratio:
        print(table(rows, ratio), end="\n\n")
    if args.json is not None:
        write_json(args.json, {"environment": environment(), "split": args.split, "rows": rows})
    if args.picture is not None:
        drawn = args.drawn or sequences[0].name
        ratio = args.retention_ratio[min(1, len(args.retention_ratio) - 1)]
        title = f"{drawn}, {ratio:g} of the tokens: what each token is replaced by"
        draw(
            args.picture,
            {name: compressor(name) for name in methods},
            features[drawn][args.layers[-1]],
            title,
            ratio,
        )


if __name__ == "__main__":
    main()
