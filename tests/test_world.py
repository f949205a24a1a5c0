"""The made-up video world: its answers follow from its pictures, and cannot be guessed."""

from __future__ import annotations

import json
import pickle
import re
from collections import Counter
from dataclasses import replace
from functools import lru_cache
from itertools import combinations
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from bench.numbered_clips import decode_all
from bench.world.heldout import SEEDS, Item, sample_items, write_clip, write_split
from bench.world.questions import NUMBERS, PLURALS, SKILLS, VOCABULARY, Question, ask
from bench.world.render import NUM_CLASSES, class_of, cover, pack, render
from bench.world.scene import (
    COLOURS,
    FRAME_SIZE,
    GLYPHS,
    MAX_NEEDLE_FRAMES,
    MIN_NUM_FRAMES,
    NUM_FRAMES,
    PLACES,
    SHAPES,
    Scene,
    Thing,
    sample_scene,
)

MIXED = (None, *SKILLS)
KINDS = [(skill, NUM_FRAMES) for skill in MIXED] + [
    (None, 1),
    ("attribute", 1),
    ("order", 4),
    ("motion", 4),
    (None, 8),
    ("needle", 8),
]


def scenes_of(skill: str | None, count: int, num_frames: int = NUM_FRAMES) -> list[Scene]:
    return [sample_scene(seed, skill, num_frames) for seed in range(count)]


# An oracle that knows no scene: it reads the question and looks at what covers the cells.


class Witness:
    """What can be seen in one clip, from `cover` alone."""

    def __init__(self, classes: torch.Tensor) -> None:
        self.num_frames = len(classes)
        self.places = [PLACES[int(frame[frame < len(PLACES)].mode().values)] for frame in classes]
        self.frames: dict[str, list[int]] = {}
        self.centres: dict[str, list[tuple[float, float]]] = {}
        self.area: dict[str, int] = {}
        for index in classes.unique().tolist():
            if index < len(PLACES):
                continue
            name = self._name(index)
            masks = classes == index
            self.frames[name] = masks.any(-1).any(-1).nonzero()[:, 0].tolist()
            cells = [masks[frame].nonzero().float().mean(0) for frame in self.frames[name]]
            self.centres[name] = [(float(cell[1]), float(cell[0])) for cell in cells]
            self.area[name] = int(masks.sum((-2, -1)).max())
        self.things = [name for name in self.frames if " " in name]

    @staticmethod
    def _name(index: int) -> str:
        index -= len(PLACES)
        if index >= len(SHAPES) * len(COLOURS):
            return GLYPHS[index - len(SHAPES) * len(COLOURS)]
        return f"{COLOURS[index % len(COLOURS)]} {SHAPES[index // len(COLOURS)]}"

    def direction(self, name: str) -> str:
        (ax, ay), (bx, by) = self.centres[name][0], self.centres[name][-1]
        dx, dy = bx - ax, by - ay
        if max(abs(dx), abs(dy)) < 2:
            return "still"
        if abs(dx) > abs(dy):
            return "right" if dx > 0 else "left"
        return "down" if dy > 0 else "up"

    def flash(self) -> str:
        (name,) = [name for name in self.things if len(self.frames[name]) <= MAX_NEEDLE_FRAMES]
        return name

    def event(self, text: str, names: list[str]) -> str:
        frame = 0 if "appear" in text else -1
        if "vanish" in text:
            assert all(self.frames[name][-1] < self.num_frames - 1 for name in names)
        times = [self.frames[name][frame] for name in names]
        time = min(times) if "first" in text else max(times)
        assert times.count(time) == 1
        return names[times.index(time)]

    def referent(self, text: str) -> str:
        """Which thing a question about a colour or a shape means."""
        if "flashes up" in text:
            return self.flash()
        if "appear" in text or "vanish" in text:
            return self.event(text, self.things)
        if "small" in text:
            return min(self.things, key=self.area.__getitem__)
        words = re.findall(rf"the ({'|'.join(SHAPES + COLOURS)})\b", text)
        (name,) = [name for name in self.things if words[0] in name.split()]
        return name

    def answer(self, text: str) -> str:
        pair = re.search(r", the (\w+ \w+) or the (\w+ \w+) \?", text)
        mover = re.search(r"(?:moves|goes) (\w+) \?", text)
        if "sign" in text:
            (glyph,) = self.frames.keys() - self.things
            return glyph
        if text.startswith(("how many", "count")):
            return self.count(text)
        if re.search(r"place|where are you|cut", text):
            return self.place(text)
        if pair:
            return self.event(text, [pair[1], pair[2]])
        if re.search(r"colour (of|is|does)", text):
            return self.referent(text).split()[0]
        if re.search(r"shape (of|is|does)", text):
            return self.referent(text).split()[1]
        if re.search(r"(does the \w+ \w+ (move|go))", text):
            named = re.search(r"does the (\w+ \w+) (?:move|go)", text)
            assert named
            return self.direction(named[1])
        if mover or "still" in text or "not move" in text:
            wanted = mover[1] if mover else "still"
            (name,) = [name for name in self.things if self.direction(name) == wanted]
            return name
        if "flashes" in text or "moment" in text:
            return self.flash()
        if "small" in text:
            return min(self.things, key=self.area.__getitem__)
        return self.event(text, self.things)

    def count(self, text: str) -> str:
        singular = {plural: shape for shape, plural in PLURALS.items()}
        words = [singular.get(word, word) for word in text.split()]
        wanted = [word for word in words if word in SHAPES + COLOURS]
        names = [name for name in self.things if all(word in name.split() for word in wanted)]
        return NUMBERS[len(names) - 1]

    def place(self, text: str) -> str:
        has_cut = len(set(self.places)) > 1
        if text.startswith(("is there", "does the place", "can you")):
            return "yes" if has_cut else "no"
        if "before" in text or "first" in text:
            return self.places[0]
        if "after" in text or "last" in text:
            return self.places[-1]
        assert not has_cut
        return self.places[0]


