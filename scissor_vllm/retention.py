"""How many video tokens are kept: the rules of ratio and budget, and the one place that gives K.

Standard library only. Everything downstream carries K as an integer. Nothing recomputes it from a
float.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from numbers import Rational
from typing import Any

RETENTION_RATIO = "retention_ratio"
"""Key of the ratio in a request's body and in vLLM's ``mm_processor_kwargs``."""
MAX_RETAINED_VIDEO_TOKENS = "max_retained_video_tokens"
"""The same of the budget: most tokens that the videos of a request keep together."""
COMPRESS_IMAGES = "compress_images"
"""Key in a request's body: whether runs of images are compressed as the frames of a video."""
AUTO = "auto"
"""In place of a ratio: the server chooses it."""
AUTO_STEPS = (0.75, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05)
"""Ratios that the server chooses from, beside the operator's bounds."""
Chooser = Callable[[Sequence[int | None], float, float], float]
"""Returns the ratio of a request that leaves it to the server, by N of its videos and the lowest
and highest ratio that its videos allow, 0 and 1 for any."""
RETENTION = "retention"
"""Our key in vLLM's ``media_io_kwargs``: a mapping with the ones here, of one HTTP request. In the
options of a request's processor: its :class:`RetainedCounts`."""
RETENTION_REPORT = "retention_report"
"""Key of the request's :class:`RetentionReport`."""
LOADED_MEDIA = "loaded_media"
"""Key of what the request's images became, by the names that stand in place of their URLs."""


_MAX_SHOWN = 40
"""Most characters of a refused value in a message."""


def num_retained_tokens(num_tokens: int, retention_ratio: float | Decimal | Rational) -> int:
    """Return K = max(1, ceil(retention_ratio * num_tokens)), exact for decimals.

    A float stands for the decimal that is written for it: 0.1 is one tenth, so 0.1 of 30 tokens
    are 3, although 0.1 * 30 is 3.0000000000000004 in binary.

    Args:
        num_tokens: N, tokens of one video before compression, at least 1.
        retention_ratio: fraction kept, 0 < ratio <= 1.

    Raises:
        TypeError: num_tokens is not an int, or the ratio not a number (bool is not).
        ValueError: num_tokens < 1, or the ratio not in (0, 1].
    """
    if isinstance(num_tokens, bool) or not isinstance(num_tokens, int):
        raise TypeError(f"num_tokens must be an int, got {num_tokens!r}")
    if num_tokens < 1:
        raise ValueError(f"num_tokens must be at least 1, got {num_tokens}")
    exact = _exact_ratio(retention_ratio)
    return max(1, math.ceil(exact * num_tokens))


def check_retention_ratio(ratio: object, *, minimum: float = 0.0) -> float:
    """Return the ratio as a float if it lies in (0, 1] and is not below the minimum.

    Raises:
        TypeError: not a number (a bool or a string is not one).
        ValueError: outside (0, 1], NaN or infinite, or below ``minimum``.
    """
    exact = _exact_ratio(ratio)
    if minimum > 0 and exact < _exact_ratio(minimum):
        raise ValueError(
            f"{RETENTION_RATIO} must be at least {minimum} on this server, got {_as_json(ratio)}: "
            f"ask for {minimum} or more, or have the operator lower --min-retention-ratio"
        )
    return float(exact)


def parse_retention_ratio(text: str) -> float:
    """Return the ratio that a command line names.

    Raises:
        ValueError: no number in (0, 1].
    """
    try:
        ratio = float(text)
    except ValueError:
        raise ValueError(_refusal(text)) from None
    return check_retention_ratio(ratio)


def ratio_or_none(ratio: object) -> float | None:
    """Return the ratio as a float if it lies in (0, 1], else None."""
    try:
        return check_retention_ratio(ratio)
    except (TypeError, ValueError):
        return None


