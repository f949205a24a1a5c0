"""Makes clips and questions: ``python -m bench.world.heldout FOLDER --split heldout``.

FOLDER gets videos/NAME.mp4 for each question, and questions.jsonl with a line for each question.
Existing clips are kept, so an interrupted run can be resumed, and a larger `--num-per-skill` adds
clips. Another split, or a changed world, needs another folder.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from bench.world.questions import SKILLS, Question, ask
from bench.world.render import render
from bench.world.scene import FRAMES_PER_SECOND, Scene, sample_scene

SEEDS = {
    "train": range(0, 2**31),
    "validation": range(2**32, 2**32 + 2**31),
    "heldout": range(2**33, 2**33 + 2**31),
}
"""Scene seeds of each split; splits share no seed."""

CAMERAS = ("any", "fixed", "moving")
"""Cameras: as drawn; fixed with sensor noise; or panning."""
_LEAST_NOISE, _LEAST_PAN = 2.0, 1.0

QUESTIONS_FILE = "questions.jsonl"
_ENCODING = {"crf": "18", "preset": "medium"}


@dataclass(frozen=True)
class Item:
    """One question of a split and the clip it is about; a line of questions.jsonl."""

    id: str
    video: str
    """Path of the clip inside the split's folder."""
    skill: str
    text: str
    choices: tuple[str, ...]
    answer: str
    seed: int
    """Of the scene: `sample_scene(seed, skill)`."""


def sample_items(split: str, num_per_skill: int) -> Iterator[Item]:
    """Yield `num_per_skill` questions of each skill, every one about a clip of its own.

    Free answers and choices take turns. The first questions are the same for every number.
    ValueError if the split is unknown.
    """
    if split not in SEEDS:
        raise ValueError(f"split must be one of {', '.join(SEEDS)}, got {split!r}")
    for turn in range(num_per_skill):
        for rank, skill in enumerate(SKILLS):
            seed = SEEDS[split][turn * len(SKILLS) + rank]
            question = _sample_question(seed, skill, has_choices=turn % 2 == 1)
            name = f"{split}-{skill}-{turn:05d}"
            yield Item(
                id=name,
                video=f"videos/{name}.mp4",
                skill=skill,
                text=question.text,
                choices=question.choices,
                answer=question.answer,
                seed=seed,
            )


def _sample_question(seed: int, skill: str, has_choices: bool) -> Question:
    questions = ask(sample_scene(seed, skill), seed, skill)
    fitting = [question for question in questions if bool(question.choices) == has_choices]
    return random.Random(f"pick {seed}").choice(fitting)


def write_clip(scene: Scene, path: Path) -> None:
    """Write the scene as H.264 in mp4, at FRAMES_PER_SECOND; one machine writes the same bytes."""
    frames = render([scene], "cpu")[0].numpy()
    temporary = path.with_suffix(".tmp.mp4")
    _encode(frames, temporary)
    temporary.replace(path)


def _encode(frames: npt.NDArray[np.uint8], path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND, options=_ENCODING)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # The number of threads is fixed, because x264's output depends on it.
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode())


def with_camera(scene: Scene, camera: str) -> Scene:
    """Return the scene with a fixed or panning background; its objects, and so answers, stay."""
    if camera == "any":
        return scene
    if camera == "fixed":
        places = [replace(place, pan=(0.0, 0.0)) for place in scene.places]
    else:
        places = [replace(place, pan=_at_least(place.pan)) for place in scene.places]
    noise = max(scene.noise, _LEAST_NOISE)
    return replace(scene, places=tuple(places), noise=noise, is_noise_still=False)


def _at_least(pan: tuple[float, float]) -> tuple[float, float]:
    across, down = pan
    return (across if abs(across) >= _LEAST_PAN else math.copysign(_LEAST_PAN, across), down)


def write_split(folder: Path, split: str, num_per_skill: int, camera: str = "any") -> None:
    """Write the clips that are missing, then questions.jsonl."""
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    items = list(sample_items(split, num_per_skill))
    for item in tqdm(items, desc=split, unit="clip"):
        path = folder / item.video
        if not path.exists():
            write_clip(with_camera(sample_scene(item.seed, item.skill), camera), path)
    lines = "".join(json.dumps(asdict(item)) + "\n" for item in items)
    temporary = folder / f"{QUESTIONS_FILE}.tmp"
    temporary.write_text(lines)
    temporary.replace(folder / QUESTIONS_FILE)


def main() -> None:
    """Write a split."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--split", choices=("heldout", "validation"), default="heldout")
    parser.add_argument("--num-per-skill", type=int, default=100)
    parser.add_argument(
        "--camera", choices=CAMERAS, default="any", help="(default: %(default)s, as drawn)"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    write_split(args.folder, args.split, args.num_per_skill, args.camera)


if __name__ == "__main__":
    main()
