"""Compares orders and other variants of average linkage's rows, by the demo model's right answers.

    python -m bench.row_order [--skill SKILL ...] [--clips N] [--variants NAME ...]
        [--retention-ratio R ...] [--cache FOLDER] [--json FILE]
    python -m bench.row_order --table FILE ... [--skill SKILL ...] [--clips N]

Clips are synthetic, from validation seeds. Differences to the method are over the same questions,
with 95 % intervals (paired bootstrap over clips). ``--cache`` keeps the tower's output, so that
further variants cost the language model alone. ``--table`` joins result files: other
variants of the same clips, or other clips.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from bench.accuracy.statistics import Bootstrap
from bench.demo_answers import CHECKPOINT, FIRST_SEED
from bench.demo_training.forward import PackedModel
from bench.demo_training.model import load
from bench.demo_training.packing import Encoder
from bench.demo_training.validation import ValidationBatch, answers, encode, make_batches, make_clip
from bench.row_variants import VARIANTS, WHOLE, Variant, Video
from bench.world.heldout import SEEDS
from bench.world.questions import OPTIONS, SKILLS
from bench.world.scene import DIRECTIONS
from scissor_vllm import num_retained_tokens
from scissor_vllm.loadtest.record import environment, write_json

DEFAULT_SKILLS = ("motion", "order", "count", "cut", "needle")
DEFAULT_VARIANTS = (
    *("method", "order: first token", "order: last token", "order: random in window"),
    "member: nearest mean",
)
BASELINE = "method"
_BATCH_SIZE = 8
_THING = "a thing"
"""Instead of a direction: the name of what moves so is asked for."""

Right = dict[str, dict[str, str]]
"""By "VARIANT RATIO" and skill, a digit for each question: 1 for a right answer."""
Clips = dict[str, list[int]]
"""By skill, the seed of each question's clip."""


def clip_seeds(skill: str, first_clip: int, num_clips: int) -> range:
    """Return the seeds of a skill's validation clips."""
    begin = SEEDS["validation"].start + FIRST_SEED
    begin += (SKILLS.index(skill) - begin) % len(SKILLS) + first_clip * len(SKILLS)
    return range(begin, begin + num_clips * len(SKILLS), len(SKILLS))


def tower_output(
    model: PackedModel, batch: ValidationBatch, seed: int, cache: Path | None
) -> torch.Tensor:
    """Return the tokens of a batch's clips (B, T, P, D), kept in a folder.

    Args:
        model: whose tower computes them.
        batch: of clips.
        seed: of the batch's first clip.
        cache: the folder, or None.
    """
    if cache is None:
        return encode(model, batch.scenes, torch.device("cpu"))
    path = cache / f"{seed}-{batch.questions.tokens.shape[0]}.pt"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        torch.save(encode(model, batch.scenes, torch.device("cpu")), part)
        part.replace(path)
    stored: torch.Tensor = torch.load(path)
    return stored


@torch.no_grad()
def ask(
    skills: Sequence[str],
    first_clip: int,
    num_clips: int,
    ways: dict[str, tuple[Variant, float]],
    cache: Path | None,
) -> Iterator[tuple[Right, Clips]]:
    """Yield which questions are answered rightly, by way and skill, and their clips.

    It yields after every few clips, with the answers so far.

    Args:
        skills: of the clips.
        first_clip: number of each skill's first clip.
        num_clips: of each skill.
        ways: variants and ratios by name.
        cache: folder of the tower's output, or None.
    """
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    model = PackedModel(load(CHECKPOINT), Encoder(tokenizer).prefix).eval()
    right: Right = {name: {} for name in ways}
    clips: Clips = {}
    for skill in skills:
        clips[skill] = []
        for by_skill in right.values():
            by_skill[skill] = ""
        seeds = clip_seeds(skill, first_clip, num_clips)
        batches = make_batches(tokenizer, seeds, batch_size=_BATCH_SIZE)
        for number, batch in enumerate(tqdm(batches, desc=skill, unit="8 clips")):
            part = seeds[number * _BATCH_SIZE : (number + 1) * _BATCH_SIZE]
            videos = [Video(each) for each in tower_output(model, batch, part[0], cache)]
            for name, (variant, ratio) in ways.items():
                rows = [variant(video, _num_rows(video, ratio)) for video in videos]
                places = [row.positions for row in rows if row.positions is not None]
                hidden = model(
                    torch.stack([row.tokens for row in rows]),
                    batch.questions,
                    torch.stack(places) if places else None,
                )
                given = answers(model.logits(hidden), batch.questions)
                digits = "".join(str(int(is_right)) for is_right in given.is_right)
                right[name][skill] += digits
            clips[skill] += [part[clip] for clip in given.clip.tolist()]
            yield right, clips


def _num_rows(video: Video, ratio: float) -> int:
    return num_retained_tokens(len(video.flat), ratio)


def differences(right: Right, clips: Clips, name: str, baseline: str) -> Iterator[str]:
    """Yield the difference of two ways in points with its interval: the mean's, then each skill's.

    Args:
        right: by way and skill.
        clips: by skill.
        name: of a way.
        baseline: of another.
    """
    skills = list(clips)
    for chosen in (skills, *([skill] for skill in skills)):
        videos = [clip for skill in chosen for clip in clips[skill]]
        of = [skill for skill in chosen for _ in clips[skill]]
        way, other = (
            np.array([float(digit) for skill in chosen for digit in right[each][skill]])
            for each in (name, baseline)
        )
        estimate = Bootstrap(videos, of).difference(way, other)
        low, high = 100 * estimate.low, 100 * estimate.high
        yield f"{100 * estimate.value:+.1f} ({low:+.1f} to {high:+.1f})"


