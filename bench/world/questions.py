"""Questions about a scene whose answers follow from it, in plain words and as multiple choice.

Words are lower case, and every word and mark stands between spaces, so that `text.split()` is the
text in words of VOCABULARY. Only the letters that name options are upper case.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

from bench.world.scene import (
    COLOURS,
    DIGITS,
    DIRECTIONS,
    GLYPHS,
    LETTERS,
    MIN_EVENT_FRAMES,
    PLACES,
    SHAPES,
    Scene,
    Thing,
)

OPTIONS = ("A", "B", "C", "D")
NUMBERS = ("one", "two", "three", "four", "five")
PLURALS = {
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "star": "stars",
    "cross": "crosses",
    "ring": "rings",
}


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked about a clip, and the one right answer."""

    skill: str
    text: str
    """The text that the model gets, choices included, as in "what ... ? A red B blue"."""
    answer: str
    """A word or two, or with choices the letter of the right one."""
    choices: tuple[str, ...] = ()
    """Empty for a free answer; else what A, B, C and D (or A and B) stand for."""


@dataclass(frozen=True, slots=True)
class _Topic:
    """One fact to ask about."""

    skill: str
    wordings: tuple[str, ...]
    answer: str
    near: Sequence[str]
    """Wrong answers that the clip suggests: at most two become options, in random order."""
    far: Sequence[str]
    """Wrong answers that fill up the options."""
    num_options: int = 4


_WORDINGS = {
    "colour of": ("what colour is {} ?", "which colour does {} have ?", "tell the colour of {} ."),
    "shape of": ("what shape is {} ?", "which shape does {} have ?", "tell the shape of {} ."),
    "count": ("how many {} are there ?", "how many {} can you see ?", "count the {} ."),
    "appears first": ("which thing appears first ?", "what is the first thing to appear ?"),
    "appears last": ("which thing appears last ?", "what is the last thing to appear ?"),
    "vanishes first": ("which thing vanishes first ?", "what is the first thing to vanish ?"),
    "vanishes last": ("which thing vanishes last ?", "what is the last thing to vanish ?"),
    "pair appears first": (
        "which appears first , {} or {} ?",
        "which is the first to appear , {} or {} ?",
    ),
    "pair appears last": (
        "which appears last , {} or {} ?",
        "which is the last to appear , {} or {} ?",
    ),
    "pair vanishes first": (
        "which vanishes first , {} or {} ?",
        "which is the first to vanish , {} or {} ?",
    ),
    "pair vanishes last": (
        "which vanishes last , {} or {} ?",
        "which is the last to vanish , {} or {} ?",
    ),
    "direction": (
        "which way does {} move ?",
        "where does {} go ?",
        "in which direction does {} move ?",
    ),
    "moves": ("which thing moves {} ?", "what goes {} ?"),
    "moves not": ("which thing is still ?", "what does not move ?"),
    "digit": ("which digit is on the sign ?", "what digit does the sign show ?"),
    "letter": ("which letter is on the sign ?", "what letter does the sign show ?"),
    "sign": ("what is on the sign ?", "what does the sign show ?", "read the sign ."),
    "needle": ("which thing flashes up ?", "what is there only for a moment ?"),
    "small": ("which thing is small ?", "what is the small thing ?"),
    "before": (
        "which place is shown before the cut ?",
        "where are you before the cut ?",
        "what is the first place ?",
    ),
    "after": (
        "which place is shown after the cut ?",
        "where are you after the cut ?",
        "what is the last place ?",
    ),
    "place": ("which place is this ?", "where are you ?", "which place is shown ?"),
    "has cut": ("is there a cut ?", "does the place change ?", "can you see a cut ?"),
}


def _the(name: str) -> str:
    return f"the {name}"


def ask(scene: Scene, seed: int, skill: str | None = None) -> list[Question]:
    """Return the questions that the scene answers, or those of one skill.

    Equal arguments give equal questions. Every fact is asked about twice: for a free answer and
    with choices. What cannot be told for sure from the pictures is not asked. ValueError if the
    skill is unknown.
    """
    if skill is not None and skill not in _TOPICS:
        raise ValueError(f"skill must be one of {', '.join(SKILLS)} or None, got {skill!r}")
    rng = random.Random(f"questions {seed} {skill}")
    questions = []
    for name in SKILLS if skill is None else (skill,):
        for topic in _TOPICS[name](scene, rng):
            questions.append(Question(name, rng.choice(topic.wordings), topic.answer))
            questions.append(_offer_choices(topic, rng))
    return questions


