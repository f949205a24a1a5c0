"""What a made-up clip shows, drawn from a seed: places, things, signs, and when each is seen.

Plain Python, no pictures: `bench.world.render` paints a `Scene`, `bench.world.questions` asks.
Lengths are pixels of a FRAME_SIZE square picture, x to the right, y downwards; times are frames.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

FRAME_SIZE = 176
NUM_FRAMES = 16
MAX_NUM_FRAMES = 32
FRAMES_PER_SECOND = 4

PLACES = ("sea", "forest", "desert", "snow", "night", "city")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "black")
DIGITS = tuple("0123456789")
LETTERS = tuple("efhklptuxy")
"""Letters that look unlike each other and unlike digits; a to d name the options of a question."""
GLYPHS = DIGITS + LETTERS
DIRECTIONS = ("left", "right", "up", "down", "still")

MIN_NUM_FRAMES = {
    "attribute": 1,
    "count": 1,
    "order": 4,
    "motion": 4,
    "glyph": 1,
    "needle": 8,
    "small": 1,
    "cut": 4,
}
"""The skills, and the shortest clip that can show each."""

MAX_SIZE = 56
MAX_SMALL_SIZE = 16
"""Nothing else is smaller than MIN_SIZE, or than MIN_SIZE_BESIDE_SMALL where something small is."""
MIN_SIZE = 20
MIN_SIZE_BESIDE_SMALL = 28
MAX_NEEDLE_FRAMES = 2
MIN_EVENT_FRAMES = 3
"""What is no needle is seen for at least this long, in clips that are long enough for needles."""

_STEPS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0)}
_EDGE = 3.0
_GAP = 4.0
_MIN_TRAVEL, _MAX_TRAVEL, _MAX_SPEED = 36.0, 100.0, 16.0
_NUM_NOISE_OFFSETS = 512


@dataclass(frozen=True, slots=True)
class Place:
    """A background: a kind of PLACES, and what tells this one from others of its kind."""

    kind: str
    offsets: tuple[int, ...]
    """Where in the table of random numbers its texture begins: (row, column) for each field."""
    tint: tuple[float, float, float]
    contrast: float
    pan: tuple[float, float]
    """Pixels that the camera moves each frame."""


@dataclass(frozen=True, slots=True)
class Thing:
    """Something seen before the background in frames `first` to `last` - 1, moving evenly.

    A sign is a thing whose figure is one of GLYPHS; its colour is "plate".
    """

    figure: str
    colour: str
    size: float
    x: float
    """Where its centre is in frame `first`."""
    y: float
    direction: str
    speed: float
    first: int
    last: int
    angle: float
    """Degrees by which it is turned."""
    tone: tuple[float, float, float]
    """Added to its colour's red, green and blue, in units of 1/255."""

    @property
    def is_sign(self) -> bool:
        """Whether it shows a glyph."""
        return self.figure in GLYPHS

    @property
    def is_small(self) -> bool:
        """Whether it is one that questions call small."""
        return self.size <= MAX_SMALL_SIZE

    @property
    def num_frames(self) -> int:
        """In how many frames it is seen."""
        return self.last - self.first

    @property
    def velocity(self) -> tuple[float, float]:
        """Pixels a frame."""
        across, down = _STEPS[self.direction]
        return across * self.speed, down * self.speed

    def is_visible(self, frame: int) -> bool:
        """Whether it is seen in this frame."""
        return self.first <= frame < self.last

    def centre(self, frame: int) -> tuple[float, float]:
        """Where it is in this frame, seen or not."""
        dx, dy = self.velocity
        return self.x + dx * (frame - self.first), self.y + dy * (frame - self.first)


