"""How well a model answers about scenes of the validation seeds, whole and compressed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from bench.demo_training.forward import PackedModel
from bench.demo_training.packing import IGNORED, NO_QUESTION, Encoder, PackedQuestions, pack
from bench.demo_training.pixels import as_values, normalised
from bench.world.questions import SKILLS, Question, ask
from bench.world.render import PackedScenes, render
from bench.world.render import pack as pack_scenes
from bench.world.scene import MIN_NUM_FRAMES, Scene, sample_scene

Tensor = torch.Tensor
Compress = Callable[[Tensor, int], Tensor]
"""(tokens (T, P, D), K) to (K, D)."""

_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class ValidationBatch:
    """Clips of one length and their questions."""

    scenes: PackedScenes
    questions: PackedQuestions


@dataclass(frozen=True)
class Score:
    """Right answers among those asked for."""

    num_right: int
    num_asked: int

    @property
    def accuracy(self) -> float:
        """The share, NaN if nothing was asked."""
        return self.num_right / self.num_asked if self.num_asked else float("nan")


def make_batches(
    tokenizer: Any,
    seeds: range,
    batch_size: int = 32,
    questions_per_clip: int = 4,
    num_frames: int = 16,
    row_length: int = 192,
) -> list[ValidationBatch]:
    """Return clips that take turns among the skills, each asked about its skill alone.

    Skills that need longer clips are left out. Seeds in steps of the number of skills have one
    skill.
    """
    encoder = Encoder(tokenizer)
    skills = [skill for skill in SKILLS if MIN_NUM_FRAMES[skill] <= num_frames]
    batches = []
    for begin in range(0, len(seeds), batch_size):
        scenes, rows = [], []
        for seed in seeds[begin : begin + batch_size]:
            scene, asked = make_clip(seed, skills[seed % len(skills)], num_frames)
            scenes.append(scene)
            rows.append(
                [
                    encoder(each.text, each.answer, SKILLS.index(each.skill))
                    for each in asked[:questions_per_clip]
                ]
            )
        questions, _ = pack(rows, row_length, encoder.padding)
        batches.append(ValidationBatch(pack_scenes(scenes), questions))
    return batches


def make_clip(seed: int, skill: str, num_frames: int = 16) -> tuple[Scene, list[Question]]:
    """Return a clip's scene and its questions, in the order in which they are asked."""
    scene = sample_scene(seed, skill, num_frames)
    asked = ask(scene, seed, skill)
    random.Random(f"validation {seed}").shuffle(asked)
    return scene, asked


@torch.no_grad()
def accuracy(
    model: PackedModel,
    batches: Sequence[ValidationBatch],
    device: torch.device,
    compress: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
) -> dict[str, dict[str, Score]]:
    """Return the scores of each skill, for each way to compress: {"whole": {"count": ...}}.

    An answer is right if greedy decoding gives exactly it: if at each of its tokens, the one that
    ends it included, the model is most inclined to that token.

    Args:
        model: put in evaluation mode.
        batches: of ``make_batches``.
        device: where the model is.
        compress: by name, what makes (K, D) of tokens (T, P, D); beside them "whole" is scored.
    """
    model.eval()
    ways = {"whole": lambda tokens: tokens.flatten(0, 1), **(compress or {})}
    counts = {name: torch.zeros(2, len(SKILLS), dtype=torch.int64, device=device) for name in ways}
    for batch in batches:
        tokens = encode(model, batch.scenes, device)
        questions = batch.questions.to(device)
        for name, way in ways.items():
            video = torch.stack([way(each) for each in tokens])
            with autocast(device):
                logits = model.logits(model(video, questions))
            counts[name] += _count_right(logits, questions)
    return {
        name: {
            skill: Score(right, asked)
            for skill, right, asked in zip(SKILLS, *count.tolist(), strict=True)
        }
        for name, count in counts.items()
    }


def encode(model: PackedModel, scenes: PackedScenes, device: torch.device) -> Tensor:
    """Return the tokens of painted scenes, (B, T, P, D)."""
    with autocast(device):
        return model.video_tokens(normalised(as_values(render(scenes, device))))