def _offer_choices(topic: _Topic, rng: random.Random) -> Question:
    num_wrong = topic.num_options - 1
    near = [wrong for wrong in dict.fromkeys(topic.near) if wrong != topic.answer]
    wrong = rng.sample(near, min(2, num_wrong, len(near)))
    rest = [word for word in dict.fromkeys(topic.far) if word != topic.answer and word not in wrong]
    choices = [topic.answer, *wrong, *rng.sample(rest, num_wrong - len(wrong))]
    rng.shuffle(choices)
    letters = OPTIONS[: len(choices)]
    offered = " ".join(f"{letter} {text}" for letter, text in zip(letters, choices, strict=True))
    text = f"{rng.choice(topic.wordings)} {offered}"
    answer = letters[choices.index(topic.answer)]
    return Question(topic.skill, text, answer, tuple(choices))


def _name(thing: Thing) -> str:
    return f"{thing.colour} {thing.figure}"


def _fill(key: str, *words: str) -> tuple[str, ...]:
    return tuple(wording.format(*words) for wording in _WORDINGS[key])


def _topic_colour(skill: str, scene: Scene, thing: Thing, which: str) -> _Topic:
    near = [other.colour for other in scene.things]
    return _Topic(skill, _fill("colour of", which), thing.colour, near, COLOURS)


def _topic_shape(skill: str, scene: Scene, thing: Thing, which: str) -> _Topic:
    near = [other.figure for other in scene.things]
    return _Topic(skill, _fill("shape of", which), thing.figure, near, SHAPES)


def _topic_name(skill: str, scene: Scene, thing: Thing, key: str, *words: str) -> _Topic:
    """Ask which thing it is. Wrong answers are other things, some with one of its two features."""
    recoloured = [f"{colour} {thing.figure}" for colour in COLOURS]
    reshaped = [f"{thing.colour} {shape}" for shape in SHAPES]
    near = [_name(other) for other in scene.things]
    return _Topic(skill, _fill(key, *words), _name(thing), near, recoloured + reshaped)


def _features(skill: str, scene: Scene, thing: Thing) -> Iterator[_Topic]:
    """Yield questions about the only thing of its shape or colour."""
    if sum(other.figure == thing.figure for other in scene.things) == 1:
        yield _topic_colour(skill, scene, thing, _the(thing.figure))
    if sum(other.colour == thing.colour for other in scene.things) == 1:
        yield _topic_shape(skill, scene, thing, f"the {thing.colour} thing")


def _attribute(scene: Scene, rng: random.Random) -> Iterator[_Topic]:
    if len(scene.things) < 2:
        return
    for thing in scene.things:
        if not thing.is_small and not scene.is_needle(thing):
            yield from _features("attribute", scene, thing)


def _count(scene: Scene, rng: random.Random) -> Iterator[_Topic]:
    if scene.counted is not None:
        words: Iterable[str] = [scene.counted]
    else:
        words = {word: None for thing in scene.things for word in (thing.figure, thing.colour)}
        words = [*words, "thing"]
    by_count: dict[int, list[str]] = {}
    for word in words:
        members = [thing for thing in scene.things if word in (thing.figure, thing.colour, "thing")]
        if len(members) <= len(NUMBERS) and not any(map(scene.is_needle, members)):
            by_count.setdefault(len(members), []).append(word)
    for count, alike in by_count.items():
        # One word for each number: most words of a mixed scene would be answered by "one".
        word = rng.choice(alike)
        plural = f"{word} things" if word in COLOURS else PLURALS.get(word, "things")
        yield _Topic("count", _fill("count", plural), NUMBERS[count - 1], (), NUMBERS)


