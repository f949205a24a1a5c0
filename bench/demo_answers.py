"""Counts the demo model's right answers by method, in one process and without a server.

    python -m bench.demo_answers [--clips N] [--methods METHOD ...] [--retention-ratio R ...]

Clips are synthetic, from seeds that training never saw. An answer is right if greedy decoding gives
exactly the expected one. Tokens, compression and order of rows are those of a server.
``bench.accuracy`` asks the same questions through a server, which takes longer.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from bench.demo_training.forward import PackedModel
from bench.demo_training.model import load
from bench.demo_training.packing import Encoder
from bench.demo_training.validation import accuracy, compressors, make_batches
from bench.world.heldout import SEEDS
from scissor_vllm.compression import METHODS
from scissor_vllm.loadtest.record import environment, write_json

CHECKPOINT = Path(__file__).parents[1] / "scissor_vllm" / "demo" / "checkpoint"
DEFAULT_METHODS = (
    *("average-linkage", "scc-windows", "floc+merge", "k-center+merge", "kitoke"),
    "uniform+merge",
)
FIRST_SEED = 10**6
"""Index of the first clip in the split; ``bench.world.heldout`` uses the clips before it."""

Counts = dict[str, dict[str, list[int]]]
"""Right answers and questions, by "METHOD RATIO" and skill."""


def count(split: str, num_clips: int, methods: list[str], ratios: list[float]) -> Counts:
    """Return the counts of each method and ratio, and those without compression as "whole"."""
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    model = PackedModel(load(CHECKPOINT), Encoder(tokenizer).prefix)
    begin = SEEDS[split].start + FIRST_SEED
    batches = make_batches(tokenizer, range(begin, begin + num_clips), batch_size=8)
    counts: Counts = {}
    for batch in tqdm(batches, desc=split, unit="8 clips"):
        ways = compressors(methods, ratios)
        for name, scores in accuracy(model, [batch], torch.device("cpu"), ways).items():
            for skill, score in scores.items():
                cell = counts.setdefault(name, {}).setdefault(skill, [0, 0])
                cell[0] += score.num_right
                cell[1] += score.num_asked
    return counts


def table(counts: Counts) -> str:
    """Return a Markdown table: the mean over skills, and right answers of questions by skill."""
    skills = [skill for skill, (_, asked) in next(iter(counts.values())).items() if asked]
    lines = ["| | mean % | " + " | ".join(skills) + " |", "| --- |" + " ---: |" * (len(skills) + 1)]
    for name, by_skill in counts.items():
        mean = 100 * statistics.fmean(by_skill[skill][0] / by_skill[skill][1] for skill in skills)
        cells = [f"{by_skill[skill][0]}/{by_skill[skill][1]}" for skill in skills]
        lines.append(f"| `{name}` | {mean:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Count, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--split", choices=("heldout", "validation"), default="heldout")
    add("--clips", type=int, default=80)
    add("--methods", nargs="+", choices=METHODS, default=list(DEFAULT_METHODS), metavar="METHOD")
    add("--retention-ratio", nargs="+", type=float, default=[0.1, 0.05])
    add("--json", type=Path, help="file for the counts")
    args = parser.parse_args(arguments)
    counts = count(args.split, args.clips, args.methods, args.retention_ratio)
    print(table(counts))
    if args.json is not None:
        result: dict[str, Any] = {"environment": environment(), "split": args.split}
        write_json(args.json, result | {"clips": args.clips, "counts": counts})


if __name__ == "__main__":
    main()