def table(right: Right, clips: Clips) -> str:
    """Return Markdown tables: right answers in %, then differences to the method."""
    skills = list(clips)
    asked = [f"{skill} ({len(clips[skill])})" for skill in skills]
    header = ["| | mean | " + " | ".join(asked) + " |", "| --- |" + " ---: |" * (len(skills) + 1)]
    shares, against = list(header), list(header)
    for name, by_skill in right.items():
        share = [100 * by_skill[skill].count("1") / len(by_skill[skill]) for skill in skills]
        cells = [f"{each:.1f}" for each in (statistics.fmean(share), *share)]
        shares.append(f"| {name} | {' | '.join(cells)} |")
        baseline = f"{BASELINE} {name.rsplit(' ', 1)[1]}"
        if baseline in right and name != baseline:
            cells = list(differences(right, clips, name, baseline))
            against.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*shares, "", "less the method:", "", *against])


def by_answer(right: Right, clips: Clips) -> str:
    """Return a Markdown table of motion's right answers in %, by the direction that is right."""
    expected: list[str] = []
    for seed in dict.fromkeys(clips["motion"]):
        _, asked = make_clip(seed, "motion")
        for question in asked[: clips["motion"].count(seed)]:
            number = OPTIONS.index(question.answer) if question.choices else None
            answer = question.answer if number is None else question.choices[number]
            expected.append(answer if answer in DIRECTIONS else _THING)
    numbers = {
        answer: [i for i, each in enumerate(expected) if each == answer]
        for answer in (*DIRECTIONS, _THING)
    }
    counted = [f"{answer} ({len(of)})" for answer, of in numbers.items()]
    lines = ["| | " + " | ".join(counted) + " |", "| --- |" + " ---: |" * len(numbers)]
    for name, by_skill in right.items():
        digits = by_skill["motion"]
        cells = [
            f"{100 * statistics.fmean(int(digits[i]) for i in of):.0f}" if of else "-"
            for of in numbers.values()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def join(runs: Sequence[dict[str, Any]], wanted: Mapping[str, range]) -> tuple[Right, Clips]:
    """Return the answers of several runs together, without ways that lack a question.

    Args:
        runs: with "clips" and "right".
        wanted: seeds of clips, by skill.
    """
    answered: dict[str, dict[tuple[str, int, int], str]] = {}
    for run in runs:
        for skill, seeds in run["clips"].items():
            # A clip's questions are numbered.
            turns: dict[int, int] = {}
            for place, seed in enumerate(seeds):
                turns[seed] = turns.get(seed, -1) + 1
                if seed in wanted.get(skill, ()):
                    for name, by_skill in run["right"].items():
                        key = skill, seed, turns[seed]
                        answered.setdefault(name, {})[key] = by_skill[skill][place]
    keys = sorted(set().union(*answered.values()))
    clips = {skill: [seed for of, seed, _ in keys if of == skill] for skill in wanted}
    right = {
        name: {skill: "".join(given[key] for key in keys if key[0] == skill) for skill in wanted}
        for name, given in answered.items()
        if all(key in given for key in keys)
    }
    return right, clips


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.row_order", description=(__doc__ or "").splitlines()[0]
    )
    add = parser.add_argument
    names = [*WHOLE, *VARIANTS]
    add("--skill", nargs="+", choices=SKILLS, default=list(DEFAULT_SKILLS))
    add("--clips", type=int, default=48, help="of each skill")
    add("--first-clip", type=int, default=0, help="number of each skill's first clip")
    add("--variants", nargs="+", choices=names, default=list(DEFAULT_VARIANTS), metavar="NAME",
        help=f"of {'; '.join(names)}".replace("%", "%%"))  # fmt: skip
    add("--retention-ratio", nargs="+", type=float, default=[0.1])
    add("--cache", type=Path, help="folder that keeps the tower's output, 2 MB a clip")
    add("--json", type=Path, help="file for the answers")
    add(
        "--table",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="print results of these clips and ask nothing",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Ask, print and write."""
    args = parse(arguments)
    if args.table:
        files = [json.loads(path.read_text()) for path in args.table]
        wanted = {skill: clip_seeds(skill, args.first_clip, args.clips) for skill in args.skill}
        right, clips = join([run for file in files for run in file.get("runs", [file])], wanted)
        print(table(right, clips))
        if "motion" in clips:
            print(f"\nmotion by answer:\n\n{by_answer(right, clips)}")
        return
    ways = {f"{name} 1": (WHOLE[name], 1.0) for name in args.variants if name in WHOLE}
    for ratio in args.retention_ratio:
        ways |= {f"{n} {ratio:g}": (VARIANTS[n], ratio) for n in args.variants if n in VARIANTS}
    result: dict[str, Any] = {"environment": environment()}
    for right, clips in ask(args.skill, args.first_clip, args.clips, ways, args.cache):
        result |= {"clips": clips, "right": right}
        if args.json is not None:
            write_json(args.json, result)
    print(table(result["right"], result["clips"]))


if __name__ == "__main__":
    main()
