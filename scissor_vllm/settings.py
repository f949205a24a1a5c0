"""The operator's settings, which reach every process in vLLM's ``mm_processor_kwargs``.

Standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from scissor_vllm.retention import (
    AUTO,
    MAX_RETAINED_VIDEO_TOKENS,
    RETENTION,
    RETENTION_RATIO,
    check_retention_ratio,
    check_token_budget,
)

VIDEO_LOADER = "pyav"
"""Name of our video loader, for ``VLLM_VIDEO_LOADER_BACKEND``."""
FORMER_VIDEO_LOADER = "decord"
"""The loader's name in release 0.1, still accepted as ``VLLM_VIDEO_LOADER_BACKEND``."""


DEFAULT_FRAME_CACHE_GB = 1.0
DEFAULT_FEATURE_CACHE_GB = 2.0
"""Default sizes in GiB. Without vLLM's cache of processed inputs the defaults are 0."""

_GIB = 1024**3


@dataclass(frozen=True)
class CacheSizes:
    """Size limit of each cache in bytes."""

    frames: int
    """For decoded frames, in each API server process."""
    features: int
    """For the vision tower's tokens, in each worker's host memory."""

    @classmethod
    def of(cls, kwargs: Mapping[str, object] | None, mm_processor_cache_gb: float) -> CacheSizes:
        """Return the sizes that an engine's ``mm_processor_kwargs`` set, or the defaults.

        Raises:
            TypeError: a size is not a number.
            ValueError: a size is negative or not finite.
        """
        kwargs = kwargs or {}
        is_on = mm_processor_cache_gb > 0
        return cls(
            frames=_num_bytes(kwargs, VIDEO_FRAME_CACHE_GB, DEFAULT_FRAME_CACHE_GB * is_on),
            features=_num_bytes(kwargs, VIDEO_FEATURE_CACHE_GB, DEFAULT_FEATURE_CACHE_GB * is_on),
        )


def _num_bytes(kwargs: Mapping[str, object], name: str, default: float) -> int:
    return int(check_cache_gb(name, kwargs.get(name, default)) * _GIB)


def check_cache_gb(name: str, size: object) -> float:
    """Return the size in GiB if it is a finite number, 0 or more.

    Raises:
        TypeError: not a number.
        ValueError: negative or not finite.
    """
    if isinstance(size, bool) or not isinstance(size, (int, float)):
        raise TypeError(f"{name} must be a number of GiB, got {size!r}: 0 switches it off")
    if not (math.isfinite(size) and size >= 0):
        raise ValueError(f"{name} must be 0 or more GiB, got {size!r}: 0 switches it off")
    return float(size)


MIN_RETENTION_RATIO = "min_retention_ratio"
VIDEO_COMPRESSION = "video_compression"
MAX_VIDEO_TOKENS = "max_video_tokens"
AUTO_RETENTION_RATIO = "auto_retention_ratio"
TARGET_TTFT_MS = "target_ttft_ms"
ALLOW_COMPRESS_IMAGES = "allow_compress_images"
VIDEO_FRAME_CACHE_GB = "video_frame_cache_gb"
VIDEO_FEATURE_CACHE_GB = "video_feature_cache_gb"
DEFAULT_RETENTION_RATIO = 1.0
DEFAULT_MIN_RETENTION_RATIO = 0.01
DEFAULT_VIDEO_COMPRESSION = "average-linkage"
DEFAULT_MAX_VIDEO_TOKENS = 1 << 15
MAX_TARGET_TTFT_MS = 600_000