def _exact_ratio(ratio: object) -> Fraction:
    """Return the ratio as the exact fraction that its decimal notation shows."""
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float, Decimal, Rational)):
        raise TypeError(_refusal(ratio))
    if isinstance(ratio, (float, Decimal)) and not math.isfinite(ratio):
        raise ValueError(_refusal(ratio))
    exact = Fraction(repr(float(ratio))) if isinstance(ratio, float) else Fraction(ratio)
    if not 0 < exact <= 1:
        raise ValueError(_refusal(ratio))
    return exact


def _refusal(ratio: object) -> str:
    """Return the one sentence for whatever is no ratio."""
    return (
        f"{RETENTION_RATIO} must be a number above 0 and at most 1, got {_as_json(ratio)}: it is "
        "the fraction of video tokens to keep, 1.0 keeps all"
    )


def _as_json(value: object) -> str:
    """Return a value as JSON has it, cut; an array or an object by its kind alone."""
    if isinstance(value, str):
        return json.dumps(value if len(value) <= _MAX_SHOWN else f"{value[:_MAX_SHOWN]}...")
    if value is None or isinstance(value, (bool, float)):
        return json.dumps(value)
    if isinstance(value, int):
        # Python writes no integer of more than 4300 digits.
        return str(value) if abs(value) < 10**_MAX_SHOWN else "a very large integer"
    if isinstance(value, (Decimal, Rational)):
        return str(value)[:_MAX_SHOWN]
    if isinstance(value, (list, dict)):
        return "an array" if isinstance(value, list) else "an object"
    return f"a {type(value).__name__}"


MAX_BUDGET = 2**53 - 1
"""The largest budget: the largest integer that every JSON reader keeps exact."""


def check_token_budget(budget: object) -> int:
    """Return the budget if it is an integer from 1 to 2**53 - 1.

    Raises:
        TypeError: not an integer (a bool, a float or a string is not one).
        ValueError: out of range.
    """
    if isinstance(budget, bool) or not isinstance(budget, int):
        raise TypeError(
            f"{MAX_RETAINED_VIDEO_TOKENS} must be an integer of at least 1, the most tokens that "
            f"all videos keep together, got {_as_json(budget)}"
        )
    if budget < 1:
        raise ValueError(
            f"{MAX_RETAINED_VIDEO_TOKENS} must be at least 1, got {_as_json(budget)}: it is the "
            f"most tokens that all videos keep together; send {RETENTION_RATIO} to keep a fraction"
        )
    if budget > MAX_BUDGET:
        raise ValueError(
            f"{MAX_RETAINED_VIDEO_TOKENS} must be at most {MAX_BUDGET}, got {_as_json(budget)}: "
            "leave it out for no limit"
        )
    return budget


def check_compress_images(value: object) -> bool:
    """Return whether a request asks for its runs of images to be compressed.

    Raises:
        TypeError: not a boolean or null.
    """
    if value is not None and not isinstance(value, bool):
        raise TypeError(
            f"{COMPRESS_IMAGES} must be true or false, got {_as_json(value)}: true compresses runs "
            "of images as the frames of a video"
        )
    return bool(value)


class BudgetTooSmallError(ValueError):
    """A request's videos cannot be kept in its budget."""


class RatioTooSmallError(ValueError):
    """At a request's ratio images of a run would keep less than a token each."""


_RATIO_STEP = Decimal("0.0001")


def least_ratio(num_tokens: int, num_retained: int) -> float:
    """Return the lowest ratio of four decimals at which K of N tokens is at least this many."""
    steps = math.floor(Fraction(num_retained - 1, num_tokens) / Fraction(_RATIO_STEP)) + 1
    return min(1.0, float(steps * _RATIO_STEP))


def highest_ratio(num_tokens: int, num_retained: int) -> float:
    """Return the highest ratio of four decimals at which K of N tokens is at most this many.

    0 if there is none.
    """
    steps = math.floor(Fraction(num_retained, num_tokens) / Fraction(_RATIO_STEP))
    return min(1.0, float(steps * _RATIO_STEP))