def split_options(question: Question) -> str:
    return re.split(r" A ", question.text)[0]


@pytest.mark.parametrize(("skill", "num_frames"), KINDS)
def test_answers_are_those_an_onlooker_gives(skill: str | None, num_frames: int) -> None:
    scenes = scenes_of(skill, 12, num_frames)
    for scene, classes in zip(scenes, cover(scenes, 22, "cpu"), strict=True):
        witness = Witness(classes)
        for question in ask(scene, scene.seed):
            right = question.answer
            if question.choices:
                right = question.choices["ABCD".index(question.answer)]
            assert witness.answer(split_options(question)) == right, question


@pytest.mark.parametrize("skill", SKILLS)
def test_a_scene_of_a_skill_can_be_asked_about_it(skill: str) -> None:
    for num_frames in {MIN_NUM_FRAMES[skill], 8, NUM_FRAMES}:
        for scene in scenes_of(skill, 50, num_frames):
            questions = ask(scene, scene.seed, skill)
            assert {question.skill for question in questions} == {skill}
            assert {bool(question.choices) for question in questions} == {True, False}


def test_a_mixed_scene_has_ten_questions_and_all_skills_come_up() -> None:
    counts = [Counter(q.skill for q in ask(scene, 0)) for scene in scenes_of(None, 100)]
    assert min(sum(count.values()) for count in counts) >= 10
    for skill in SKILLS:
        assert sum(skill in count for count in counts) >= 20


# The same from the same, and nothing shared between splits.


def test_equal_arguments_give_equal_scenes_questions_and_pictures() -> None:
    for skill in MIXED:
        first, second = sample_scene(7, skill), sample_scene(7, skill)
        assert first == second
        assert ask(first, 3, skill) == ask(second, 3, skill)
        assert torch.equal(render([first], "cpu"), render([second], "cpu"))


def test_a_scene_survives_pickling() -> None:
    scene = sample_scene(5)
    assert pickle.loads(pickle.dumps(scene)) == scene


def test_the_scenes_of_known_seeds_have_not_changed() -> None:
    scene = sample_scene(2**33, "needle")
    needle = scene.things[0]
    known = (scene.places[0].kind, needle.colour, needle.figure, needle.first, needle.last)
    assert known == ("snow", "red", "circle", 1, 2)


def test_no_seed_is_in_two_splits() -> None:
    for left, right in combinations(SEEDS.values(), 2):
        assert left.stop <= right.start or right.stop <= left.start


@pytest.mark.parametrize("split", ["validation", "heldout"])
def test_a_split_draws_from_its_own_seeds_only_and_each_once(split: str) -> None:
    seeds = [item.seed for item in sample_items(split, 50)]
    assert all(seed in SEEDS[split] for seed in seeds)
    assert len(set(seeds)) == len(seeds)