@dataclass(frozen=True)
class RetentionPolicy:
    """The operator's settings for the whole server."""

    default_ratio: float = DEFAULT_RETENTION_RATIO
    """Ratio of a request that names none."""
    min_ratio: float = DEFAULT_MIN_RETENTION_RATIO
    """Lowest ratio that a request may name."""
    method: str = DEFAULT_VIDEO_COMPRESSION
    """Name of the compression method, see ``scissor_vllm.compression``."""
    max_video_tokens: int = DEFAULT_MAX_VIDEO_TOKENS
    """Largest N of a compressed video. All N tokens are in GPU memory at once, however few are
    kept. Uncompressed videos are bounded by the model's length."""
    default_budget: int | None = None
    """Most tokens that the videos of a request keep together where it names no budget."""
    auto_bounds: tuple[float, float] | None = None
    """Lowest and highest ratio that the server chooses for a request with ``auto``; None if
    ``auto`` is not offered."""
    target_ttft_ms: int | None = None
    """Goal of that choice: milliseconds from a request's arrival to its first token."""
    is_auto_by_default: bool = False
    """Whether a request that names no ratio asks for ``auto``. ``default_ratio`` is then the
    highest."""
    allows_compress_images: bool = False
    """Whether a request may have runs of images compressed as the frames of a video."""

    def __post_init__(self) -> None:
        limit = self.max_video_tokens
        if isinstance(limit, bool) or not isinstance(limit, int):
            raise TypeError(f"{MAX_VIDEO_TOKENS} must be an int, got {limit!r}")
        if limit < 1:
            raise ValueError(f"{MAX_VIDEO_TOKENS} must be at least 1, got {limit}")
        check_retention_ratio(self.min_ratio)
        check_retention_ratio(self.default_ratio, minimum=self.min_ratio)
        if self.default_budget is not None:
            check_token_budget(self.default_budget)
        if not isinstance(self.allows_compress_images, bool):
            raise TypeError(
                f"{ALLOW_COMPRESS_IMAGES} must be true or false, got "
                f"{self.allows_compress_images!r}"
            )
        self._check_auto()

    def _check_auto(self) -> None:
        if (self.auto_bounds is None) != (self.target_ttft_ms is None):
            raise ValueError(
                f"{AUTO_RETENTION_RATIO} and {TARGET_TTFT_MS} go together, got "
                f"{self.auto_bounds} and {self.target_ttft_ms}: set both or none"
            )
        if self.auto_bounds is None:
            return
        lowest, highest = self.auto_bounds
        check_retention_ratio(lowest, minimum=self.min_ratio)
        check_retention_ratio(highest)
        if lowest > highest:
            raise ValueError(
                f"{AUTO_RETENTION_RATIO} must be MIN:MAX with MIN at most MAX, got "
                f"{lowest}:{highest}"
            )
        check_target_ttft_ms(self.target_ttft_ms)

    @classmethod
    def from_mm_processor_kwargs(cls, kwargs: Mapping[str, object] | None) -> RetentionPolicy:
        """Return the policy of an engine's ``mm_processor_kwargs``.

        No other part of vLLM's public configuration reaches both the API server's processor and
        every worker, offline and online.

        Raises:
            TypeError: a setting has the wrong type.
            ValueError: a setting is out of range, or settings contradict each other.
        """
        kwargs = kwargs or {}
        min_ratio = check_retention_ratio(
            kwargs.get(MIN_RETENTION_RATIO, DEFAULT_MIN_RETENTION_RATIO)
        )
        bounds = kwargs.get(AUTO_RETENTION_RATIO)
        auto_bounds = None if bounds is None else parse_auto_bounds(bounds)
        default = kwargs.get(RETENTION_RATIO, DEFAULT_RETENTION_RATIO)
        is_auto = default == AUTO
        if is_auto:
            if auto_bounds is None:
                raise ValueError(NO_AUTO)
            default = auto_bounds[1]
        ratio = check_retention_ratio(default)
        method = kwargs.get(VIDEO_COMPRESSION, DEFAULT_VIDEO_COMPRESSION)
        limit = kwargs.get(MAX_VIDEO_TOKENS, DEFAULT_MAX_VIDEO_TOKENS)
        budget = kwargs.get(MAX_RETAINED_VIDEO_TOKENS)
        target = kwargs.get(TARGET_TTFT_MS)
        return cls(
            ratio,
            min_ratio,
            str(method),
            limit,  # type: ignore[arg-type]
            budget,  # type: ignore[arg-type]
            auto_bounds,
            target,  # type: ignore[arg-type]
            is_auto,
            kwargs.get(ALLOW_COMPRESS_IMAGES, False),  # type: ignore[arg-type]
        )

    def check_num_tokens(self, num_tokens: int, ratio: float) -> None:
        """Raise ValueError if a video of N tokens is too long to be compressed to the ratio."""
        if ratio != 1.0 and num_tokens > self.max_video_tokens:
            raise ValueError(
                f"a video may have {self.max_video_tokens} tokens before compression on this "
                f"server, got {num_tokens}: send fewer frames, or have the operator raise "
                "--max-video-tokens"
            )

    def asks_for_auto(self, requested: object | None) -> bool:
        """Return whether the server chooses a request's ratio.

        Raises:
            ValueError: the request asks for it, and the operator set no bounds.
        """
        if requested is None:
            return self.is_auto_by_default
        if requested != AUTO:
            return False
        if self.auto_bounds is None:
            raise ValueError(NO_AUTO)
        return True

    def resolve(self, requested: object | None) -> float:
        """Return the ratio in force for a request: its own, checked, or the default."""
        if requested is None:
            return self.default_ratio
        return check_retention_ratio(requested, minimum=self.min_ratio)

    def resolve_budget(self, requested: object | None) -> int | None:
        """Return the budget in force for a request: its own, checked, or the default."""
        return self.default_budget if requested is None else check_token_budget(requested)


