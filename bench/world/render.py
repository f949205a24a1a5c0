"""Pictures of scenes, painted many at a time on any device, and what each part of them shows.

Only arithmetic and look-ups in tables that are made on the CPU, so that every device paints the
same picture within rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812

from bench.world.scene import (
    COLOURS,
    FRAME_SIZE,
    GLYPHS,
    PLACES,
    SHAPES,
    Place,
    Scene,
    Thing,
)

NUM_CLASSES = len(PLACES) + len(SHAPES) * len(COLOURS) + len(GLYPHS)
"""The classes of `cover`: places, things by shape and colour, signs by glyph."""

_MIN_COVER = 0.25
_MAX_SCENES = 64
"""Scenes painted at once: bounds the memory of the pictures in between, about 10 MB a scene."""

_TABLE = 512
_NOISE_STEP = 104729
"""Tells the noise of one frame from that of the next."""
_CANVAS = 256
"""Pixels of a place that the camera may pan over."""
_PATCH = 64
"""Pixels around a thing's centre that are painted; holds the largest thing, its edge and a step."""
_ATLAS = 64
_REACH = 1.15
"""What the atlas shows of a figure whose outline lies within the unit circle."""

# A place is its colour plus fields of random numbers from -0.5 to 0.5, each in a colour of its own.
# A field is drawn on a lattice of (rows, columns) and enlarged.
_FIELDS = {
    "hills": (5, 5),
    "blots": (20, 20),
    "grain": (128, 128),
    "waves": (72, 8),
    "trunks": (5, 56),
    "dunes": (14, 4),
    "blocks": (20, 16),
    "lights": (88, 88),
}
_BASES = {
    "sea": (62, 122, 140),
    "forest": (62, 84, 48),
    "desert": (190, 160, 112),
    "snow": (188, 196, 208),
    "night": (44, 44, 74),
    "city": (122, 112, 112),
}
_TONES: dict[str, dict[str, tuple[float, float, float]]] = {
    "sea": {"hills": (20, 30, 30), "waves": (46, 52, 52), "grain": (16, 16, 16)},
    "forest": {"blots": (34, 44, 24), "trunks": (40, 34, 24), "grain": (26, 32, 20)},
    "desert": {"hills": (24, 20, 14), "dunes": (56, 50, 40), "grain": (14, 13, 11)},
    "snow": {"hills": (36, 32, 26), "blots": (14, 13, 11), "grain": (12, 12, 12)},
    "night": {"hills": (16, 16, 36), "grain": (8, 8, 10), "lights": (120, 120, 104)},
    "city": {"hills": (16, 16, 16), "blocks": (76, 72, 70), "grain": (18, 18, 18)},
}
_COLOURS = {
    "red": (216, 36, 40),
    "green": (36, 176, 64),
    "blue": (36, 76, 228),
    "yellow": (248, 224, 48),
    "purple": (152, 44, 196),
    "orange": (248, 132, 20),
    "white": (248, 248, 248),
    "black": (16, 16, 16),
    "plate": (150, 226, 226),
}
_DARK_EDGE, _LIGHT_EDGE = (24, 24, 28), (206, 206, 206)
_EDGES = {
    colour: _LIGHT_EDGE if colour in ("blue", "purple", "black") else _DARK_EDGE
    for colour in _COLOURS
}
_INK = (20, 30, 60)

_FIGURES = (*SHAPES, *GLYPHS)
_DOT = 0.185
"""Distance of a glyph's dots, in half sizes of its sign."""
_LIGHT_SHARE = 0.48

