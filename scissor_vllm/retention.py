"""The retention ratio's rules, and the only conversion from the ratio to K.

Standard library only. Everything downstream carries K as an integer. Nothing recomputes it from a
float.
"""

import json
import math
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from numbers import Rational
from typing import Any

RETENTION_RATIO = "retention_ratio"
"""Key of the ratio in a request's body and in vLLM's ``mm_processor_kwargs``."""
RETENTION = "retention"
"""Our key in vLLM's ``media_io_kwargs``: a mapping with the ratio and the report of one request."""
RETENTION_REPORT = "retention_report"
"""Key of the request's :class:`RetentionReport`."""


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


@dataclass
class RetentionReport:
    """Compression of one request's videos: the processor fills it, the server reads it."""

    retention_ratio: float | None = None
    """Ratio in force; None before a video is processed."""
    num_tokens: list[int] = field(default_factory=list)
    """Tokens of each video before compression."""
    num_retained: list[int] = field(default_factory=list)
    """Tokens of each video after compression."""
    num_patches: list[int] = field(default_factory=list)
    """Patches of each video for which the vision tower may leave some out."""
    num_computed_patches: list[int] = field(default_factory=list)
    """Those of them that it computes."""

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
        response: dict[str, float | int] = {
            "retention_ratio": self.retention_ratio,
            "num_video_tokens": sum(self.num_tokens),
            "num_retained_video_tokens": sum(self.num_retained),
        }
        if self.num_patches:
            response["num_video_patches"] = sum(self.num_patches)
            response["num_computed_video_patches"] = sum(self.num_computed_patches)
        return response
