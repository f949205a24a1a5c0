"""A picture of a compressed video: frames, and the kept token of each input token."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from scissor_vllm.compression.members import representative_members

if TYPE_CHECKING:
    import torch

    from scissor_vllm.compression import CompressedTokens

DROPPED = np.iinfo(np.uint16).max
"""Row of a dropped token in a page's arrays."""
MAX_TOKENS = int(DROPPED)
"""Most tokens of a drawn video: rows must differ from DROPPED."""
MAX_FRAMES = 256
"""Most frames of a drawn video."""
FRAME_SIDE = 256
"""Longest side of a drawn frame in pixels."""
_JPEG_QUALITY = 80

_GOLDEN = 0.6180339887498949
_TONES = ((0.75, 0.95), (0.95, 0.75), (0.5, 1.0), (0.85, 0.55))
"""Saturation and value, in turn."""


@dataclass(frozen=True)
class Grouping:
    """The kept token of each of a video's N tokens, at one ratio."""

    retention_ratio: float
    method: str
    assignment: npt.NDArray[np.int64]
    """(N,): row of the kept token, -1 for a dropped token."""
    representatives: npt.NDArray[np.int64]
    """(K,): the member nearest to each kept token, 0..N-1."""
    similarity_threshold: float | None = None
    """None if the method has or reports none."""

    @property
    def num_retained(self) -> int:
        """K."""
        return len(self.representatives)


@dataclass(frozen=True)
class Picture:
    """A drawn video; tokens are in the order of frames, rows and columns."""

    name: str
    """Of the video."""
    frames: npt.NDArray[np.uint8]
    """(T, H, W, 3) RGB; the first frame of each temporal patch."""
    rows: int
    """Of a frame's tokens."""
    columns: int
    groupings: tuple[Grouping, ...]
    times: tuple[float, ...] | None = None
    """Seconds at which the frames are shown, if known (see `times_of`)."""

    def __post_init__(self) -> None:
        check_size(len(self.frames), self.num_tokens)
        for grouping in self.groupings:
            if len(grouping.assignment) != self.num_tokens:
                raise ValueError(
                    f"a picture of {len(self.frames)} frames of {self.rows} x {self.columns} "
                    f"tokens needs {self.num_tokens} assignments, got {len(grouping.assignment)}: "
                    "give those of the same video"
                )

    @property
    def num_tokens(self) -> int:
        """N = T*P."""
        return len(self.frames) * self.rows * self.columns

    def cells(self, grouping: Grouping) -> npt.NDArray[np.int64]:
        """Return the row of each token by position, (T, rows, columns)."""
        return grouping.assignment.reshape(len(self.frames), self.rows, self.columns)

    def label(self, frame: int) -> str:
        """Return a frame's label: its time or its number."""
        return f"frame {frame}" if self.times is None else f"{self.times[frame]:.2f} s"

    def as_json(self) -> dict[str, Any]:
        """Return a page's data: frames as JPEG data URLs, rows as base64 of uint16."""
        _, height, width, _ = self.frames.shape
        return {
            "name": self.name,
            "frames": [_jpeg(frame) for frame in self.frames],
            "times": self.times,
            "width": width,
            "height": height,
            "rows": self.rows,
            "columns": self.columns,
            "groupings": [
                {
                    "retention_ratio": grouping.retention_ratio,
                    "method": grouping.method,
                    "num_retained": grouping.num_retained,
                    "similarity_threshold": grouping.similarity_threshold,
                    "assignment": _compact(grouping.assignment),
                    "representatives": _compact(grouping.representatives),
                }
                for grouping in self.groupings
            ],
        }


def check_size(num_frames: int, num_tokens: int) -> None:
    """Raise ValueError if a video is too long to be drawn."""
    for number, most, unit in (
        (num_frames, MAX_FRAMES, "frames"),
        (num_tokens, MAX_TOKENS, "tokens"),
    ):
        if number > most:
            raise ValueError(
                f"a video of at most {most} {unit} is drawn, got {number}: sample fewer frames"
            )