_FONT = {
    "0": "01110 10001 10001 10001 10001 10001 01110",
    "1": "00100 01100 00100 00100 00100 00100 01110",
    "2": "01110 10001 00001 00110 01000 10000 11111",
    "3": "11110 00001 00001 01110 00001 00001 11110",
    "4": "00010 00110 01010 10010 11111 00010 00010",
    "5": "11111 10000 11110 00001 00001 10001 01110",
    "6": "00110 01000 10000 11110 10001 10001 01110",
    "7": "11111 00001 00010 00100 01000 01000 01000",
    "8": "01110 10001 10001 01110 10001 10001 01110",
    "9": "01110 10001 10001 01111 00001 00010 01100",
    "e": "11111 10000 10000 11110 10000 10000 11111",
    "f": "11111 10000 10000 11110 10000 10000 10000",
    "h": "10001 10001 10001 11111 10001 10001 10001",
    "k": "10001 10010 10100 11000 10100 10010 10001",
    "l": "10000 10000 10000 10000 10000 10000 11111",
    "p": "11110 10001 10001 11110 10000 10000 10000",
    "t": "11111 00100 00100 00100 00100 00100 00100",
    "u": "10001 10001 10001 10001 10001 10001 01110",
    "x": "10001 10001 01010 00100 01010 10001 10001",
    "y": "10001 10001 01010 00100 00100 00100 00100",
}
"""Glyphs as seven rows of five dots."""


_CLIP = np.dtype([("cut", "i8"), ("noise", "f4"), ("noise_offset", "i8"), ("noise_step", "i8")])
_PLACE = np.dtype(
    [("kind", "i8"), ("offsets", "i8", 16), ("tint", "f4", 3), ("contrast", "f4"), ("pan", "f4", 2)]
)
_SPRITE = np.dtype(
    [
        *((name, "i8") for name in ("figure", "class_id", "first", "last")),
        *((name, "f4") for name in ("x", "y", "vx", "vy", "size", "angle")),
        ("rgb", "f4", 3),
        ("edge_rgb", "f4", 3),
    ]
)
_NO_SPRITE = (0, 0, 0, 0, 0, 0, 0, 0, 20, 0, (0, 0, 0), (0, 0, 0))

_Columns = dict[str, torch.Tensor]


@dataclass(frozen=True)
class PackedScenes:
    """Scenes as numbers. `render` and `cover` take them in this form.

    A worker process may pack what another paints. Each column has a row for each scene.
    """

    num_frames: int
    clips: _Columns
    """Each (B, ...)."""
    places: _Columns
    """Each (B, 2, ...); the second is the first again where there is no cut."""
    sprites: _Columns
    """Each (B, S, ...), where S is the most things of a scene; others are seen in no frame."""

    def __len__(self) -> int:
        return len(self.clips["cut"])

    def to(self, device: torch.device | str) -> PackedScenes:
        """Return the same on another device."""
        return self._each(lambda column: column.to(device, non_blocking=True))

    def part(self, begin: int, end: int) -> PackedScenes:
        """Return the scenes begin to end - 1."""
        return self._each(lambda column: column[begin:end])

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> PackedScenes:
        groups = (self.clips, self.places, self.sprites)
        changed = ({name: change(column) for name, column in group.items()} for group in groups)
        return PackedScenes(self.num_frames, *changed)


def pack(scenes: Sequence[Scene]) -> PackedScenes:
    """Return the scenes as numbers, on the CPU. ValueError unless all have the same frames."""
    lengths = {scene.num_frames for scene in scenes}
    if len(lengths) != 1:
        raise ValueError(
            f"scenes of one batch have the same number of frames, got {sorted(lengths)}: "
            "paint those of each length by themselves"
        )
    most = max(1, *(len(scene.sprites) for scene in scenes))
    sprites = []
    for scene in scenes:
        rows = [_sprite_row(sprite) for sprite in scene.sprites]
        sprites.append(rows + [_NO_SPRITE] * (most - len(rows)))
    return PackedScenes(
        num_frames=lengths.pop(),
        clips=_columns([_clip_row(scene) for scene in scenes], _CLIP),
        places=_columns(
            [[_place_row(scene.places[0]), _place_row(scene.places[-1])] for scene in scenes],
            _PLACE,
        ),
        sprites=_columns(sprites, _SPRITE),
    )


def _columns(rows: list[Any], kind: np.dtype[Any]) -> _Columns:
    table = np.array(rows, dtype=kind)
    return {name: torch.from_numpy(table[name].copy()) for name in kind.names or ()}


def _clip_row(scene: Scene) -> tuple[Any, ...]:
    cut = scene.num_frames if scene.cut is None else scene.cut
    return cut, scene.noise, scene.noise_offset, 0 if scene.is_noise_still else _NOISE_STEP


