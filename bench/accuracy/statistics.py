"""Uncertainty of an accuracy: 95 % intervals, and differences on the same questions."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

LEVEL = 0.95
NUM_RESAMPLES = 10_000
SEED = 0


_Means = tuple[float, np.ndarray]


@dataclass(frozen=True)
class Estimate:
    """A value and the bounds of its 95 % interval."""

    value: float
    low: float
    high: float


def wilson(num_correct: int, num_answered: int) -> Estimate:
    """Return the share of correct answers with Wilson's score interval.

    The answers count as independent. Source: Wilson, "Probable inference", 1927.
    """
    if num_answered == 0:
        return Estimate(math.nan, math.nan, math.nan)
    n, share = num_answered, num_correct / num_answered
    z = NormalDist().inv_cdf(0.5 + LEVEL / 2)
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Estimate(share, max(0.0, middle - half), min(1.0, middle + half))


def mcnemar(num_only_first: int, num_only_second: int) -> float:
    """Return the p-value of McNemar's exact test, two-sided.

    Args:
        num_only_first: questions that only the first answered correctly.
        num_only_second: questions that only the second answered correctly.
    """
    n = num_only_first + num_only_second
    tail = sum(math.comb(n, k) for k in range(min(num_only_first, num_only_second) + 1))
    return min(1.0, 2 * tail / 2**n)


class Bootstrap:
    """Means over skills with intervals, and their differences, from one set of resamples.

    Videos are drawn with replacement, because answers about one video are correlated. Videos with
    one skill are drawn within that skill, and videos with several skills within their own group.
    Every call uses the same draws, so a comparison is paired. If all answers of a skill are
    correct, its share cannot vary, and the interval is too narrow: see Wilson's for that skill.
    """

    def __init__(
        self,
        videos: Sequence[Hashable],
        skills: Sequence[str],
        *,
        num_resamples: int = NUM_RESAMPLES,
        seed: int = SEED,
    ) -> None:
        """Draw the resamples.

        Args:
            videos: the video of each question.
            skills: the skill of each question.
            num_resamples: number of draws, B.
            seed: seed of the draws.
        """
        self._video = _numbers(videos)
        self._skill = _numbers(skills)
        self._num_skills = len(set(skills))
        stratum = np.full(self._video.max() + 1, -1)
        for video in range(len(stratum)):
            skills_of_video = np.unique(self._skill[self._video == video])
            stratum[video] = skills_of_video[0] if len(skills_of_video) == 1 else self._num_skills
        # The table and the comparisons need the same means.
        self._known: dict[bytes, _Means] = {}
        rng = np.random.default_rng(seed)
        self._weights = np.zeros((num_resamples, len(stratum)), dtype=np.float32)
        for number in np.unique(stratum):
            members = np.flatnonzero(stratum == number)
            drawn = rng.integers(len(members), size=(num_resamples, len(members)))
            drawn += np.arange(num_resamples)[:, None] * len(members)
            counts = np.bincount(drawn.ravel(), minlength=num_resamples * len(members))
            self._weights[:, members] = counts.reshape(num_resamples, len(members))

    def mean(self, correct: np.ndarray) -> Estimate:
        """Return the mean over skills of the share that is correct.

        Args:
            correct: (questions,) float; 1 correct, 0 wrong, NaN not answered.
        """
        return _estimate(*self._means(correct))

    def difference(self, first: np.ndarray, second: np.ndarray) -> Estimate:
        """Return the first mean minus the second, over the questions that both answered."""
        (a, drawn_a), (b, drawn_b) = self._both_means(first, second)
        return _estimate(a - b, drawn_a - drawn_b)

    def ratio(self, first: np.ndarray, second: np.ndarray) -> Estimate:
        """Return the first mean divided by the second, over the questions that both answered."""
        (a, drawn_a), (b, drawn_b) = self._both_means(first, second)
        with np.errstate(divide="ignore", invalid="ignore"):
            return _estimate(float(np.divide(a, b)), np.divide(drawn_a, drawn_b))

    def _both_means(self, first: np.ndarray, second: np.ndarray) -> tuple[_Means, _Means]:
        """Return the means of each over the questions that both answered."""
        return (
            self._means(np.where(np.isnan(second), np.nan, first)),
            self._means(np.where(np.isnan(first), np.nan, second)),
        )

    def _means(self, correct: np.ndarray) -> _Means:
        """Return the mean over skills, and that of each resample (B,)."""
        key = correct.tobytes()
        if key not in self._known:
            self._known[key] = self._find_means(correct)
        return self._known[key]

    def _find_means(self, correct: np.ndarray) -> _Means:
        counted = ~np.isnan(correct)
        shape = self._weights.shape[1], self._num_skills
        right, answered = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        where = self._video[counted], self._skill[counted]
        np.add.at(right, where, correct[counted])
        np.add.at(answered, where, 1)
        point = _mean_share(right.sum(0), answered.sum(0))
        return float(point), _mean_share(self._weights @ right, self._weights @ answered)


def _mean_share(right: np.ndarray, answered: np.ndarray) -> np.ndarray:
    """Return the mean over the last axis of right / answered; skills without an answer are out."""
    share = np.divide(right, answered, out=np.zeros(right.shape), where=answered > 0)
    known = (answered > 0).sum(-1)
    return np.divide(share.sum(-1), known, out=np.full(known.shape, np.nan), where=known > 0)


def _estimate(point: float, drawn: np.ndarray) -> Estimate:
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn) or not math.isfinite(point):
        return Estimate(point, math.nan, math.nan)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(point, float(low), float(high))


def _numbers(values: Sequence[Hashable]) -> np.ndarray:
    """Return each value's index in the order of first use."""
    number = {value: n for n, value in enumerate(dict.fromkeys(values))}
    return np.array([number[value] for value in values])
