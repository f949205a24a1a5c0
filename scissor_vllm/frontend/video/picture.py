"""A decoded picture as the ffmpeg command shows it: RGB, upright."""

from __future__ import annotations

import struct
from fractions import Fraction
from math import atan2, degrees, hypot
from typing import Any

import av
import av.filter
import numpy as np
import numpy.typing as npt
from av.sidedata.sidedata import SideDataContainer
from av.sidedata.sidedata import Type as SideDataType

_TURNS_TOLERANCE = 1.0
# What a picture says of its colors, in the order in which it is left out: the first two do not
# change RGB here. Their value for what is not known.
_NAMES_OF_COLORS = ("color_trc", "color_primaries", "colorspace")
_UNSPECIFIED = 2


def _unnamed_type(cls: Any, value: int) -> Any:
    """A type of side data that PyAV has no name for.

    FFmpeg 8 attaches types that PyAV 18 does not know, such as the EXIF data of motion JPEG, and
    PyAV then refuses to list any of a picture's. May go when PyAV lists them.
    """
    member = object.__new__(cls)
    member._name_, member._value_ = f"TYPE_{value}", value
    return member


SideDataType._missing_ = classmethod(_unnamed_type)  # type: ignore[method-assign, assignment]


class PictureConverter:
    """Converts the pictures of one video, by the filters that the ffmpeg command uses.

    FFmpeg's scaler refuses some pictures without these filters, interlaced ones for example.
    Pictures of another size, as of a call or of a window that was resized, get that of the first.
    """

    def __init__(self, time_base: Fraction) -> None:
        self._time_base = time_base
        self._made_for: tuple[object, ...] | None = None
        self.num_unnamed = 0
        """How many of ``_NAMES_OF_COLORS`` are left out."""
        self._graph: Any = None
        self._size: tuple[int, int] | None = None

    def __call__(self, picture: Any) -> npt.NDArray[np.uint8]:
        """RGB (height, width, 3), valid until the next call.

        Raises:
            av.FFmpegError: the picture cannot be converted.
        """
        turns = upright_filters(_display_matrix(picture))
        colors = (int(picture.colorspace), int(picture.color_trc), int(picture.color_primaries))
        made_for = (picture.width, picture.height, picture.format.name, colors, turns)
        if made_for != self._made_for:
            self._graph = self._make_graph(picture, turns)
            self._made_for, self.num_unnamed = made_for, 0
        rgb = self._converted(picture, turns)
        self._size = (rgb.width, rgb.height)
        plane = rgb.planes[0]
        rows = np.frombuffer(plane, dtype=np.uint8).reshape(-1, plane.line_size)
        return rows[: rgb.height, : rgb.width * 3].reshape(rgb.height, rgb.width, 3)

    def _converted(self, picture: Any, turns: tuple[tuple[str, str], ...]) -> Any:
        """The picture in RGB.

        FFmpeg's scaler refuses matrices and transfer functions that it does not know, such as
        YCgCo's or the constant luminance of BT.2020. Such a picture is converted as one that names
        none, as by FFmpeg before version 8.

        Raises:
            av.FFmpegError: it cannot be converted.
        """
        while True:
            for name in _NAMES_OF_COLORS[: self.num_unnamed]:
                setattr(picture, name, _UNSPECIFIED)
            try:
                self._graph.vpush(picture)
                return self._graph.vpull()
            except av.FFmpegError:
                if self.num_unnamed == len(_NAMES_OF_COLORS):
                    self._made_for = None
                    raise
                self.num_unnamed += 1
                # One that failed stays failed.
                self._graph = self._make_graph(picture, turns)

    def _make_graph(self, picture: Any, turns: tuple[tuple[str, str], ...]) -> Any:
        graph = av.filter.Graph()
        graph.threads = 1
        source = graph.add_buffer(
            width=picture.width,
            height=picture.height,
            format=picture.format,
            time_base=self._time_base,
        )
        nodes = [source, *(graph.add(name, options) for name, options in turns)]
        width, height = self._size or ("iw", "ih")
        nodes += [
            graph.add("scale", f"{width}:{height}:flags=bicubic"),
            graph.add("format", "rgb24"),
        ]
        graph.link_nodes(*nodes, graph.add("buffersink")).configure()
        return graph


def is_converted_as_named(picture: Any, time_base: Fraction) -> bool:
    """Whether FFmpeg's scaler knows the colors that a picture names; it may lose their names."""
    converter = PictureConverter(time_base)
    try:
        converter(picture)
    except av.FFmpegError:
        return False
    return converter.num_unnamed == 0


def upright_filters(matrix: tuple[int, ...] | None) -> tuple[tuple[str, str], ...]:
    """FFmpeg's filters, with their options, that turn a picture as its display matrix asks.

    As the ffmpeg command's autorotation does.

    Args:
        matrix: nine numbers, rows first, in 16.16 fixed point (the last column in 2.30).
    """
    if matrix is None:
        return ()
    widths = hypot(matrix[0], matrix[3]), hypot(matrix[1], matrix[4])
    if 0 in widths:
        return ()
    angle = degrees(atan2(matrix[1] / widths[1], matrix[0] / widths[0])) % 360
    turns = round(angle / 90) % 4
    if abs((angle - 90 * turns + 180) % 360 - 180) >= _TURNS_TOLERANCE:
        return (("rotate", f"angle={round(angle)}*PI/180"),)
    if turns == 1:
        return (("transpose", "dir=cclock_flip" if matrix[3] > 0 else "dir=clock"),)
    if turns == 3:
        return (("transpose", "dir=clock_flip" if matrix[3] < 0 else "dir=cclock"),)
    if turns == 2:
        flips = (("hflip", ""),) if matrix[0] < 0 else ()
        return flips + ((("vflip", ""),) if matrix[4] < 0 else ())
    return (("vflip", ""),) if matrix[4] < 0 else ()


def _display_matrix(picture: Any) -> tuple[int, ...] | None:
    # A picture's own ``side_data`` and the picture refer to each other: until the next garbage
    # collection it would hold its memory.
    data = SideDataContainer(picture).get(SideDataType.DISPLAYMATRIX)  # type: ignore[call-arg]
    return None if data is None else struct.unpack("=9i", bytes(data)[:36])