def _place_row(place: Place) -> tuple[Any, ...]:
    return PLACES.index(place.kind), place.offsets, place.tint, place.contrast, place.pan


def _sprite_row(thing: Thing) -> tuple[Any, ...]:
    rgb = tuple(part + more for part, more in zip(_COLOURS[thing.colour], thing.tone, strict=True))
    return (
        _FIGURES.index(thing.figure),
        class_of(thing),
        thing.first,
        thing.last,
        thing.x,
        thing.y,
        *thing.velocity,
        thing.size,
        thing.angle,
        rgb,
        _EDGES[thing.colour],
    )


def class_of(thing: Thing) -> int:
    """Return the id that `cover` gives to this thing."""
    if thing.is_sign:
        return len(PLACES) + len(SHAPES) * len(COLOURS) + GLYPHS.index(thing.figure)
    return len(PLACES) + SHAPES.index(thing.figure) * len(COLOURS) + COLOURS.index(thing.colour)


@torch.no_grad()
def render(scenes: Sequence[Scene] | PackedScenes, device: torch.device | str) -> torch.Tensor:
    """Return the frames of the scenes: uint8 (B, T, H, W, 3), RGB, H = W = FRAME_SIZE, on `device`.

    A scene looks the same in every batch. Another device may differ by rounding. ValueError if the
    scenes differ in length.
    """
    packed = (scenes if isinstance(scenes, PackedScenes) else pack(scenes)).to(device)
    with torch.autocast(torch.device(device).type, enabled=False):
        return torch.cat([_paint(part) for part in _parts(packed)])


@torch.no_grad()
def cover(
    scenes: Sequence[Scene] | PackedScenes, grid: int, device: torch.device | str
) -> torch.Tensor:
    """Return what fills each cell of a grid over the frames: int64 (B, T, grid, grid) of class ids.

    Ids are those of PLACES, then those of `class_of`. A thing counts where it covers a quarter of a
    cell, and always in the cell of which it covers most, however small it is.
    """
    packed = (scenes if isinstance(scenes, PackedScenes) else pack(scenes)).to(device)
    if FRAME_SIZE % grid:
        raise ValueError(f"grid must divide {FRAME_SIZE}, got {grid}: choose 11 or 22")
    with torch.autocast(torch.device(device).type, enabled=False):
        return torch.cat([_find_classes(part, grid) for part in _parts(packed)])


def _parts(packed: PackedScenes) -> list[PackedScenes]:
    begins = range(0, len(packed), _MAX_SCENES)
    return [packed.part(begin, begin + _MAX_SCENES) for begin in begins]


def _paint(packed: PackedScenes) -> torch.Tensor:
    frames = _paint_places(packed)
    scene = torch.arange(len(packed), device=frames.device)[:, None, None, None]
    frame = torch.arange(packed.num_frames, device=frames.device)[:, None, None]
    for slot in range(packed.sprites["figure"].shape[1]):
        stamp = _make_stamp(packed, slot)
        where = scene, frame, stamp.rows[..., :, None], stamp.columns[..., None, :]
        behind = frames[where]
        frames[where] = behind + (stamp.rgb - behind) * stamp.alpha[..., None]
    frames += _make_noise(packed)
    return frames.round_().clamp_(0, 255).to(torch.uint8)


def _shots(packed: PackedScenes) -> torch.Tensor:
    """Return which of its two places each frame shows: int64 (B, T)."""
    frame = torch.arange(packed.num_frames, device=packed.clips["cut"].device)
    return (frame >= packed.clips["cut"][:, None]).long()


def _paint_places(packed: PackedScenes) -> torch.Tensor:
    """Return the backgrounds: float32 (B, T, H, W, 3)."""
    canvas = _paint_canvases(packed.places)
    device = canvas.device
    shot = _shots(packed)
    scene = torch.arange(len(packed), device=device)[:, None]
    frame = torch.arange(packed.num_frames, device=device)
    pan = packed.places["pan"][scene, shot]
    room = _CANVAS - FRAME_SIZE
    moved = pan * (frame - (packed.num_frames - 1) / 2)[:, None] + room / 2
    begin = moved.round().long().clamp(0, room)
    pixel = torch.arange(FRAME_SIZE, device=device)
    rows = (begin[..., 1, None] + pixel)[..., :, None]
    columns = (begin[..., 0, None] + pixel)[..., None, :]
    return canvas[scene[..., None, None], shot[..., None, None], rows, columns]


