"""Training batches: scenes and questions about them, made by worker processes from seeds."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from bench.demo_training.lessons import note, ways
from bench.demo_training.packing import EncodedQuestion, Encoder, PackedQuestions, pack
from bench.world.questions import SKILLS, Question, ask
from bench.world.render import PackedScenes
from bench.world.render import pack as pack_scenes
from bench.world.scene import MIN_NUM_FRAMES, Scene, sample_scene

STAGES: tuple[tuple[float, int, int], ...] = ((0.25, 1, 2), (0.45, 4, 2), (0.55, 8, 1))
"""Stages: the share of the training at which one ends, the frames of most clips, and the clips of a
batch as a multiple of the usual. Short clips teach most of what long ones need, at a tenth of the
price."""
OTHER_LENGTHS: Mapping[int, float] = {8: 0.08, 4: 0.05, 1: 0.02}
"""Share of batches with clips of so many frames, where the stage has more."""
LESSONS_END = 0.7
"""The share of the training after which batches have questions only."""
MAX_NUM_NOTES = 12
"""Exercises about what things are, for a clip at the start. They become fewer."""
MAX_NUM_WAYS = 4
"""Exercises about where things are, likewise."""
EXERCISE = len(SKILLS)
"""Skill index of exercises."""
GENERAL_SHARE = 0.35
"""Share of scenes that mix all skills. Each other scene is made for one."""
OWN_SKILL_BOOST = 4.0
"""Factor of the weight of questions about the skill that a scene was made for."""
CASUAL_SHARE = 0.2
"""Share of questions with a capital letter and punctuation."""
MAX_SEED = 2**31


@dataclass(frozen=True)
class Batch:
    """Clips of one length, not painted yet, and questions about each."""

    scenes: PackedScenes
    questions: PackedQuestions

    def __len__(self) -> int:
        return len(self.questions.tokens)


@dataclass(frozen=True)
class BatchPlan:
    """All that a worker needs to make one batch."""

    seeds: range
    num_frames: int
    skill_weights: tuple[float, ...]
    lessons: float = 0.0
    """From 1, many exercises, to 0, none."""


@dataclass
class Curriculum:
    """The plans of all batches, in order; skills that lag get a larger share.

    It is read in the process that trains, a fixed number of batches ahead: the same losses and the
    same progress give the same plans.
    """

    seed: int
    batch_size: int
    num_batches: int
    num_frames: int = 16
    """Of most clips in the last stage."""
    skill_weights: tuple[float, ...] = (1.0,) * len(SKILLS)
    done: float = 0.0
    """Share of the training that is done. The training loop sets it."""
    stages: tuple[tuple[float, int, int], ...] = STAGES

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[BatchPlan]:
        rng = random.Random(f"lengths {self.seed}")
        begin = random.Random(f"clips {self.seed}").randrange(MAX_SEED // 2)
        for _ in range(self.num_batches):
            usual, times = self._stage()
            others = {n: share for n, share in OTHER_LENGTHS.items() if n < usual}
            lengths, shares = [usual, *others], [1 - sum(others.values()), *others.values()]
            (num_frames,) = rng.choices(lengths, shares)
            seeds = range(begin, begin + times * self.batch_size)
            begin = seeds.stop
            lessons = max(0.0, 1 - self.done / LESSONS_END)
            yield BatchPlan(seeds, num_frames, self.skill_weights, lessons)

    def _stage(self) -> tuple[int, int]:
        for until, num_frames, times in self.stages:
            if self.done < until and num_frames < self.num_frames:
                return num_frames, times
        return self.num_frames, 1

    def favour(self, losses: Sequence[float]) -> None:
        """Weigh the skills by their losses: one of average loss 1, none below 0.4 or above 3.

        A loss that is NaN leaves its skill at 1.
        """
        known = [loss for loss in losses if math.isfinite(loss)]
        mean = max(sum(known) / max(len(known), 1), 1e-9)
        self.skill_weights = tuple(
            min(3.0, 0.4 + 0.6 * loss / mean) if math.isfinite(loss) else 1.0 for loss in losses
        )


class BatchMaker(torch.utils.data.Dataset[Batch]):
    """Makes the batch of a plan."""

    def __init__(self, tokenizer: Any, row_length: int) -> None:
        """Take a `tokenizers.Tokenizer` and the tokens of questions that a clip has room for."""
        self._encoder = Encoder(tokenizer)
        self._row_length = row_length

    def __getitem__(self, plan: BatchPlan) -> Batch:
        """Return the batch of a plan; equal plans give equal batches."""
        scenes, rows = [], []
        for seed in plan.seeds:
            rng = random.Random(f"clip {seed}")
            skill = _sample_skill(rng, plan)
            scene = sample_scene(seed, skill, plan.num_frames)
            asked = _in_random_order(rng, ask(scene, seed), scene, plan.skill_weights)
            scenes.append(scene)
            exercises = self._exercises(scene, asked, plan.lessons)
            rows.append([*exercises, *(self._encode(question, rng) for question in asked)])
        questions, _ = pack(rows, self._row_length, self._encoder.padding)
        return Batch(pack_scenes(scenes), questions)

    def _exercises(
        self, scene: Scene, asked: Sequence[Question], lessons: float
    ) -> list[EncodedQuestion]:
        """Return notes of the first questions without choices, and ways between things."""
        free = [question for question in asked if not question.choices]
        notes = [
            note(self._encoder, each, EXERCISE) for each in free[: round(lessons * MAX_NUM_NOTES)]
        ]
        between = ways(self._encoder, scene, EXERCISE)
        return [*notes, *islice(between, round(lessons * MAX_NUM_WAYS))]

    def _encode(self, question: Question, rng: random.Random) -> EncodedQuestion:
        text = question.text
        if rng.random() < CASUAL_SHARE:
            text = casual(text)
        return self._encoder(text, question.answer, SKILLS.index(question.skill))


def casual(text: str) -> str:
    """Return a question as people write: a capital first, no space before its marks."""
    for mark in ("?", ",", "."):
        text = text.replace(f" {mark}", mark)
    return text[0].upper() + text[1:]


def _sample_skill(rng: random.Random, plan: BatchPlan) -> str | None:
    if rng.random() < GENERAL_SHARE:
        return None
    weights = [
        weight if plan.num_frames >= MIN_NUM_FRAMES[skill] else 0.0
        for skill, weight in zip(SKILLS, plan.skill_weights, strict=True)
    ]
    return rng.choices(SKILLS, weights)[0]


def _in_random_order(
    rng: random.Random, questions: Sequence[Question], scene: Scene, weights: Sequence[float]
) -> list[Question]:
    """Return the questions in an order that puts skills of large weight first, often.

    Weighted sampling without replacement by keys (Efraimidis and Spirakis, 2006).
    """
    skills = [question.skill for question in questions]
    keys = []
    for skill in skills:
        weight = weights[SKILLS.index(skill)] / skills.count(skill)
        weight *= OWN_SKILL_BOOST if skill == scene.skill else 1.0
        keys.append(rng.random() ** (1 / weight))
    order = sorted(range(len(questions)), key=keys.__getitem__, reverse=True)
    return [questions[index] for index in order]


def batch_loader(
    maker: BatchMaker, curriculum: Curriculum, num_workers: int
) -> torch.utils.data.DataLoader[Batch]:
    """Return a loader that yields the curriculum's batches in order."""
    return torch.utils.data.DataLoader(
        maker,
        sampler=curriculum,
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=4 if num_workers else None,
    )