@dataclass(frozen=True, slots=True)
class Scene:
    """One clip: all that is needed to paint it and to answer questions about it."""

    seed: int
    skill: str | None
    num_frames: int
    places: tuple[Place, ...]
    """One, or two with a cut between them."""
    cut: int | None
    """The first frame of the second place."""
    sprites: tuple[Thing, ...]
    """Things and signs. None covers another, none leaves the picture."""
    noise: float
    """Standard deviation of the sensor's noise, in units of 1/255."""
    noise_offset: int
    is_noise_still: bool
    """Whether each frame has the same noise."""
    counted: str | None = None
    """What a scene of skill count is about: a shape, a colour, or "thing" for all of them."""

    @property
    def things(self) -> tuple[Thing, ...]:
        """Objects that are not signs. No two have the same shape and colour."""
        return tuple(sprite for sprite in self.sprites if not sprite.is_sign)

    @property
    def signs(self) -> tuple[Thing, ...]:
        """The signs, at most one."""
        return tuple(sprite for sprite in self.sprites if sprite.is_sign)

    @property
    def is_still(self) -> bool:
        """Whether the background is the same picture in every frame."""
        return self.cut is None and self.is_noise_still and self.places[0].pan == (0.0, 0.0)

    def is_needle(self, thing: Thing) -> bool:
        """Whether it is seen so briefly that questions call it a flash."""
        return self.num_frames >= MIN_NUM_FRAMES["needle"] and thing.num_frames <= MAX_NEEDLE_FRAMES


def sample_scene(seed: int, skill: str | None = None, num_frames: int = NUM_FRAMES) -> Scene:
    """Return the scene of a seed: one for questions of `skill`, or a mix without a skill.

    Equal arguments give equal scenes, on every machine. ValueError if the skill is unknown or the
    clip is too short to show it.
    """
    if skill is not None and skill not in _RECIPES:
        raise ValueError(f"skill must be one of {', '.join(_RECIPES)} or None, got {skill!r}")
    shortest = 1 if skill is None else MIN_NUM_FRAMES[skill]
    if not shortest <= num_frames <= MAX_NUM_FRAMES:
        raise ValueError(
            f"a clip of skill {skill} has {shortest} to {MAX_NUM_FRAMES} frames, got {num_frames}: "
            "choose another number of frames"
        )
    rng = random.Random(f"scene {seed} {skill} {num_frames}")
    recipe = _sample_mix if skill is None else _RECIPES[skill]
    plan = recipe(rng, num_frames)
    is_still = plan.is_still
    return Scene(
        seed=seed,
        skill=skill,
        num_frames=num_frames,
        places=tuple(_sample_place(rng, kind, is_still) for kind in plan.places),
        cut=plan.cut,
        sprites=_arrange(rng, plan.casts),
        noise=rng.choice((0.0, rng.uniform(1, 6), rng.uniform(1, 6))),
        noise_offset=rng.randrange(_NUM_NOISE_OFFSETS**2),
        is_noise_still=is_still or rng.random() < 0.2,
        counted=plan.counted,
    )


@dataclass(slots=True)
class _Cast:
    """A thing that has no position yet."""

    figure: str
    colour: str
    first: int
    last: int
    sizes: tuple[float, float] = (MIN_SIZE, 48)
    direction: str = "still"
    is_optional: bool = False


@dataclass(slots=True)
class _Plan:
    casts: list[_Cast]
    places: list[str]
    cut: int | None = None
    is_still: bool = False
    counted: str | None = None


def _sample_place(rng: random.Random, kind: str, is_still: bool) -> Place:
    pan = (0.0, 0.0)
    if not is_still and rng.random() < 0.7:
        pan = (rng.uniform(-3, 3), rng.uniform(-1.5, 1.5))
    return Place(
        kind=kind,
        offsets=tuple(rng.randrange(512) for _ in range(16)),
        tint=(rng.uniform(-9, 9), rng.uniform(-9, 9), rng.uniform(-9, 9)),
        contrast=rng.uniform(0.7, 1.2),
        pan=pan,
    )


def _arrange(rng: random.Random, casts: list[_Cast]) -> tuple[Thing, ...]:
    """Give every cast a place. Only positions and sizes are drawn again, so answers stay fair."""
    scale = 1.0
    for _ in range(60):
        things: list[Thing] = []
        for cast in casts:
            thing = _place(rng, cast, things, scale)
            if thing is not None:
                things.append(thing)
            elif not cast.is_optional:
                break
        else:
            return tuple(things)
        scale *= 0.94
    raise RuntimeError(f"no room for {len(casts)} things in a picture: a recipe asks for too much")