def _paint_canvases(places: _Columns) -> torch.Tensor:
    """Return all that the camera may see of each place: float32 (B, 2, _CANVAS, _CANVAS, 3)."""
    kind = places["kind"].flatten()
    tables = _make_tables(str(kind.device))
    begins = places["offsets"].flatten(0, 1)
    fields = torch.stack(
        [
            _make_field(tables.uniform, begins[:, 2 * index : 2 * index + 2], name)
            for index, name in enumerate(_FIELDS)
        ],
        dim=-1,
    )
    tones = tables.tones[kind] * places["contrast"].flatten()[:, None, None]
    base = tables.bases[kind] + places["tint"].flatten(0, 1)
    canvas = torch.baddbmm(base[:, None], fields.flatten(1, 2), tones)
    return canvas.view(-1, 2, _CANVAS, _CANVAS, 3)


def _make_field(uniform: torch.Tensor, begin: torch.Tensor, name: str) -> torch.Tensor:
    """Return random numbers from -0.5 to 0.5: float32 (N, _CANVAS, _CANVAS)."""
    height, width = _FIELDS[name]
    rows = begin[:, 0, None] + torch.arange(height, device=begin.device)
    columns = begin[:, 1, None] + torch.arange(width, device=begin.device)
    lattice = uniform[(rows % _TABLE)[:, :, None], (columns % _TABLE)[:, None, :]]
    if name == "lights":
        lattice = (lattice > _LIGHT_SHARE).float()
    down, across = (_make_stretch(count, name, str(begin.device)) for count in (height, width))
    return down @ lattice @ across.T


@lru_cache(maxsize=64)
def _make_stretch(count: int, name: str, device: str) -> torch.Tensor:
    """Return the matrix that enlarges `count` numbers to a canvas: float32 (_CANVAS, count)."""
    mode = "nearest" if name in ("blocks", "lights") else "bicubic"
    return F.interpolate(torch.eye(count)[None, None], (_CANVAS, count), mode=mode)[0, 0].to(device)