def test_splits_share_no_scene() -> None:
    def look(scene: Scene) -> object:
        return scene.places, scene.sprites

    shown = [
        look(sample_scene(SEEDS[split][index], skill))
        for split in SEEDS
        for skill in SKILLS
        for index in range(40)
    ]
    assert len(set(shown)) == len(shown)


# Nothing can be guessed.


def sample_of(skill: str, has_choices: bool) -> list[Item]:
    fitting = [item for item in validation_items() if item.skill == skill]
    return [item for item in fitting if bool(item.choices) == has_choices]


@lru_cache
def validation_items() -> list[Item]:
    return list(sample_items("validation", 1600))


@pytest.mark.parametrize("skill", SKILLS)
def test_no_answer_is_right_often(skill: str) -> None:
    for has_choices, most in ((False, 0.25), (True, 0.38)):
        items = sample_of(skill, has_choices)
        (_, count), *_ = Counter(item.answer for item in items).most_common()
        assert count / len(items) <= most


@pytest.mark.parametrize("skill", SKILLS)
def test_no_letter_is_favoured(skill: str) -> None:
    for num_options in (2, 4):
        items = [item for item in sample_of(skill, True) if len(item.choices) == num_options]
        if len(items) < 100:
            continue
        counts = Counter(item.answer for item in items)
        spread = 4 * (1 / num_options / len(items)) ** 0.5
        for letter in "ABCD"[:num_options]:
            assert abs(counts[letter] / len(items) - 1 / num_options) <= spread


@pytest.mark.parametrize(
    ("skill", "answers"),
    [
        ("count", NUMBERS),
        ("motion", ("left", "right", "up", "down", "still")),
        ("cut", (*PLACES, "yes", "no")),
    ],
)
def test_the_answers_of_a_skill_are_equally_frequent(skill: str, answers: tuple[str, ...]) -> None:
    counts = Counter(item.answer for item in sample_of(skill, False) if item.answer in answers)
    groups = [("yes", "no"), PLACES] if skill == "cut" else [answers]
    for group in groups:
        total = sum(counts[answer] for answer in group)
        for answer in group:
            share = 1 / len(group)
            assert abs(counts[answer] / total - share) <= 4 * (share / total) ** 0.5


def test_options_are_different_and_the_answer_is_one_of_them() -> None:
    for skill in MIXED:
        for scene in scenes_of(skill, 40):
            for question in ask(scene, 1):
                if question.choices:
                    assert len(set(question.choices)) == len(question.choices) in (2, 4)
                    assert question.answer in "ABCD"[: len(question.choices)]
                    offered = " ".join(
                        f"{letter} {choice}"
                        for letter, choice in zip("ABCD", question.choices, strict=False)
                    )
                    assert question.text.endswith(offered)


def test_the_vocabulary_is_complete_small_and_used() -> None:
    used: set[str] = set()
    for skill in MIXED:
        for scene in scenes_of(skill, 300):
            for question in ask(scene, scene.seed, skill):
                words = question.text.split()
                assert len(words) < 40
                used.update(words, question.answer.split(), *map(str.split, question.choices))
    assert used == set(VOCABULARY)
    assert len(VOCABULARY) <= 150
    assert all(word.islower() or not word.isalpha() or word in "ABCD" for word in VOCABULARY)


# Scenes.


@pytest.mark.parametrize("skill", MIXED)
def test_things_are_different_inside_the_picture_and_apart(skill: str | None) -> None:
    for scene in scenes_of(skill, 100):
        names = [(sprite.figure, sprite.colour) for sprite in scene.sprites]
        assert len(set(names)) == len(names)
        for frame in range(scene.num_frames):
            visible = [sprite for sprite in scene.sprites if sprite.is_visible(frame)]
            for sprite in visible:
                for middle in sprite.centre(frame):
                    assert sprite.size / 2 <= middle <= FRAME_SIZE - sprite.size / 2
            for left, right in combinations(visible, 2):
                gap = np.subtract(left.centre(frame), right.centre(frame))
                assert np.hypot(*gap) > (left.size + right.size) / 2


@pytest.mark.parametrize(("skill", "num_frames"), [("nonsense", 16), ("needle", 4), (None, 0)])
def test_a_scene_that_cannot_be_is_refused(skill: str | None, num_frames: int) -> None:
    with pytest.raises(ValueError, match=r"one of|choose"):
        sample_scene(0, skill, num_frames)


# Pictures.


