"""How many video tokens are kept: the ratio's rules, and the one place that turns it into K.

Standard library only. Everything downstream carries K as an integer; nothing computes it again
from a float.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from numbers import Rational
from typing import Any

RETENTION_RATIO = "retention_ratio"
"""Key of the ratio in a request's body and in vLLM's ``mm_processor_kwargs``."""
MIN_RETENTION_RATIO = "min_retention_ratio"
VIDEO_COMPRESSION = "video_compression"
MAX_VIDEO_TOKENS = "max_video_tokens"
VIDEO_ENCODER_DTYPE = "video_encoder_dtype"
VIDEO_FRAME_CACHE_GB = "video_frame_cache_gb"
VIDEO_FEATURE_CACHE_GB = "video_feature_cache_gb"
KEEP_VIDEO_POSITIONS = {"mrope_section": [1, 1, 1]}
"""vLLM's ``hf_overrides`` with which a model of 1-D positions keeps those of a video's tokens; see
``scissor_vllm.models.frames``."""
RETENTION = "retention"
"""Our key in vLLM's ``media_io_kwargs``: a mapping with the two below, of one HTTP request."""
RETENTION_REPORT = "retention_report"
"""Key of the request's :class:`RetentionReport`."""

DEFAULT_RETENTION_RATIO = 1.0
DEFAULT_MIN_RETENTION_RATIO = 0.01
DEFAULT_VIDEO_COMPRESSION = "scc-windows"
DEFAULT_MAX_VIDEO_TOKENS = 1 << 15
ENCODER_DTYPES = ("auto", "fp8")


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


def _exact_ratio(ratio: object) -> Fraction:
    """Return the ratio as the exact fraction that its decimal notation shows."""
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float, Decimal, Rational)):
        raise TypeError(
            f"{RETENTION_RATIO} must be a number in (0, 1], the fraction of video tokens to keep, "
            f"got {ratio!r}"
        )
    if isinstance(ratio, (float, Decimal)) and not math.isfinite(ratio):
        raise ValueError(_out_of_range(ratio))
    exact = Fraction(repr(float(ratio))) if isinstance(ratio, float) else Fraction(ratio)
    if not 0 < exact <= 1:
        raise ValueError(_out_of_range(ratio))
    return exact


def _out_of_range(ratio: object) -> str:
    return (
        f"{RETENTION_RATIO} must be above 0 and at most 1, got {ratio!r}: it is the fraction of "
        "video tokens to keep, 1.0 keeps all"
    )


@dataclass(frozen=True)
class RetentionPolicy:
    """What the operator set for the whole server."""

    default_ratio: float = DEFAULT_RETENTION_RATIO
    """Ratio of a request that names none."""
    min_ratio: float = DEFAULT_MIN_RETENTION_RATIO
    """A request below this is refused."""
    method: str = DEFAULT_VIDEO_COMPRESSION
    """Name of the compressor, see ``scissor_vllm.compression``."""
    max_video_tokens: int = DEFAULT_MAX_VIDEO_TOKENS
    """Most tokens of a video that is compressed, N. All of them are in the GPU's memory at once,
    however few are kept; what is not compressed is bounded by the model's length."""
    encoder_dtype: str = ENCODER_DTYPES[0]
    """Of the vision tower's matrix products for videos that are compressed: "auto" for the model's,
    or "fp8"."""

    def __post_init__(self) -> None:
        if self.encoder_dtype not in ENCODER_DTYPES:
            raise ValueError(
                f"{VIDEO_ENCODER_DTYPE} must be one of {', '.join(ENCODER_DTYPES)}, got "
                f"{self.encoder_dtype!r}: leave it out for the model's own"
            )
        limit = self.max_video_tokens
        if isinstance(limit, bool) or not isinstance(limit, int):
            raise TypeError(f"{MAX_VIDEO_TOKENS} must be an int, got {limit!r}")
        if limit < 1:
            raise ValueError(f"{MAX_VIDEO_TOKENS} must be at least 1, got {limit}")
        check_retention_ratio(self.min_ratio)
        check_retention_ratio(self.default_ratio, minimum=self.min_ratio)

    @classmethod
    def from_mm_processor_kwargs(cls, kwargs: Mapping[str, object] | None) -> "RetentionPolicy":
        """Return the policy that an engine's ``mm_processor_kwargs`` hold.

        They are the one part of vLLM's public configuration that reaches the API server's
        processor and every worker alike, offline and online.
        """
        kwargs = kwargs or {}
        min_ratio = check_retention_ratio(
            kwargs.get(MIN_RETENTION_RATIO, DEFAULT_MIN_RETENTION_RATIO)
        )
        ratio = check_retention_ratio(kwargs.get(RETENTION_RATIO, DEFAULT_RETENTION_RATIO))
        method = kwargs.get(VIDEO_COMPRESSION, DEFAULT_VIDEO_COMPRESSION)
        limit = kwargs.get(MAX_VIDEO_TOKENS, DEFAULT_MAX_VIDEO_TOKENS)
        dtype = str(kwargs.get(VIDEO_ENCODER_DTYPE, ENCODER_DTYPES[0]))
        return cls(ratio, min_ratio, str(method), limit, dtype)  # type: ignore[arg-type]

    def check_num_tokens(self, num_tokens: int, ratio: float) -> None:
        """Raise ValueError if a video of N tokens is too long to be compressed to the ratio."""
        if ratio != 1.0 and num_tokens > self.max_video_tokens:
            raise ValueError(
                f"a video may have {self.max_video_tokens} tokens before compression on this "
                f"server, got {num_tokens}: send fewer frames, or have the operator raise "
                "--max-video-tokens"
            )

    def resolve(self, requested: object | None) -> float:
        """Return the ratio in force for a request: its own, checked, or the default."""
        if requested is None:
            return self.default_ratio
        return check_retention_ratio(requested, minimum=self.min_ratio)


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


def without_own_keys(kwargs: Mapping[str, object]) -> dict[str, object]:
    """Return the kwargs that belong to the Hugging Face processor, ours taken out."""
    own = {
        RETENTION_RATIO,
        MIN_RETENTION_RATIO,
        VIDEO_COMPRESSION,
        MAX_VIDEO_TOKENS,
        VIDEO_ENCODER_DTYPE,
        VIDEO_FRAME_CACHE_GB,
        VIDEO_FEATURE_CACHE_GB,
    }
    return {key: value for key, value in kwargs.items() if key not in own}