def autocast(device: torch.device) -> torch.autocast:
    """Return the context in which all is computed: bfloat16 on a GPU."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


@dataclass(frozen=True)
class Answers:
    """The questions of a batch, by clip and then as they were packed; Q of them."""

    is_right: Tensor
    """(Q,) bool."""
    skill: Tensor
    """(Q,) int64: index in SKILLS."""
    clip: Tensor
    """(Q,) int64: the clip's number in the batch."""


def answers(logits: Tensor, questions: PackedQuestions) -> Answers:
    """Return which questions are answered rightly, from the logits of all of their tokens."""
    is_answer = questions.labels != IGNORED
    is_wrong = is_answer & (logits.argmax(-1) != questions.labels)
    most = max(int(questions.questions.max()) + 1, 1)
    clip = torch.arange(len(is_wrong), device=logits.device)[:, None]
    slot = torch.where(questions.questions == NO_QUESTION, 0, questions.questions)
    slot = (clip * most + slot)[is_answer]
    size = len(is_wrong) * most
    asked = torch.zeros(size, dtype=torch.bool, device=logits.device)
    asked[slot] = True
    wrong = torch.zeros_like(asked)
    wrong[slot[is_wrong[is_answer]]] = True
    skill = torch.zeros(size, dtype=torch.int64, device=logits.device)
    skill[slot] = questions.skills[is_answer]
    number = asked.nonzero().squeeze(1)
    return Answers(~wrong[number], skill[number], number // most)


def _count_right(logits: Tensor, questions: PackedQuestions) -> Tensor:
    """Return the questions answered rightly and all questions, int64 (2, skills)."""
    given = answers(logits, questions)
    return torch.stack(
        [
            torch.bincount(skill, minlength=len(SKILLS))
            for skill in (given.skill[given.is_right], given.skill)
        ]
    )


def compressors(methods: Sequence[str], ratios: Sequence[float]) -> dict[str, Any]:
    """Return ways to compress by name ("scc 0.1"), by this package's methods."""
    from scissor_vllm import num_retained_tokens
    from scissor_vllm.compression import get_compressor

    def way(method: str, ratio: float) -> Callable[[Tensor], Tensor]:
        def compressed(tokens: Tensor) -> Tensor:
            kept = num_retained_tokens(tokens.shape[0] * tokens.shape[1], ratio)
            return get_compressor(method)(tokens, kept).tokens

        return compressed

    return {f"{method} {ratio:g}": way(method, ratio) for method in methods for ratio in ratios}


@torch.no_grad()
def similarity(
    model: PackedModel, batches: Sequence[ValidationBatch], device: torch.device
) -> dict[str, Any]:
    """Return quantiles of the cosine between tokens that compression sees, and their norms.

    Pairs are neighbours in a frame, tokens in one place of frames that follow each other, and any
    two of a frame, which are paired by moving one of them by half a frame and three tokens.
    """
    model.eval()
    gathered: dict[str, list[Tensor]] = {}
    for batch in batches:
        for name, values in _similarities(encode(model, batch.scenes, device).float()):
            gathered.setdefault(name, []).append(values.flatten().cpu())
    points = torch.tensor(_QUANTILES)
    summary: dict[str, Any] = {"quantiles": list(_QUANTILES)}
    for name, parts in gathered.items():
        values = torch.cat(parts)
        step = max(1, len(values) // 1_000_000)
        summary[name] = [round(value, 4) for value in values[::step].quantile(points).tolist()]
    return summary


def _similarities(tokens: Tensor) -> Iterator[tuple[str, Tensor]]:
    batch, num_frames, per_frame, width = tokens.shape
    side = int(per_frame**0.5)
    norms = tokens.norm(dim=-1)
    unit = F.normalize(tokens, dim=-1)
    grid = unit.view(batch, num_frames, side, side, width)
    yield "cosine of neighbours in a row", (grid[..., 1:, :] * grid[..., :-1, :]).sum(-1)
    yield "cosine of neighbours in time", (unit[:, 1:] * unit[:, :-1]).sum(-1)
    yield "cosine of any two in a frame", (unit * unit.roll(per_frame // 2 + 3, 2)).sum(-1)
    mean = tokens.flatten(0, 2).mean(0)
    yield "norm", norms
    yield (
        "share of the mean in the squared norm",
        (mean.square().sum() / norms.square().mean())[None],
    )
