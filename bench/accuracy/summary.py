"""Accuracies of result files by label, ratio and skill, and comparisons of labels."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from bench.accuracy.questions import HarnessError
from bench.accuracy.results import Results, Run
from bench.accuracy.statistics import Bootstrap, Estimate, mcnemar, wilson
from scissor_vllm.settings import DEFAULT_VIDEO_COMPRESSION

OVERALL = "overall"
"""Name in place of a skill for the mean over skills, with equal weights."""


@dataclass(frozen=True)
class Cell:
    """A label at a ratio in a skill, or in the mean of them."""

    label: str
    retention_ratio: float
    skill: str
    num_questions: int
    num_answered: int
    num_correct: int
    accuracy: Estimate
    relative: Estimate | None
    """Relative to the label's accuracy at ratio 1.0; None for a skill, or without that ratio."""
    retained_tokens: float
    """Mean number of video tokens after compression, over the answered questions."""

    @property
    def num_failed(self) -> int:
        """Number of questions without an answer: failed, or not asked yet."""
        return self.num_questions - self.num_answered


@dataclass(frozen=True)
class Comparison:
    """Two labels at one ratio, on the questions that both answered."""

    label: str
    other: str
    retention_ratio: float
    difference: Estimate
    """Difference of the means over skills; above 0 the first is better."""
    num_only_label: int
    """Questions that only the first answered correctly."""
    num_only_other: int
    p_value: float
    """McNemar's exact test over all questions, two-sided."""