def without(scene: Scene, thing: Thing) -> Scene:
    return replace(scene, sprites=tuple(other for other in scene.sprites if other != thing))


def changed(scene: Scene, thing: Thing) -> torch.Tensor:
    """Where the picture changes if the thing is taken away: bool (T, H, W)."""
    here, away = render([scene, without(scene, thing)], "cpu").int()
    return (here - away).abs().amax(-1) > 1


@pytest.mark.parametrize("skill", MIXED)
def test_a_thing_is_seen_in_its_frames_and_nowhere_else(skill: str | None) -> None:
    for scene in scenes_of(skill, 3):
        for thing in scene.sprites:
            seen = changed(scene, thing)
            frames = seen.flatten(1).any(1).nonzero()[:, 0].tolist()
            assert frames == list(range(thing.first, thing.last))
            for frame in frames:
                rows, columns = seen[frame].nonzero(as_tuple=True)
                x, y = thing.centre(frame)
                away = torch.hypot(columns + 0.5 - x, rows + 0.5 - y)
                assert away.max() <= thing.size / 2 * 1.15 + 2


def test_a_needle_is_seen_in_one_or_two_frames() -> None:
    for scene in scenes_of("needle", 10):
        (needle,) = [thing for thing in scene.things if scene.is_needle(thing)]
        assert 1 <= changed(scene, needle).flatten(1).any(1).sum() <= MAX_NEEDLE_FRAMES


def test_things_have_the_colour_they_are_called_by() -> None:
    typical: dict[str, list[np.ndarray]] = {colour: [] for colour in COLOURS}
    scenes = [sample_scene(seed, "attribute", 1) for seed in range(200)]
    for scene, (frame,) in zip(scenes, render(scenes, "cpu").numpy(), strict=True):
        for thing in scene.things:
            if thing.figure != "ring":
                middle = frame[int(thing.y) - 1 : int(thing.y) + 2, int(thing.x) - 1 :][:, :3]
                typical[thing.colour].append(middle.mean((0, 1)))
    means = {colour: np.mean(pixels, axis=0) for colour, pixels in typical.items()}
    for colour, pixels in typical.items():
        for pixel in pixels:
            assert min(means, key=lambda name: np.abs(means[name] - pixel).sum()) == colour


def test_shapes_and_glyphs_look_different_from_each_other() -> None:
    thing = replace(sample_scene(0, "small").things[0], size=30.0, x=80.0, y=80.0, angle=0.0)
    blank = replace(sample_scene(0, "small", 1), sprites=(), noise=0.0)
    for figures, colour, size in ((SHAPES, "red", 14.0), (GLYPHS, "plate", 36.0)):
        variants = [replace(thing, figure=figure, colour=colour, size=size) for figure in figures]
        scenes = [
            replace(blank, sprites=(replace(sprite, first=0, last=1),)) for sprite in variants
        ]
        pictures = render(scenes, "cpu")[:, 0].float()
        for left, right in combinations(pictures, 2):
            assert ((left - right).abs().amax(-1) > 60).sum() >= 12


def test_a_still_scene_without_movers_shows_one_picture() -> None:
    for scene in scenes_of("small", 5):
        (frames,) = render([scene], "cpu")
        assert scene.is_still
        assert torch.equal(frames, frames[:1].expand_as(frames))


def test_neighbouring_cells_of_a_background_are_alike_but_not_equal() -> None:
    scenes = [replace(scene, sprites=()) for scene in scenes_of("cut", 20)]
    cells = render(scenes, "cpu").float().unflatten(3, (11, 16)).unflatten(2, (11, 16))
    means = cells.mean((3, 5))
    beside = (means[:, :, :, 1:] - means[:, :, :, :-1]).norm(dim=-1)
    assert (beside > 0.2).float().mean() > 0.95
    assert beside.median() < means.flatten(1, 3).std(1).norm(dim=-1).median() * 2


def test_a_batch_looks_like_its_scenes_one_by_one() -> None:
    scenes = [sample_scene(seed, skill, 8) for seed, skill in enumerate(MIXED * 8)]
    batch = render(scenes, "cpu")
    assert batch.shape == (len(scenes), 8, FRAME_SIZE, FRAME_SIZE, 3)
    assert batch.dtype == torch.uint8
    classes = cover(scenes, 11, "cpu")
    for index in range(0, len(scenes), 7):
        alone = render([scenes[index]], "cpu")[0]
        assert (batch[index].int() - alone.int()).abs().max() <= 1
        assert torch.equal(classes[index], cover([scenes[index]], 11, "cpu")[0])