def _make_noise(packed: PackedScenes) -> torch.Tensor:
    """Return the sensor's noise: float32 (B, T, H, W, 3)."""
    clips = packed.clips
    tables = _make_tables(str(clips["noise"].device))
    frame = torch.arange(packed.num_frames, device=clips["noise"].device)
    begin = clips["noise_offset"][:, None] + frame * clips["noise_step"][:, None]
    pixel = torch.arange(FRAME_SIZE, device=begin.device)
    rows = ((begin // _TABLE)[..., None] + pixel) % _TABLE
    columns = (begin[..., None] + pixel) % _TABLE
    noise = tables.normal[rows[..., :, None], columns[..., None, :]]
    return noise.mul_(clips["noise"][:, None, None, None, None])


@dataclass(frozen=True)
class _Stamp:
    """One sprite of each scene in each frame, on a patch that moves with it by whole pixels."""

    rows: torch.Tensor
    """(B, T, _PATCH) int64: rows of the frame."""
    columns: torch.Tensor
    """(B, T, _PATCH) int64."""
    alpha: torch.Tensor
    """(B, T, _PATCH, _PATCH): how much of a pixel it covers."""
    rgb: torch.Tensor
    """(B, T, _PATCH, _PATCH, 3)."""


def _make_stamp(packed: PackedScenes, slot: int) -> _Stamp:
    columns = {name: column[:, slot] for name, column in packed.sprites.items()}
    device = columns["x"].device
    tables = _make_tables(str(device))
    frame = torch.arange(packed.num_frames, device=device)
    since = frame - columns["first"][:, None]
    is_visible = (since >= 0) & (frame < columns["last"][:, None])
    x = columns["x"][:, None] + columns["vx"][:, None] * since
    y = columns["y"][:, None] + columns["vy"][:, None] * since
    pixel = torch.arange(_PATCH, device=device)
    # Out of sight it may have moved out of the picture, where there is nothing to paint on.
    across = (x - _PATCH / 2).floor().long().clamp(0, FRAME_SIZE - _PATCH)[..., None] + pixel
    down = (y - _PATCH / 2).floor().long().clamp(0, FRAME_SIZE - _PATCH)[..., None] + pixel
    dx = (across + 0.5 - x[..., None])[..., None, :]
    dy = (down + 0.5 - y[..., None])[..., :, None]
    half = columns["size"][:, None, None, None] / 2
    angle = columns["angle"][:, None, None, None] * (math.pi / 180)
    u = (dx * angle.cos() + dy * angle.sin()) / half
    v = (dy * angle.cos() - dx * angle.sin()) / half
    points = torch.stack((u, v), dim=-1).flatten(1, 2) / _REACH
    sampled = F.grid_sample(
        tables.atlas[columns["figure"]], points, padding_mode="border", align_corners=False
    ).view(len(packed), 2, packed.num_frames, _PATCH, _PATCH)
    distance = sampled[:, 0] * half
    edge = (half * 0.09 - 0.1).clamp(0.55, 2.0)
    alpha = (0.5 - distance).clamp(0, 1) * is_visible[..., None, None]
    body = (0.5 - distance - edge).clamp(0, 1)[..., None]
    ink = ((sampled[:, 1] - 0.5) * 3 + 0.5).clamp(0, 1)[..., None]
    shade = (1 - 0.1 * (u + v) + 0.05 * torch.sin(7 * u - 4 * v))[..., None]
    rgb, edge_rgb = (columns[name][:, None, None, None] for name in ("rgb", "edge_rgb"))
    rgb = (rgb * shade).clamp(0, 255)
    rgb = edge_rgb + (rgb - edge_rgb) * body
    return _Stamp(down, across, alpha, rgb + (tables.ink - rgb) * ink)


def _find_classes(packed: PackedScenes, grid: int) -> torch.Tensor:
    sprites = packed.sprites
    batch, num_slots = sprites["figure"].shape
    num_frames, device = packed.num_frames, sprites["x"].device
    cell = FRAME_SIZE // grid
    scene = torch.arange(batch, device=device)[:, None, None, None]
    frame = torch.arange(num_frames, device=device)[:, None, None]
    shares = torch.zeros(batch, num_frames, num_slots, grid, grid, device=device)
    for slot in range(num_slots):
        stamp = _make_stamp(packed, slot)
        filled = torch.zeros(batch, num_frames, FRAME_SIZE, FRAME_SIZE, device=device)
        filled[scene, frame, stamp.rows[..., :, None], stamp.columns[..., None, :]] = stamp.alpha
        shares[:, :, slot] = F.avg_pool2d(filled, cell)
    fullest = shares.amax((-2, -1), keepdim=True)
    counts = (shares >= _MIN_COVER) | ((shares == fullest) & (fullest > 0))
    share, slot_of_cell = (shares * counts).max(dim=2)
    kind = packed.places["kind"][torch.arange(batch, device=device)[:, None], _shots(packed)]
    thing = sprites["class_id"][
        torch.arange(batch, device=device)[:, None, None, None], slot_of_cell
    ]
    return torch.where(share > 0, thing, kind[..., None, None])


# Tables: random numbers, colours and figures.


@dataclass(frozen=True)
class _Tables:
    uniform: torch.Tensor
    """(_TABLE, _TABLE) float32, -0.5 to 0.5."""
    normal: torch.Tensor
    """(_TABLE, _TABLE, 3) float32."""
    bases: torch.Tensor
    """(number of places, 3) float32."""
    tones: torch.Tensor
    """(number of places, number of fields, 3) float32."""
    ink: torch.Tensor
    """(3,) float32."""
    atlas: torch.Tensor
    """(number of figures, 2, _ATLAS, _ATLAS) float32: distance to the outline in half sizes,
    negative inside; where there is ink."""


@lru_cache(maxsize=16)
def _make_tables(device: str) -> _Tables:
    # The legacy generators: their numbers are the same in every version of numpy.
    uniform = np.random.RandomState(1).uniform(-0.5, 0.5, (_TABLE, _TABLE))
    normal = np.random.RandomState(2).standard_normal((_TABLE, _TABLE, 3))
    nothing = (0, 0, 0)
    tones = [[_TONES[place].get(field, nothing) for field in _FIELDS] for place in PLACES]
    atlas = np.stack([_draw_figure(figure) for figure in _FIGURES])

    def table(values: object) -> torch.Tensor:
        return torch.from_numpy(np.asarray(values, dtype=np.float32)).to(device)

    bases = [_BASES[place] for place in PLACES]
    return _Tables(*map(table, (uniform, normal, bases, tones, _INK, atlas)))


def _draw_figure(figure: str) -> npt.NDArray[np.float64]:
    """Return the figure's distance and ink: (2, _ATLAS, _ATLAS), a row of `_Tables.atlas`."""
    axis = ((np.arange(_ATLAS) + 0.5) / _ATLAS * 2 - 1) * _REACH
    x, y = np.meshgrid(axis, axis)
    ink = np.zeros_like(x)
    if figure == "circle":
        distance = np.hypot(x, y) - 0.95
    elif figure == "ring":
        distance = np.abs(np.hypot(x, y) - 0.7) - 0.3
    elif figure in GLYPHS:
        beyond = np.maximum(np.abs((x, y)) - 0.56, 0)
        distance = np.hypot(*beyond) - 0.24
        ink = _draw_glyph(figure, x, y)
    else:
        distance = _measure_polygon(_OUTLINES[figure], x, y)
    return np.stack((distance, ink))


def _draw_glyph(
    glyph: str, x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Return about 1 where the glyph has ink, 0 where not, between dots something between."""
    dots = np.array([[int(dot) for dot in row] for row in _FONT[glyph].split()], dtype=float)
    dots = np.pad(dots, 2)
    column, row = x / _DOT + 4, y / _DOT + 5
    left, top = np.floor(column).astype(int), np.floor(row).astype(int)
    right_share, low_share = column - left, row - top

    def dot(down: int, across: int) -> npt.NDArray[np.float64]:
        rows = (top + down).clip(0, dots.shape[0] - 1)
        picked: npt.NDArray[np.float64] = dots[rows, (left + across).clip(0, dots.shape[1] - 1)]
        return picked

    upper = dot(0, 0) * (1 - right_share) + dot(0, 1) * right_share
    lower = dot(1, 0) * (1 - right_share) + dot(1, 1) * right_share
    blurred: npt.NDArray[np.float64] = upper * (1 - low_share) + lower * low_share
    return blurred


def _measure_polygon(
    corners: npt.NDArray[np.float64], x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Return the distance of points to a polygon's outline, negative inside."""
    nearest = np.full_like(x, np.inf)
    is_inside = np.zeros_like(x, dtype=bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        ex, ey = bx - ax, by - ay
        along = (((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey)).clip(0, 1)
        nearest = np.minimum(nearest, np.hypot(x - ax - along * ex, y - ay - along * ey))
        if ay != by:
            is_inside ^= ((ay > y) != (by > y)) & (x < ax + (y - ay) / ey * ex)
    return np.where(is_inside, -nearest, nearest)


def _points_around(radii: Sequence[float], turn: float) -> npt.NDArray[np.float64]:
    angles = np.arange(len(radii)) / len(radii) * 2 * math.pi + turn
    return np.stack((np.sin(angles), -np.cos(angles)), axis=1) * np.array(radii)[:, None]


_BAR = 0.3
_OUTLINES = {
    "square": _points_around([1.06] * 4, math.pi / 4),
    "triangle": _points_around([1.1, 1.1, 1.1], 0) + np.array([0, 0.22]),
    "star": _points_around([1.06, 0.46] * 5, 0),
    "cross": np.array(
        [
            *[(-_BAR, -0.98), (_BAR, -0.98), (_BAR, -_BAR), (0.98, -_BAR)],
            *[(0.98, _BAR), (_BAR, _BAR), (_BAR, 0.98), (-_BAR, 0.98)],
            *[(-_BAR, _BAR), (-0.98, _BAR), (-0.98, -_BAR), (-_BAR, -_BAR)],
        ]
    ),
}
"""Corners of figures that are polygons."""
