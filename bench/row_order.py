"""Compares orders of rows, by the demo model's right answers.

    python -m bench.row_order [--skill SKILL ...] [--clips N] [--retention-ratio R] [--json FILE]

All orders have the same rows: those of average linkage in windows of 4 frames. Only their order
differs. Beside them stands the whole video, as it is and with each frame's tokens shuffled. Clips
are synthetic, from validation seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from bench.demo_answers import CHECKPOINT, FIRST_SEED
from bench.demo_training.forward import PackedModel
from bench.demo_training.model import load
from bench.demo_training.packing import Encoder
from bench.demo_training.validation import accuracy, make_batches
from bench.world.heldout import SEEDS
from bench.world.questions import SKILLS
from scissor_vllm import num_retained_tokens
from scissor_vllm.compression import get_compressor
from scissor_vllm.compression.linkage import WINDOW_FRAMES
from scissor_vllm.loadtest.record import environment, write_json

Order = Callable[[torch.Tensor, int], torch.Tensor]
"""(assignment (N,), tokens of a frame) to a key for each row (K,); rows are sorted by it."""


def first_member(assignment: torch.Tensor, per_frame: int) -> torch.Tensor:
    """Return the number of each row's first token."""
    return _extreme(assignment, "amin")


def last_member(assignment: torch.Tensor, per_frame: int) -> torch.Tensor:
    """Return the number of each row's last token."""
    return _extreme(assignment, "amax")


def random_in_window(assignment: torch.Tensor, per_frame: int) -> torch.Tensor:
    """Return each row's window and a random fraction."""
    window = first_member(assignment, per_frame) // (WINDOW_FRAMES * per_frame)
    generator = torch.Generator().manual_seed(0)
    return window + torch.rand(len(window), generator=generator)


def by_method(assignment: torch.Tensor, per_frame: int) -> torch.Tensor:
    """Return the method's own order: by window, then by the place of the middle member."""
    return torch.arange(int(assignment.max()) + 1)


ORDERS: Mapping[str, Order] = {
    "first member": first_member,
    "last member": last_member,
    "random in window": random_in_window,
    "place in window": by_method,
}


def _extreme(assignment: torch.Tensor, reduce: str) -> torch.Tensor:
    number = torch.arange(len(assignment))
    start = number.new_zeros(int(assignment.max()) + 1)
    return start.scatter_reduce(0, assignment, number, reduce, include_self=False)


def compressors(ratio: float) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Return ways to compress a video, by name."""
    compress = get_compressor("average-linkage")

    def way(order: Order) -> Callable[[torch.Tensor], torch.Tensor]:
        def ordered(tokens: torch.Tensor) -> torch.Tensor:
            kept = num_retained_tokens(tokens.shape[0] * tokens.shape[1], ratio)
            compressed = compress(tokens, kept)
            key = order(compressed.assignment, tokens.shape[1])
            return compressed.tokens[key.argsort(stable=True)]

        return ordered

    ways = {f"{name} {ratio:g}": way(order) for name, order in ORDERS.items()}
    return {"whole, frames shuffled": shuffled} | ways


def shuffled(tokens: torch.Tensor) -> torch.Tensor:
    """Return all tokens of a video, those of each frame in a random order."""
    generator = torch.Generator().manual_seed(0)
    frames = [frame[torch.randperm(len(frame), generator=generator)] for frame in tokens]
    return torch.cat(frames)


def count(skills: list[str], num_clips: int, ratio: float) -> dict[str, dict[str, list[int]]]:
    """Return right answers and questions, by order and skill."""
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    model = PackedModel(load(CHECKPOINT), Encoder(tokenizer).prefix)
    counts: dict[str, dict[str, list[int]]] = {}
    for skill in skills:
        begin = SEEDS["validation"].start + FIRST_SEED
        begin += (SKILLS.index(skill) - begin) % len(SKILLS)
        seeds = range(begin, begin + num_clips * len(SKILLS), len(SKILLS))
        for batch in tqdm(make_batches(tokenizer, seeds, batch_size=8), desc=skill, unit="8 clips"):
            scores = accuracy(model, [batch], torch.device("cpu"), compressors(ratio))
            for name, score in scores.items():
                cell = counts.setdefault(name, {}).setdefault(skill, [0, 0])
                cell[0] += score[skill].num_right
                cell[1] += score[skill].num_asked
    return counts


def table(counts: dict[str, dict[str, list[int]]]) -> str:
    """Return a Markdown table: right answers in %, and the number of questions."""
    skills = list(next(iter(counts.values())))
    lines = ["| | " + " | ".join(skills) + " |", "| --- |" + " ---: |" * len(skills)]
    for name, by_skill in counts.items():
        cells = [f"{100 * right / asked:.1f} of {asked}" for right, asked in by_skill.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Count, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--skill", nargs="+", choices=SKILLS, default=["motion", "order"])
    add("--clips", type=int, default=48, help="of each skill")
    add("--retention-ratio", type=float, default=0.1)
    add("--json", type=Path, help="file for the counts")
    args = parser.parse_args(arguments)
    counts = count(args.skill, args.clips, args.retention_ratio)
    print(table(counts))
    if args.json is not None:
        result: dict[str, Any] = {"environment": environment(), "clips": args.clips}
        write_json(args.json, result | {"counts": counts})


if __name__ == "__main__":
    main()