class Summary:
    """Accuracies of result files with the same questions."""

    def __init__(
        self,
        files: Sequence[Results],
        labels: Sequence[str] | None = None,
        *,
        common: bool = False,
    ) -> None:
        """Take the runs of all files, or only these labels, in this order.

        With ``common``, take only the questions that each of them answered at all of its ratios.

        Raises:
            HarnessError: the files have different questions, two runs have the same label, a label
                is in no file, or no question is common.
        """
        for file in files[1:]:
            for key in ("fingerprint", "num_questions"):
                if file.questions[key] != files[0].questions[key]:
                    raise HarnessError(
                        f"{files[0].path} is about questions with {key} {files[0].questions[key]}, "
                        f"{file.path} with {file.questions[key]}: only results about the same "
                        "questions compare"
                    )
        self.runs = [run for file in files for run in file.runs if run.answers]
        repeated = [label for label, n in Counter(run.label for run in self.runs).items() if n > 1]
        if repeated or not self.runs:
            found = f"{repeated[0]!r} twice" if repeated else "no answer"
            raise HarnessError(
                f"the result files {', '.join(str(file.path) for file in files)} must have answers "
                f"and each label once, got {found}"
            )
        if labels is not None:
            by_label = {run.label: run for run in self.runs}
            if unknown := [label for label in labels if label not in by_label]:
                raise HarnessError(f"--label must be of {', '.join(by_label)}, got {unknown[0]!r}")
            self.runs = [by_label[label] for label in dict.fromkeys(labels)]
        self.video_bytes = {file.questions["video_bytes"] for file in files}
        self._items: list[dict[str, Any]] = files[0].questions["items"]
        if common:
            self._items = [
                item for item in self._items if all(_is_answered(run, item) for run in self.runs)
            ]
            if not self._items:
                raise HarnessError(
                    f"no question was answered by all of {', '.join(self.labels)} at all of their "
                    "ratios: leave out --common, or choose with --label"
                )

    @property
    def labels(self) -> list[str]:
        """The labels, in the order they were measured."""
        return [run.label for run in self.runs]

    @property
    def default_baseline(self) -> str:
        """The baseline of comparisons: the default method, else the first label."""
        ours = DEFAULT_VIDEO_COMPRESSION
        return ours if ours in self.labels else self.labels[0]

    @cached_property
    def skills(self) -> list[str]:
        """The skills, in the order of the questions."""
        return list(dict.fromkeys(item["skill"] for item in self._items))

    @cached_property
    def ratios(self) -> list[float]:
        """The ratios that any label has, largest first."""
        return sorted({ratio for run in self.runs for ratio in run.ratios}, reverse=True)

    @cached_property
    def cells(self) -> list[Cell]:
        """Every label at each of its ratios: the mean over skills, then each skill."""
        return [
            cell
            for run in self.runs
            for ratio in run.ratios
            for cell in [self._overall(run, ratio), *self._by_skill(run, ratio)]
        ]

    def cell(self, label: str, ratio: float, skill: str = OVERALL) -> Cell | None:
        """Return one cell, None if it was not measured."""
        return self._by_key.get((label, ratio, skill))

    def compare(self, label: str) -> list[Comparison]:
        """Return comparisons of the label with every other label, at each ratio that both have.

        Raises:
            HarnessError: the label is unknown.
        """
        runs = {run.label: run for run in self.runs}
        if label not in runs:
            raise HarnessError(f"--baseline must be one of {', '.join(runs)}, got {label!r}")
        return [
            self._compare(runs[label], other, ratio)
            for other in self.runs
            if other.label != label
            for ratio in self.ratios
            if ratio in runs[label].ratios and ratio in other.ratios
        ]

    def commonest_share(self, skill: str) -> float:
        """Return the accuracy of always giving the commonest answer, which needs no video.

        It is the commonest of the skill's free answers, of its letters among four, and so on.
        `OVERALL` is the mean over skills.
        """
        if skill == OVERALL:
            return sum(map(self.commonest_share, self.skills)) / len(self.skills)
        forms: dict[int, Counter[str]] = {}
        for item in self._items:
            if item["skill"] == skill:
                forms.setdefault(item["num_choices"], Counter())[item["expected"]] += 1
        right = sum(form.most_common(1)[0][1] for form in forms.values())
        return right / sum(form.total() for form in forms.values())

    @cached_property
    def _by_key(self) -> dict[tuple[str, float, str], Cell]:
        return {(cell.label, cell.retention_ratio, cell.skill): cell for cell in self.cells}

    @cached_property
    def _bootstrap(self) -> Bootstrap:
        return Bootstrap(
            [item["video"] for item in self._items], [item["skill"] for item in self._items]
        )

    def _correct(self, run: Run, ratio: float) -> np.ndarray:
        """Return (questions,) float: 1 correct, 0 wrong, NaN not answered."""
        answers = (run.answers.get((item["id"], ratio)) for item in self._items)
        return np.array(
            [math.nan if a is None or a.correct is None else float(a.correct) for a in answers]
        )

    def _overall(self, run: Run, ratio: float) -> Cell:
        correct = self._correct(run, ratio)
        relative = None
        if 1.0 in run.ratios:
            relative = self._bootstrap.ratio(correct, self._correct(run, 1.0))
        return self._cell(run, ratio, OVERALL, correct, self._bootstrap.mean(correct), relative)

    def _by_skill(self, run: Run, ratio: float) -> list[Cell]:
        correct = self._correct(run, ratio)
        skills = np.array([item["skill"] for item in self._items])
        cells = []
        for skill in self.skills:
            of_skill = correct[skills == skill]
            answered = of_skill[~np.isnan(of_skill)]
            accuracy = wilson(int(answered.sum()), len(answered))
            cells.append(self._cell(run, ratio, skill, of_skill, accuracy, None))
        return cells

    def _cell(
        self,
        run: Run,
        ratio: float,
        skill: str,
        correct: np.ndarray,
        accuracy: Estimate,
        relative: Estimate | None,
    ) -> Cell:
        retained = [
            answer.num_retained_tokens
            for item in self._items
            if skill in (OVERALL, item["skill"])
            and (answer := run.answers.get((item["id"], ratio))) is not None
            and answer.num_retained_tokens is not None
        ]
        return Cell(
            label=run.label,
            retention_ratio=ratio,
            skill=skill,
            num_questions=len(correct),
            num_answered=int((~np.isnan(correct)).sum()),
            num_correct=int(np.nansum(correct)),
            accuracy=accuracy,
            relative=relative,
            retained_tokens=sum(retained) / len(retained) if retained else math.nan,
        )

    def _compare(self, run: Run, other: Run, ratio: float) -> Comparison:
        first, second = self._correct(run, ratio), self._correct(other, ratio)
        only_first = int(((first == 1) & (second == 0)).sum())
        only_second = int(((first == 0) & (second == 1)).sum())
        return Comparison(
            label=run.label,
            other=other.label,
            retention_ratio=ratio,
            difference=self._bootstrap.difference(first, second),
            num_only_label=only_first,
            num_only_other=only_second,
            p_value=mcnemar(only_first, only_second),
        )


def _is_answered(run: Run, item: dict[str, Any]) -> bool:
    answers = [run.answers.get((item["id"], ratio)) for ratio in run.ratios]
    return all(answer is not None and answer.correct is not None for answer in answers)


def accuracy_file(summary: Summary) -> list[dict[str, Any]]:
    """Return the means over skills as ``scissor-vllm bench plot --accuracy`` takes them."""
    return [
        {
            "method": cell.label,
            "retention_ratio": cell.retention_ratio,
            "accuracy": round(cell.accuracy.value, 6),
            "low": round(cell.accuracy.low, 6),
            "high": round(cell.accuracy.high, 6),
        }
        for cell in summary.cells
        if cell.skill == OVERALL
    ]
