"""A picture at one ratio as PNG: frames with their tokens' cells, and a strip over time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from scissor_vllm.show.picture import Grouping, Picture, colors, in_frames, strip_rows
from scissor_vllm.show.text import caption, strip_caption

FRAMES_A_LINE = 8
STRIP_ROWS = 160
"""Most kept tokens in the strip."""

_FRAME_WIDTH = 200
_CELL = 6
"""Smallest side of a cell in pixels."""
_GAP, _LABEL, _STRIP_ROW = 10, 22, 3
_OPACITY, _OPACITY_ALONE = 0.62, 0.30
_DROPPED_COLOR = (0, 0, 0)
_INK, _PAPER = (26, 26, 26), (255, 255, 255)


def save_png(picture: Picture, grouping: Grouping, path: Path) -> None:
    """Write the picture at a grouping's ratio atomically."""
    unfinished = path.with_name(path.name + ".part")
    draw(picture, grouping).save(unfinished, "PNG")
    unfinished.replace(path)


def draw(picture: Picture, grouping: Grouping) -> Image.Image:
    """Return the picture at a grouping's ratio."""
    frames = drawn_cells(picture, grouping)
    strip = drawn_strip(picture, grouping)
    num_frames, height, width, _ = frames.shape
    a_line = min(num_frames, FRAMES_A_LINE)
    num_lines = -(-num_frames // a_line)
    lines = caption(picture, grouping)
    font = ImageFont.load_default(15)
    text_width = max(int(font.getlength(line)) for line in lines)
    total_width = max(_GAP + a_line * (width + _GAP), text_width + 2 * _GAP)
    strip = strip.resize((total_width - 2 * _GAP, strip.height), Image.Resampling.NEAREST)
    top = _GAP + len(lines) * _LABEL
    below = top + num_lines * (height + _LABEL + _GAP)
    total = Image.new("RGB", (total_width, below + 2 * _LABEL + strip.height + _GAP), _PAPER)
    pen = ImageDraw.Draw(total)
    for number, line in enumerate(lines):
        pen.text((_GAP, _GAP + number * _LABEL), line, _INK, font)
    for number, frame in enumerate(frames):
        line, place = divmod(number, a_line)
        x, y = _GAP + place * (width + _GAP), top + line * (height + _LABEL + _GAP)
        pen.text((x, y), picture.label(number), _INK, font)
        total.paste(Image.fromarray(frame), (x, y + _LABEL))
    pen.text((_GAP, below), strip_caption(grouping, STRIP_ROWS), _INK, font)
    total.paste(strip, (_GAP, below + _LABEL + 4))
    return total


def drawn_cells(picture: Picture, grouping: Grouping) -> npt.NDArray[np.uint8]:
    """Return frames with the cells of their tokens colored, (T, h, w, 3).

    Borders separate cells of different kept tokens. Dots mark representatives.
    """
    _, height, width, _ = picture.frames.shape
    cell_width = max(_CELL, _FRAME_WIDTH // picture.columns)
    wanted = cell_width * picture.columns * height / width
    cell_height = max(_CELL, round(wanted / picture.rows))
    size = (cell_width * picture.columns, cell_height * picture.rows)
    cells = picture.cells(grouping)
    palette = np.vstack([colors(grouping.num_retained), [_DROPPED_COLOR]])
    members = np.bincount(cells[cells >= 0], minlength=grouping.num_retained + 1)
    opacity = np.where(members > 1, _OPACITY, _OPACITY_ALONE)
    opacity[-1] = _OPACITY
    drawn = []
    for frame, cell in zip(picture.frames, cells, strict=True):
        base = np.asarray(Image.fromarray(frame).resize(size), dtype=np.float32)
        pixels = cell.repeat(cell_height, axis=0).repeat(cell_width, axis=1)
        share = opacity[pixels][..., None]
        mixed = base * (1 - share) + palette[pixels] * share
        border = np.zeros(pixels.shape, dtype=bool)
        border[:, 1:] |= pixels[:, 1:] != pixels[:, :-1]
        border[1:] |= pixels[1:] != pixels[:-1]
        mixed[border] *= 0.45
        drawn.append(mixed.astype(np.uint8))
    per_frame = picture.rows * picture.columns
    pictures = [Image.fromarray(frame_picture) for frame_picture in drawn]
    radius = max(1.5, min(cell_width, cell_height) * 0.22)
    for token in grouping.representatives:
        number, place = divmod(int(token), per_frame)
        row, column = divmod(place, picture.columns)
        x, y = (column + 0.5) * cell_width, (row + 0.5) * cell_height
        box = (x - radius, y - radius, x + radius, y + radius)
        ImageDraw.Draw(pictures[number]).ellipse(box, fill=_PAPER, outline=_INK)
    return np.stack([np.asarray(frame_picture) for frame_picture in pictures])


def drawn_strip(picture: Picture, grouping: Grouping) -> Image.Image:
    """Return a line for each kept token and a column for each frame; color shows the count."""
    counts = in_frames(picture.cells(grouping), grouping.num_retained)
    rows = strip_rows(counts, STRIP_ROWS)
    share = counts[rows] / (picture.rows * picture.columns)
    # The square root keeps small shares visible.
    share = np.where(share > 0, 0.5 + 0.5 * np.sqrt(share), 0)[..., None]
    paper = np.array(_PAPER)
    mixed = paper * (1 - share) + colors(grouping.num_retained)[rows][:, None] * share
    return Image.fromarray(mixed.astype(np.uint8).repeat(_STRIP_ROW, axis=0))
