"""How many video tokens are kept: the ratio's rules, and the one place that turns it into K.

Standard library only. Everything downstream carries K as an integer; nothing computes it again
from a float.
"""

import math
import reprlib
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from numbers import Rational
from typing import Any

RETENTION_RATIO = "retention_ratio"
"""Key of the ratio in a request's body and in vLLM's ``mm_processor_kwargs``."""
RETENTION = "retention"
"""Our key in vLLM's ``media_io_kwargs``: a mapping with the two below, of one HTTP request."""
RETENTION_REPORT = "retention_report"
"""Key of the request's :class:`RetentionReport`."""


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
            f"{RETENTION_RATIO} must be at least {minimum} on this server, got {ratio!r}: "
            f"ask for {minimum} or more, or have the operator lower --min-retention-ratio"
        )
    return float(exact)


def ratio_or_none(ratio: object) -> float | None:
    """Return the ratio as a float if it lies in (0, 1], else None."""
    try:
        return check_retention_ratio(ratio)
    except (TypeError, ValueError):
        return None


def _exact_ratio(ratio: object) -> Fraction:
    """Return the ratio as the exact fraction that its decimal notation shows."""
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float, Decimal, Rational)):
        raise TypeError(
            f"{RETENTION_RATIO} must be a number in (0, 1], the fraction of video tokens to keep, "
            f"got {_shown(ratio)}"
        )
    if isinstance(ratio, (float, Decimal)) and not math.isfinite(ratio):
        raise ValueError(_out_of_range(ratio))
    exact = Fraction(repr(float(ratio))) if isinstance(ratio, float) else Fraction(ratio)
    if not 0 < exact <= 1:
        raise ValueError(_out_of_range(ratio))
    return exact


def _shown(value: object) -> str:
    """Return a value as a client reads it: cut to some words, as JSON where it came as that."""
    words = {True: "true", False: "false"}
    return words[value] if isinstance(value, bool) else reprlib.repr(value)


def _out_of_range(ratio: object) -> str:
    return (
        f"{RETENTION_RATIO} must be above 0 and at most 1, got {_shown(ratio)}: it is the fraction "
        "of video tokens to keep, 1.0 keeps all"
    )


@dataclass
class RetentionReport:
    """What compression did to one request's videos; filled by the processor, read by the server."""

    retention_ratio: float | None = None
    """Ratio in force; None until a video was processed."""
    num_tokens: list[int] = field(default_factory=list)
    """Tokens of each video before compression."""
    num_retained: list[int] = field(default_factory=list)
    """Tokens of each video after compression."""

    def add(self, ratio: float, num_tokens: int, num_retained: int) -> None:
        """Record one video."""
        self.retention_ratio = ratio
        self.num_tokens.append(num_tokens)
        self.num_retained.append(num_retained)

    def look(self, videos: Any) -> None:
        """Look at the decoded videos, vLLM's items of them; a report that draws them keeps them."""

    def as_response(self) -> dict[str, float | int] | None:
        """Return the response's ``video_compression`` object, None if there was no video."""
        if self.retention_ratio is None:
            return None
        return {
            "retention_ratio": self.retention_ratio,
            "num_video_tokens": sum(self.num_tokens),
            "num_retained_video_tokens": sum(self.num_retained),
        }