NO_AUTO = (
    f"{RETENTION_RATIO} {AUTO} is not offered by this server: send a number in (0, 1], or have the "
    "operator set --auto-retention-ratio and --target-ttft-ms"
)


def parse_auto_bounds(bounds: object) -> tuple[float, float]:
    """Return the lowest and the highest ratio of ``MIN:MAX``.

    Raises:
        TypeError: not a string.
        ValueError: not two ratios in (0, 1].
    """
    if not isinstance(bounds, str):
        raise TypeError(f"{AUTO_RETENTION_RATIO} must be a string MIN:MAX, got {bounds!r}")
    lowest, _, highest = bounds.partition(":")
    try:
        return check_retention_ratio(float(lowest)), check_retention_ratio(float(highest))
    except ValueError as error:
        raise ValueError(
            f"{AUTO_RETENTION_RATIO} must be MIN:MAX, two ratios above 0 and at most 1, got "
            f"{bounds[:64]!r}: write 0.1:1.0"
        ) from error


def check_target_ttft_ms(target: object) -> int:
    """Return the target if it is a valid number of milliseconds.

    Raises:
        TypeError: not an int.
        ValueError: out of range.
    """
    if isinstance(target, bool) or not isinstance(target, int):
        raise TypeError(f"{TARGET_TTFT_MS} must be an int of milliseconds, got {target!r}")
    if not 1 <= target <= MAX_TARGET_TTFT_MS:
        raise ValueError(
            f"{TARGET_TTFT_MS} must be from 1 to {MAX_TARGET_TTFT_MS} milliseconds, got {target}"
        )
    return target


TOWER_MERGING_MAX_RATIO = "tower_merging_max_ratio"
TOWER_MERGING_THRESHOLD = "tower_merging_threshold"
DEFAULT_TOWER_MERGING_MAX_RATIO = 0.1
"""Of our command, where the model's tower can merge; without it nothing is merged."""
DEFAULT_TOWER_MERGING_THRESHOLD = 40.0


@dataclass(frozen=True)
class TowerMerging:
    """When the vision tower skips patches that hardly change between frames."""

    max_ratio: float = 0.0
    """Highest ratio of a request whose patches are merged; 0 switches merging off."""
    threshold: float = DEFAULT_TOWER_MERGING_THRESHOLD
    """Largest mean squared difference of 8-bit pixels at which patches count as equal."""

    @classmethod
    def from_mm_processor_kwargs(cls, kwargs: Mapping[str, object] | None) -> TowerMerging:
        """Return the settings of an engine's ``mm_processor_kwargs``.

        Raises:
            TypeError: a setting is not a number.
            ValueError: the ratio is not in [0, 1), or the threshold not above 0 and finite.
        """
        kwargs = kwargs or {}
        ratio = _check_tower_ratio(TOWER_MERGING_MAX_RATIO, kwargs)
        threshold = _check_number(
            TOWER_MERGING_THRESHOLD,
            kwargs.get(TOWER_MERGING_THRESHOLD, DEFAULT_TOWER_MERGING_THRESHOLD),
        )
        if not (threshold > 0 and math.isfinite(threshold)):
            raise ValueError(
                f"{TOWER_MERGING_THRESHOLD} must be above 0, got {threshold}: "
                f"{TOWER_MERGING_MAX_RATIO} 0 switches merging off"
            )
        return cls(ratio, threshold)

    def applies_to(self, retention_ratio: float) -> bool:
        """Return whether patches are merged at this ratio."""
        return retention_ratio <= self.max_ratio