@dataclass(frozen=True)
class RetainedCounts:
    """Tokens of a request's videos before and after compression."""

    num_tokens: tuple[int | None, ...]
    """N of each, None for a video that a client names by its id in the cache."""
    num_retained: tuple[int | None, ...]
    """K of each, None likewise."""
    ratio: float
    """In force: the ratio asked for, or the fraction that the budget leaves."""
    is_budgeted: bool = False
    """Whether the budget decided."""
    num_images: tuple[int, ...] = ()
    """Images of each video that is a run of them, 0 for any other."""

    def at(self, indices: Sequence[int]) -> "RetainedCounts":
        """Return the counts of some of the videos."""
        return RetainedCounts(
            tuple(self.num_tokens[index] for index in indices),
            tuple(self.num_retained[index] for index in indices),
            self.ratio,
            self.is_budgeted,
            tuple(self.num_images[index] for index in indices) if self.num_images else (),
        )


def count_retained(
    num_tokens: Sequence[int | None],
    ratio: float,
    budget: int | None = None,
    min_ratio: float = 0.0,
    num_images: Sequence[int] | None = None,
) -> RetainedCounts:
    """Return K of each video of a request.

    The ratio's K are kept unless they are more than the budget together. Then the videos keep
    exactly the budget: it is shared out in proportion to their lengths by largest remainders, each
    video with no more than the ratio and no less than the minimum ratio keep of it.

    Args:
        num_tokens: N of each video, None for one whose length is not known.
        ratio: fraction kept, 0 < ratio <= 1.
        budget: most tokens that all videos keep together, None for no limit.
        min_ratio: of the operator, at most ``ratio``. At 0 the least is one token a video.
        num_images: of each video that is a run of images, which keep at least a token each; 0 for
            any other video. None for no runs.

    Raises:
        BudgetTooSmallError: the least that the videos must keep is more than the budget, or the
            length of one of them is not known.
        RatioTooSmallError: the ratio keeps less than a token of each image of a run.
    """
    by_ratio = tuple(
        None if count is None else num_retained_tokens(count, ratio) for count in num_tokens
    )
    runs = tuple(num_images or (0,) * len(num_tokens))
    _check_images(num_tokens, by_ratio, runs, ratio)
    if budget is None:
        return RetainedCounts(tuple(num_tokens), by_ratio, ratio, num_images=runs)
    known = [count for count in num_tokens if count is not None]
    if len(known) < len(num_tokens):
        raise BudgetTooSmallError(
            f"{MAX_RETAINED_VIDEO_TOKENS} is shared out by the videos' lengths, but video "
            f"{list(num_tokens).index(None)} is named by its uuid alone: send its data too"
        )
    most = [count for count in by_ratio if count is not None]
    if sum(most) <= budget:
        return RetainedCounts(tuple(num_tokens), by_ratio, ratio, num_images=runs)
    least = [
        max(length, num_retained_tokens(count, min_ratio) if min_ratio else 1)
        for count, length in zip(known, runs, strict=True)
    ]
    if sum(least) > budget:
        raise BudgetTooSmallError(
            f"{MAX_RETAINED_VIDEO_TOKENS} must be at least {sum(least)} for {_described(known)} on "
            f"this server, got {_as_json(budget)}: ask for {sum(least)} or more, send fewer "
            "frames, or have the operator lower --min-retention-ratio"
        )
    shares = tuple(shared_out(budget, known, least, most))
    return RetainedCounts(
        tuple(num_tokens), shares, budget / sum(known), is_budgeted=True, num_images=runs
    )


def _check_images(
    num_tokens: Sequence[int | None],
    by_ratio: Sequence[int | None],
    num_images: Sequence[int],
    ratio: float,
) -> None:
    """Raise RatioTooSmallError if the images of a run keep less than a token each."""
    for count, num_retained, length in zip(num_tokens, by_ratio, num_images, strict=True):
        if count is not None and num_retained is not None and num_retained < length:
            least = least_ratio(count, length)
            raise RatioTooSmallError(
                f"{RETENTION_RATIO} must be at least {least} for {length} images of {count} tokens "
                f"together, which keep a token each, got {_as_json(ratio)}: ask for {least} or "
                f"more, or leave {COMPRESS_IMAGES} out"
            )