def grouping_of(
    retention_ratio: float, method: str, tokens: torch.Tensor, compressed: CompressedTokens
) -> Grouping:
    """Return the grouping of tokens (T, P, D)."""
    return Grouping(
        retention_ratio,
        method,
        compressed.assignment.cpu().numpy(),
        representative_members(tokens, compressed).cpu().numpy(),
        compressed.similarity_threshold,
    )


def all_kept(method: str, num_tokens: int) -> Grouping:
    """Return the grouping at ratio 1.0, with a kept token for each token."""
    itself = np.arange(num_tokens)
    return Grouping(1.0, method, itself, itself)


def drawn_frames(frames: Any, num_positions: int) -> npt.NDArray[np.uint8]:
    """Return the frame of each temporal position, (T, h, w, 3), no side above ``FRAME_SIDE``.

    Args:
        frames: uint8 RGB (num_sampled, H, W, 3), an array, a tensor or a sequence.
        num_positions: T; of several frames at one position (a temporal patch) the first is shown.
    """
    per_position = -(-len(frames) // num_positions)
    shown = [frames[min(i * per_position, len(frames) - 1)] for i in range(num_positions)]
    # Some decoders return frames on a device.
    arrays = [np.asarray(frame.cpu() if hasattr(frame, "cpu") else frame) for frame in shown]
    pictures = [Image.fromarray(array) for array in arrays]
    for picture in pictures:
        picture.thumbnail((FRAME_SIDE, FRAME_SIDE))
    return np.stack([np.asarray(picture) for picture in pictures])


def times_of(metadata: Mapping[str, Any], num_positions: int) -> tuple[float, ...] | None:
    """Return the second at which each position begins, by a loader's metadata, None if unknown.

    Models get the same time: a frame's number over the file's mean rate. With a variable rate it
    differs from the presentation time.
    """
    fps, indices = metadata.get("fps"), metadata.get("frames_indices")
    if not fps or indices is None or len(indices) == 0:
        return None
    per_position = -(-len(indices) // num_positions)
    last = len(indices) - 1
    return tuple(float(indices[min(i * per_position, last)] / fps) for i in range(num_positions))


def colors(num_rows: int) -> npt.NDArray[np.uint8]:
    """Return a color for each kept token, (K, 3) RGB; page/picture.js computes the same.

    Consecutive tokens have distant hues.
    """
    row = np.arange(num_rows)
    hue = (row * _GOLDEN % 1.0) * 6.0
    saturation, value = np.array(_TONES)[row % len(_TONES)].T
    channels = []
    for offset in (5, 3, 1):
        k = (offset + hue) % 6.0
        channels.append(value - value * saturation * np.clip(np.minimum(k, 4 - k), 0, 1))
    return np.rint(np.stack(channels, axis=1) * 255).astype(np.uint8)


def in_frames(cells: npt.NDArray[np.int64], num_rows: int) -> npt.NDArray[np.int64]:
    """Return the number of members of each kept token in each frame, (K, T)."""
    num_frames = len(cells)
    counts = np.zeros((num_rows, num_frames), dtype=np.int64)
    for frame, cell in enumerate(cells):
        counts[:, frame] = np.bincount(cell[cell >= 0], minlength=num_rows)
    return counts


def strip_rows(counts: npt.NDArray[np.int64], most: int) -> npt.NDArray[np.int64]:
    """Return the kept tokens that a strip shows, by first frame, then size.

    Of more than ``most`` an evenly spaced sample in that order is shown. So a frame's share of the
    strip is its share of the kept tokens. page/picture.js computes the same.

    Args:
        counts: (K, T), members of each kept token in each frame.
        most: largest number of kept tokens to show.

    Returns:
        (min(K, most),): indices of kept tokens.
    """
    first = (counts > 0).argmax(axis=1)
    ordered = np.lexsort((-counts.sum(axis=1), first))
    num_shown = min(len(ordered), most)
    return ordered[(2 * np.arange(num_shown) + 1) * len(ordered) // (2 * max(num_shown, 1))]


def _compact(rows: npt.NDArray[np.int64]) -> str:
    """Return rows as base64 of little-endian uint16, ``DROPPED`` for -1."""
    return base64.b64encode(np.where(rows < 0, DROPPED, rows).astype("<u2").tobytes()).decode()


def _jpeg(frame: npt.NDArray[np.uint8]) -> str:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG", quality=_JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