def test_packed_scenes_stand_for_scenes() -> None:
    scenes = scenes_of(None, 3)
    packed = pickle.loads(pickle.dumps(pack(scenes)))
    assert torch.equal(render(packed, "cpu"), render(scenes, "cpu"))
    assert torch.equal(cover(packed, 11, "cpu"), cover(scenes, 11, "cpu"))


def test_scenes_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="same number of frames"):
        render([sample_scene(0), sample_scene(0, num_frames=4)], "cpu")


@pytest.mark.parametrize("skill", MIXED)
def test_each_cell_that_a_thing_fills_is_covered_by_it(skill: str | None) -> None:
    (scene,) = scenes_of(skill, 1)
    (classes,) = cover([scene], 11, "cpu")
    assert 0 <= int(classes.min()) <= int(classes.max()) < NUM_CLASSES
    for thing in scene.sprites:
        share = changed(scene, thing).float().unflatten(2, (11, 16)).unflatten(1, (11, 16))
        share = share.mean((2, 4))
        mine = classes == class_of(thing)
        assert mine[share > 0.55].all()
        assert not mine[share == 0].any()
    frame = 0 if scene.cut is None else scene.cut - 1
    empty = [PLACES.index(scene.places[0].kind)]
    assert classes[frame].unique()[:1].tolist() == empty


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_paints_what_a_cpu_paints() -> None:
    scenes = [sample_scene(seed, skill) for seed, skill in enumerate(MIXED)]
    cuda, cpu = render(scenes, "cuda").cpu().int(), render(scenes, "cpu").int()
    assert (cuda - cpu).abs().max() <= 2
    assert ((cuda - cpu).abs() > 1).float().mean() < 1e-5
    assert (cover(scenes, 11, "cuda").cpu() != cover(scenes, 11, "cpu")).float().mean() < 1e-3


# Clips.


def decode(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate == 4
    return np.stack(decode_all(path))


@pytest.mark.parametrize("skill", SKILLS)
def test_a_clip_decodes_to_the_frames_that_were_painted(skill: str, tmp_path: Path) -> None:
    scene = sample_scene(SEEDS["validation"][0], skill)
    write_clip(scene, tmp_path / "clip.mp4")
    painted = render([scene], "cpu")[0].numpy().astype(float)
    decoded = decode(tmp_path / "clip.mp4")
    assert decoded.shape == painted.shape
    errors = ((decoded - painted) ** 2).mean((1, 2, 3))
    assert (10 * np.log10(255**2 / errors)).min() >= 28


def test_a_needle_survives_coding(tmp_path: Path) -> None:
    for scene in scenes_of("needle", 6):
        write_clip(scene, tmp_path / "clip.mp4")
        decoded = torch.from_numpy(decode(tmp_path / "clip.mp4")).int()
        (needle,) = [thing for thing in scene.things if scene.is_needle(thing)]
        here, away = render([scene, without(scene, needle)], "cpu").int()
        mask = changed(scene, needle)
        assert ((decoded - here).abs().float())[mask].mean() < 0.35 * (
            (decoded - away).abs().float()[mask].mean()
        )


def test_equal_scenes_give_equal_files(tmp_path: Path) -> None:
    scene = sample_scene(1)
    write_clip(scene, tmp_path / "one.mp4")
    write_clip(scene, tmp_path / "other.mp4")
    assert (tmp_path / "one.mp4").read_bytes() == (tmp_path / "other.mp4").read_bytes()


def test_a_split_goes_on_where_it_stopped(tmp_path: Path) -> None:
    write_split(tmp_path, "heldout", 1)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "videos").iterdir()}
    assert len(before) == len(SKILLS)
    write_split(tmp_path, "heldout", 2)
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "videos").iterdir()}
    assert after.items() >= before.items()
    lines = (tmp_path / "questions.jsonl").read_text().splitlines()
    items = [json.loads(line) for line in lines]
    assert len(items) == 2 * len(SKILLS)
    assert {tmp_path / item["video"] for item in items} == after.keys()
    for item in items:
        assert list(item) == ["id", "video", "skill", "text", "choices", "answer", "seed"]
        scene = sample_scene(item["seed"], item["skill"])
        questions = ask(scene, item["seed"], item["skill"])
        assert (
            Question(item["skill"], item["text"], item["answer"], tuple(item["choices"]))
            in questions
        )