def _place(rng: random.Random, cast: _Cast, others: list[Thing], scale: float) -> Thing | None:
    low, high = cast.sizes
    num_steps = cast.last - cast.first - 1
    for _ in range(25):
        size = max(low, rng.uniform(low, high) * scale)
        inset = size / 2 + _EDGE
        room = FRAME_SIZE - 2 * inset
        speed = 0.0
        if cast.direction != "still":
            most = min(_MAX_TRAVEL, room, _MAX_SPEED * num_steps)
            speed = rng.uniform(min(_MIN_TRAVEL, most), most) / num_steps
        across, down = _STEPS[cast.direction]
        dx, dy = across * speed * num_steps, down * speed * num_steps
        thing = Thing(
            figure=cast.figure,
            colour=cast.colour,
            size=size,
            x=rng.uniform(inset - min(dx, 0), FRAME_SIZE - inset - max(dx, 0)),
            y=rng.uniform(inset - min(dy, 0), FRAME_SIZE - inset - max(dy, 0)),
            direction=cast.direction,
            speed=speed,
            first=cast.first,
            last=cast.last,
            angle=rng.uniform(-4, 4) if cast.figure in GLYPHS else rng.uniform(-12, 12),
            tone=(rng.uniform(-10, 10), rng.uniform(-10, 10), rng.uniform(-10, 10)),
        )
        if all(_are_apart(thing, other) for other in others):
            return thing
    return None


def _are_apart(one: Thing, other: Thing) -> bool:
    """Whether two things keep clear of each other while both are seen."""
    begin, end = max(one.first, other.first), min(one.last, other.last) - 1
    if begin > end:
        return True
    (ax, ay), (bx, by) = one.centre(begin), other.centre(begin)
    (avx, avy), (bvx, bvy) = one.velocity, other.velocity
    x, y, vx, vy = ax - bx, ay - by, avx - bvx, avy - bvy
    squared = vx * vx + vy * vy
    nearest = min(max(-(x * vx + y * vy) / squared, 0.0), end - begin) if squared else 0.0
    return math.hypot(x + vx * nearest, y + vy * nearest) >= (one.size + other.size) / 2 + _GAP


# Recipes: what a scene of each skill shows.