TOWER_FP8_MAX_RATIO = "tower_fp8_max_ratio"
DEFAULT_TOWER_FP8_MAX_RATIO = 0.1
"""Of our command, where the tower's MLPs were measured in FP8; without it they never are."""


@dataclass(frozen=True)
class TowerFP8:
    """When the vision tower's MLPs are computed in FP8."""

    max_ratio: float = 0.0
    """Highest ratio of a request whose videos have it; 0 switches it off."""

    @classmethod
    def from_mm_processor_kwargs(cls, kwargs: Mapping[str, object] | None) -> TowerFP8:
        """Return the setting of an engine's ``mm_processor_kwargs``.

        Raises:
            TypeError: it is not a number.
            ValueError: it is not in [0, 1).
        """
        return cls(_check_tower_ratio(TOWER_FP8_MAX_RATIO, kwargs or {}))

    def applies_to(self, retention_ratio: float) -> bool:
        """Return whether a video of this ratio has it."""
        return retention_ratio <= self.max_ratio


def _check_tower_ratio(name: str, kwargs: Mapping[str, object]) -> float:
    ratio = _check_number(name, kwargs.get(name, 0.0))
    if not 0 <= ratio < 1:
        raise ValueError(
            f"{name} must be 0 or more and below 1, got {ratio}: 0 switches it off, and "
            "uncompressed videos are always encoded exactly"
        )
    return ratio


def _check_number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return float(value)


_KEY_SIMILARITY = 0.85

REQUEST_KEYS = frozenset({RETENTION_RATIO, MAX_RETAINED_VIDEO_TOKENS})
"""Our keys that a request may name too."""

OWN_KEYS = REQUEST_KEYS | frozenset(
    {
        MIN_RETENTION_RATIO,
        VIDEO_COMPRESSION,
        MAX_VIDEO_TOKENS,
        AUTO_RETENTION_RATIO,
        TARGET_TTFT_MS,
        ALLOW_COMPRESS_IMAGES,
        VIDEO_FRAME_CACHE_GB,
        VIDEO_FEATURE_CACHE_GB,
        TOWER_MERGING_MAX_RATIO,
        TOWER_MERGING_THRESHOLD,
        TOWER_FP8_MAX_RATIO,
    }
)
"""Our keys in ``mm_processor_kwargs``."""


def check_keys(
    kwargs: Mapping[str, object], compresses_video: bool, models: Iterable[str] = ()
) -> None:
    """Check our keys among an engine's ``mm_processor_kwargs``.

    Args:
        kwargs: the engine's ``mm_processor_kwargs``.
        compresses_video: whether the plugin supports the model.
        models: supported architectures, for the message.

    Raises:
        ValueError: a key is a misspelling of ours, or one of ours is set for an unsupported model.
    """
    for key in kwargs:
        close = get_close_matches(key.lower().replace("-", "_"), OWN_KEYS, 1, _KEY_SIMILARITY)
        if close and key not in OWN_KEYS:
            raise ValueError(
                f"{key} is not a setting in --mm-processor-kwargs: write {close[0]}, or leave it "
                "out"
            )
    own = sorted(OWN_KEYS & kwargs.keys())
    if own and not compresses_video:
        raise ValueError(
            f"{', '.join(own)} cannot be set for this model: videos are compressed for "
            f"{', '.join(models)} only; leave it out"
        )


def without_own_keys(kwargs: Mapping[str, object]) -> dict[str, object]:
    """Return a copy of the kwargs without our keys, for the Hugging Face processor."""
    return {key: value for key, value in kwargs.items() if key not in OWN_KEYS and key != RETENTION}