def _order(scene: Scene, rng: random.Random) -> Iterator[_Topic]:
    things = [thing for thing in scene.things if not scene.is_needle(thing)]
    gap = max(1, scene.num_frames // 8)
    if scene.num_frames < 4 or len(things) < 2:
        return
    for event, times in (("appear", _first), ("vanish", _last)):
        ordered = sorted(things, key=times)
        if event == "vanish":
            ordered = [thing for thing in ordered if thing.last < scene.num_frames]
        are_apart = all(times(b) - times(a) >= gap for a, b in pairwise(ordered))
        if are_apart and len(ordered) == len(scene.things):
            for rank, thing in (("first", ordered[0]), ("last", ordered[-1])):
                key = f"{event}es {rank}" if event == "vanish" else f"{event}s {rank}"
                which = f"the thing that {key}"
                yield _topic_name("order", scene, thing, key)
                yield _topic_colour("order", scene, thing, which)
                yield _topic_shape("order", scene, thing, which)
        pairs = [(a, b) for a, b in combinations(ordered, 2) if times(b) - times(a) >= gap]
        if pairs:
            earlier, later = rng.choice(pairs)
            rank, right = rng.choice((("first", earlier), ("last", later)))
            names = [_name(earlier), _name(later)]
            rng.shuffle(names)
            key = f"pair {event}es {rank}" if event == "vanish" else f"pair {event}s {rank}"
            yield _Topic("order", _fill(key, *map(_the, names)), _name(right), (), names, 2)


def _first(thing: Thing) -> int:
    return thing.first


def _last(thing: Thing) -> int:
    return thing.last


def _motion(scene: Scene, rng: random.Random) -> Iterator[_Topic]:
    if scene.num_frames < 4:
        return
    things = [thing for thing in scene.things if thing.num_frames >= MIN_EVENT_FRAMES]
    for thing in things:
        wordings = _fill("direction", _the(_name(thing)))
        yield _Topic("motion", wordings, thing.direction, (), DIRECTIONS)
    if len(things) < len(scene.things):
        return
    for direction in DIRECTIONS:
        movers = [thing for thing in things if thing.direction == direction]
        if len(movers) == 1 and len(things) > 1:
            key = "moves not" if direction == "still" else "moves"
            yield _topic_name("motion", scene, movers[0], key, direction)


def _glyph(scene: Scene, rng: random.Random) -> Iterator[_Topic]:
    for sign in scene.signs:
        kind, alike = ("digit", DIGITS) if sign.figure in DIGITS else ("letter", LETTERS)
        yield _Topic("glyph", _fill(kind), sign.figure, (), alike)
        yield _Topic("glyph", _fill("sign"), sign.figure, (), GLYPHS)


def _needle(scene: Scene, rng: random.Random) -> Iterator[_Topic]:
    needles = [thing for thing in scene.things if scene.is_needle(thing)]
    if len(needles) != 1:
        return
    which = "the thing that flashes up"
    yield _topic_name("needle", scene, needles[0], "needle")
    yield _topic_colour("needle", scene, needles[0], which)
    yield _topic_shape("needle", scene, needles[0], which)
    yield from _features("needle", scene, needles[0])


def _small(scene: Scene, rng: random.Random) -> Iterator[_Topic]:
    small = [thing for thing in scene.things if thing.is_small]
    if len(small) != 1:
        return
    yield _topic_name("small", scene, small[0], "small")
    yield _topic_colour("small", scene, small[0], "the small thing")
    yield _topic_shape("small", scene, small[0], "the small thing")
    yield from _features("small", scene, small[0])


def _cut(scene: Scene, rng: random.Random) -> Iterator[_Topic]:
    kinds = [place.kind for place in scene.places]
    if scene.cut is None:
        yield _Topic("cut", _fill("place"), kinds[0], (), PLACES)
    else:
        yield _Topic("cut", _fill("before"), kinds[0], kinds, PLACES)
        yield _Topic("cut", _fill("after"), kinds[1], kinds, PLACES)
    # Mixed scenes have few cuts: without one, most of them do not ask.
    if scene.num_frames > 1 and (scene.skill == "cut" or scene.cut or rng.random() < 0.4):
        answer = "no" if scene.cut is None else "yes"
        yield _Topic("cut", _fill("has cut"), answer, (), ("yes", "no"), 2)


_TOPICS: dict[str, Callable[[Scene, random.Random], Iterator[_Topic]]] = {
    "attribute": _attribute,
    "count": _count,
    "order": _order,
    "motion": _motion,
    "glyph": _glyph,
    "needle": _needle,
    "small": _small,
    "cut": _cut,
}

SKILLS: tuple[str, ...] = tuple(_TOPICS)
"""The skills; scenes of each are made by `sample_scene`."""


def _words() -> Iterator[str]:
    for wordings in _WORDINGS.values():
        for wording in wordings:
            yield from (word for word in wording.split() if word != "{}")
    yield from ("the", "thing", "things", "that", "flashes", "up", "small")
    yield from ("appears", "vanishes", "first", "last")
    yield from (*COLOURS, *SHAPES, *PLURALS.values(), *NUMBERS, *DIRECTIONS, *GLYPHS, *PLACES)
    yield from ("yes", "no", *OPTIONS)


VOCABULARY: tuple[str, ...] = tuple(sorted(set(_words())))
"""Every word and mark of questions, choices and answers: lower case, but for A to D."""