def _sample_names(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """Return `count` different (shape, colour)."""
    pairs = rng.sample(range(len(SHAPES) * len(COLOURS)), count)
    return [(SHAPES[pair % len(SHAPES)], COLOURS[pair // len(SHAPES)]) for pair in pairs]


def _sample_alike(rng: random.Random, word: str, count: int) -> list[tuple[str, str]]:
    """Return `count` different (shape, colour) that share this shape or this colour."""
    if word in SHAPES:
        return [(word, colour) for colour in rng.sample(COLOURS, count)]
    return [(shape, word) for shape in rng.sample(SHAPES, count)]


def _sample_unlike(
    rng: random.Random, count: int, shape: str, colour: str
) -> list[tuple[str, str]]:
    """Return `count` different (shape, colour) that share neither with the one given."""
    shapes = [other for other in SHAPES if other != shape]
    colours = [other for other in COLOURS if other != colour]
    pairs = rng.sample(range(len(shapes) * len(colours)), count)
    return [(shapes[pair % len(shapes)], colours[pair // len(shapes)]) for pair in pairs]


def _sample_direction(rng: random.Random, num_frames: int) -> str:
    """Return a direction for clutter, still where a clip is too short to tell one."""
    return rng.choice(DIRECTIONS) if num_frames >= 4 and rng.random() < 0.5 else "still"


def _sample_window(rng: random.Random, begin: int, end: int, shortest: int) -> tuple[int, int]:
    """Return (first, last) inside begin to end, at least `shortest` frames long where they fit."""
    length = rng.randint(min(shortest, end - begin), end - begin)
    first = rng.randint(begin, end - length)
    return first, first + length


def _sample_cut(rng: random.Random, num_frames: int) -> int:
    margin = max(1, num_frames // 4)
    return rng.randint(margin, num_frames - margin)


def _plan_attribute(rng: random.Random, num_frames: int) -> _Plan:
    target = rng.choice(SHAPES), rng.choice(COLOURS)
    others = _sample_unlike(rng, rng.randint(1, 4), *target)
    casts = []
    for shape, colour in [target, *others]:
        first, last = 0, num_frames
        if rng.random() < 0.3:
            first, last = _sample_window(rng, 0, num_frames, max(MIN_EVENT_FRAMES, num_frames // 2))
        direction = _sample_direction(rng, last - first)
        casts.append(_Cast(shape, colour, first, last, (MIN_SIZE, MAX_SIZE), direction))
    return _Plan(casts, [rng.choice(PLACES)], is_still=rng.random() < 0.25)


def _plan_count(rng: random.Random, num_frames: int) -> _Plan:
    count, num_others = rng.randint(1, 5), rng.randint(0, 3)
    counted = rng.choice((rng.choice(SHAPES), rng.choice(COLOURS), "thing"))
    if counted == "thing":
        names = _sample_names(rng, count)
    else:
        others = [name for name in _sample_names(rng, 12) if counted not in name]
        names = _sample_alike(rng, counted, count) + others[:num_others]
    casts = []
    for shape, colour in names:
        direction = _sample_direction(rng, num_frames) if rng.random() < 0.4 else "still"
        casts.append(_Cast(shape, colour, 0, num_frames, (MIN_SIZE, 40), direction))
    is_still = rng.random() < 0.25
    return _Plan(casts, [rng.choice(PLACES)], is_still=is_still, counted=counted)


def _plan_order(rng: random.Random, num_frames: int) -> _Plan:
    shortest = MIN_EVENT_FRAMES if num_frames >= MIN_NUM_FRAMES["needle"] else 1
    gap = max(1, num_frames // 8)
    form = rng.choice(("appear", "vanish", "parade"))
    most = num_frames // shortest if form == "parade" else (num_frames - shortest - 1) // gap + 1
    names = _sample_names(rng, min(rng.choice((2, 3, 4, 4)), most))
    if form == "parade":
        bounds = _sample_times(rng, len(names) - 1, shortest, num_frames - shortest, shortest)
        bounds = [0, *bounds, num_frames]
        windows = list(pairwise(bounds))
    elif form == "appear":
        times = _sample_times(rng, len(names), 0, num_frames - shortest, gap)
        windows = [(time, num_frames) for time in times]
    else:
        times = _sample_times(rng, len(names), shortest, num_frames - 1, gap)
        windows = [(0, time) for time in times]
    rng.shuffle(windows)
    casts = []
    for (shape, colour), (first, last) in zip(names, windows, strict=True):
        direction = _sample_direction(rng, last - first) if rng.random() < 0.3 else "still"
        casts.append(_Cast(shape, colour, first, last, (24, 48), direction))
    return _Plan(casts, [rng.choice(PLACES)], is_still=rng.random() < 0.25)


def _sample_times(rng: random.Random, count: int, low: int, high: int, gap: int) -> list[int]:
    """Return `count` rising times from low to high, at least `gap` apart, all equally likely."""
    slack = high - low - gap * (count - 1)
    if slack < 0:
        raise ValueError(f"{count} times do not fit {low} to {high}, {gap} apart")
    picks = sorted(rng.sample(range(slack + count), count))
    return [low + pick + index * (gap - 1) for index, pick in enumerate(picks)]


def _plan_motion(rng: random.Random, num_frames: int) -> _Plan:
    names = _sample_names(rng, rng.randint(1, 3))
    casts = [
        _Cast(shape, colour, 0, num_frames, (MIN_SIZE, 40), rng.choice(DIRECTIONS))
        for shape, colour in names
    ]
    return _Plan(casts, [rng.choice(PLACES)], is_still=rng.random() < 0.25)


def _cast_sign(rng: random.Random, begin: int, end: int) -> _Cast:
    glyph = rng.choice(rng.choice((DIGITS, LETTERS)))
    first, last = _sample_window(rng, begin, end, MIN_EVENT_FRAMES)
    direction = _sample_direction(rng, last - first) if rng.random() < 0.5 else "still"
    return _Cast(glyph, "plate", first, last, (36, MAX_SIZE), direction)


def _plan_glyph(rng: random.Random, num_frames: int) -> _Plan:
    casts = [_cast_sign(rng, 0, num_frames)]
    for shape, colour in _sample_names(rng, rng.randint(0, 3)):
        direction = _sample_direction(rng, num_frames)
        casts.append(_Cast(shape, colour, 0, num_frames, (MIN_SIZE, 40), direction))
    return _Plan(casts, [rng.choice(PLACES)], is_still=rng.random() < 0.25)


def _cast_needle(rng: random.Random, name: tuple[str, str], begin: int, end: int) -> _Cast:
    length = rng.randint(1, MAX_NEEDLE_FRAMES)
    first = rng.randint(begin, end - length)
    return _Cast(*name, first, first + length, (24, 48))


def _plan_needle(rng: random.Random, num_frames: int) -> _Plan:
    target = rng.choice(SHAPES), rng.choice(COLOURS)
    casts = [_cast_needle(rng, target, 0, num_frames)]
    for shape, colour in _sample_unlike(rng, rng.randint(1, 3), *target):
        direction = _sample_direction(rng, num_frames)
        casts.append(_Cast(shape, colour, 0, num_frames, (MIN_SIZE, 44), direction))
    return _Plan(casts, [rng.choice(PLACES)], is_still=rng.random() < 0.25)


def _plan_small(rng: random.Random, num_frames: int) -> _Plan:
    target = rng.choice(SHAPES), rng.choice(COLOURS)
    casts = [_Cast(*target, 0, num_frames, (12, MAX_SMALL_SIZE))]
    for shape, colour in _sample_unlike(rng, rng.randint(0, 2), *target):
        casts.append(_Cast(shape, colour, 0, num_frames, (MIN_SIZE_BESIDE_SMALL, MAX_SIZE)))
    return _Plan(casts, [rng.choice(PLACES)], is_still=True)


def _plan_cut(rng: random.Random, num_frames: int) -> _Plan:
    # With a cut three questions can be asked, without one two: "yes" and "no" are then as likely.
    if rng.random() < 0.6:
        cut = _sample_cut(rng, num_frames)
        places, shots = rng.sample(PLACES, 2), [(0, cut), (cut, num_frames)]
    else:
        cut = None
        places, shots = [rng.choice(PLACES)], [(0, num_frames)]
    casts = []
    for shape, colour in _sample_names(rng, rng.randint(0, 4)):
        first, last = rng.choice(shots)
        direction = _sample_direction(rng, last - first)
        casts.append(_Cast(shape, colour, first, last, (MIN_SIZE, 44), direction))
    return _Plan(casts, places, cut)


def _sample_mix(rng: random.Random, num_frames: int) -> _Plan:
    """A little of everything, so that one clip teaches most skills."""
    has_time = num_frames >= MIN_NUM_FRAMES["needle"]
    is_still = rng.random() < 0.35
    cut, shots = None, [(0, num_frames)]
    if not is_still and num_frames >= MIN_NUM_FRAMES["cut"] and rng.random() < 0.3:
        cut = _sample_cut(rng, num_frames)
        shots = [(0, cut), (cut, num_frames)]
    has_small = is_still and rng.random() < 0.65
    num_things = rng.randint(2, 4 if has_small else 6)
    names = _sample_names(rng, num_things + 2)
    if rng.random() < 0.4:
        alike = _sample_alike(rng, rng.choice((*SHAPES, *COLOURS)), rng.randint(2, 5))
        others = [name for name in names if name not in alike]
        names = [*others[:2], *alike, *others[2:]][: num_things + 2]
    smallest = MIN_SIZE_BESIDE_SMALL if has_small else MIN_SIZE
    casts = []
    if has_small:
        casts.append(_Cast(*names[0], 0, num_frames, (12, MAX_SMALL_SIZE)))
    for name in names[2:]:
        first, last = rng.choice(shots)
        if rng.random() < 0.5:
            shortest = max(MIN_EVENT_FRAMES, num_frames // 4) if has_time else 1
            first, last = _sample_window(rng, first, last, shortest)
        direction = _sample_direction(rng, last - first)
        casts.append(_Cast(*name, first, last, (smallest, 44), direction, is_optional=True))
    if rng.random() < 0.4:
        sign = _cast_sign(rng, *rng.choice(shots))
        sign.is_optional = True
        casts.append(sign)
    if has_time and rng.random() < 0.4:
        needle = _cast_needle(rng, names[1], *rng.choice(shots))
        needle.sizes, needle.is_optional = (max(24, smallest), 48), True
        casts.append(needle)
    return _Plan(casts, rng.sample(PLACES, len(shots)), cut, is_still)


_RECIPES: dict[str, Callable[[random.Random, int], _Plan]] = {
    "attribute": _plan_attribute,
    "count": _plan_count,
    "order": _plan_order,
    "motion": _plan_motion,
    "glyph": _plan_glyph,
    "needle": _plan_needle,
    "small": _plan_small,
    "cut": _plan_cut,
}