def _described(counts: Sequence[int]) -> str:
    videos = "a video" if len(counts) == 1 else f"{len(counts)} videos"
    return f"{videos} of {sum(counts)} tokens"


def shared_out(
    total: int, weights: Sequence[int], least: Sequence[int], most: Sequence[int]
) -> list[int]:
    """Return integers in proportion to their weights, within bounds, whose sum is the total.

    The exact shares are ``clamp(factor * weight, least, most)``, with the one factor that makes
    their sum the total. They are rounded by largest remainders, of equal ones the first up.

    Args:
        total: between the sums of the bounds.
        weights: each at least 1.
        least: lower bound of each share.
        most: upper bound of each share.
    """
    shares = [0] * len(weights)
    free = list(range(len(weights)))
    while free:
        # The factor is total / scale for those that are free, all in integers.
        scale = sum(weights[index] for index in free)
        below = {i: least[i] * scale - total * weights[i] for i in free}
        above = {i: total * weights[i] - most[i] * scale for i in free}
        missing = sum(gap for gap in below.values() if gap > 0)
        excess = sum(gap for gap in above.values() if gap > 0)
        if not missing and not excess:
            break
        # Bounds of the larger side hold for good: the factor moves towards the other.
        gaps, bounds = (below, least) if missing >= excess else (above, most)
        for index in [index for index in free if gaps[index] > 0]:
            shares[index] = bounds[index]
            total -= bounds[index]
            free.remove(index)
    if not free:
        return shares
    for index in free:
        shares[index] = total * weights[index] // scale
    left = total - sum(shares[index] for index in free)
    by_remainder = sorted(free, key=lambda index: -(total * weights[index] % scale))
    for index in by_remainder[:left]:
        shares[index] += 1
    return shares


@dataclass
class RetentionReport:
    """Compression of one request's videos: the processor fills it, the server reads it."""

    retention_ratio: float | None = None
    """Ratio in force; None before a video is processed."""
    num_tokens: list[int] = field(default_factory=list)
    """Tokens of each video before compression."""
    num_retained: list[int] = field(default_factory=list)
    """Tokens of each video after compression."""
    max_retained: int | None = None
    """Budget in force for all of them, None for none."""
    num_patches: list[int] = field(default_factory=list)
    """Patches of each video for which the vision tower may leave some out."""
    num_computed_patches: list[int] = field(default_factory=list)
    """Those of them that it computes."""
    num_images: int = 0
    """Images that are compressed as frames of these videos."""
    max_engine_tokens: int | None = None
    """Most tokens of a video that the engine takes, after compression; None where that is not
    known."""

    def add(self, ratio: float, num_tokens: int, num_retained: int) -> None:
        """Record one video."""
        self.retention_ratio = ratio
        self.num_tokens.append(num_tokens)
        self.num_retained.append(num_retained)

    def add_patches(self, num_patches: int, num_computed: int) -> None:
        """Record one video whose patches may be merged in the vision tower."""
        self.num_patches.append(num_patches)
        self.num_computed_patches.append(num_computed)

    def look(self, videos: Any) -> None:
        """Receive vLLM's items of the decoded videos. Subclasses may keep them."""

    def as_response(self) -> dict[str, float | int] | None:
        """Return the response's ``video_compression`` object, None if there was no video."""
        if self.retention_ratio is None:
            return None
        budget = {} if self.max_retained is None else {MAX_RETAINED_VIDEO_TOKENS: self.max_retained}
        response: dict[str, float | int] = {
            "retention_ratio": self.retention_ratio,
            "num_video_tokens": sum(self.num_tokens),
            "num_retained_video_tokens": sum(self.num_retained),
            **budget,
        }
        if self.num_images:
            response["num_compressed_images"] = self.num_images
        num_patches, num_computed = sum(self.num_patches), sum(self.num_computed_patches)
        if num_computed < num_patches:
            response["num_video_patches"] = num_patches
            response["num_computed_video_patches"] = num_computed
        return response
