"""The questions of a folder: a ``questions.jsonl`` and the videos that it names.

A line is one question: ``id``, ``video`` (a path from the folder, or absolute), ``skill``, ``text``
(the whole text to send, with the choices), ``choices`` (empty for a free answer), ``answer``
(words, or the letter of a choice), and if known the ``seed`` of the clip.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from scissor_vllm.loadtest.record import write_text

QUESTIONS = "questions.jsonl"


class HarnessError(Exception):
    """Accuracy cannot be measured or shown; the message names the remedy."""


@dataclass(frozen=True)
class Question:
    """One question about one video."""

    id: str
    video: Path
    skill: str
    text: str
    """Text to send with the video."""
    answer: str
    """The expected words, or the letter of the expected choice."""
    choices: tuple[str, ...] = ()
    """The choices of the letters, for scoring; the text has them too."""
    seed: int | None = None

    def as_item(self, folder: Path) -> dict[str, Any]:
        """Return the question's entry in a result file, without paths outside of the folder."""
        inside = self.video.is_relative_to(folder)
        video = self.video.relative_to(folder) if inside else Path(*self.video.parts[-2:])
        return {
            "id": self.id,
            "video": str(video),
            "skill": self.skill,
            "text": self.text,
            "expected": self.answer,
            "num_choices": len(self.choices),
            "seed": self.seed,
        }


def read_questions(folder: Path, *, num_per_skill: int | None = None) -> list[Question]:
    """Return the questions of a folder, grouped by video.

    Args:
        folder: with ``questions.jsonl``.
        num_per_skill: number of first questions of each skill; None: all.

    Raises:
        HarnessError: there is no question, or one is malformed; the message names the line.
    """
    path = folder / QUESTIONS
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise HarnessError(
            f"--questions must name a folder with {QUESTIONS}, got {folder} ({error}): make one "
            "with `python -m bench.world.heldout FOLDER`, or of a public benchmark with "
            "`python -m bench.accuracy convert`"
        ) from error
    questions = [_parse(f"{path}:{n}", line, folder) for n, line in enumerate(lines, 1) if line]
    repeated = [name for name, count in Counter(q.id for q in questions).items() if count > 1]
    if not questions or repeated:
        found = f"twice the id {repeated[0]!r}" if repeated else "no question"
        raise HarnessError(f"{path} must hold questions with an id each, got {found}")
    chosen, taken = [], Counter[str]()
    for question in questions:
        taken[question.skill] += 1
        if num_per_skill is None or taken[question.skill] <= num_per_skill:
            chosen.append(question)
    # So a server with a frame cache decodes each video once.
    first = {question.video: n for n, question in reversed(list(enumerate(chosen)))}
    return sorted(chosen, key=lambda question: first[question.video])


def _parse(where: str, line: str, folder: Path) -> Question:
    try:
        entry = json.loads(line)
        question = Question(
            id=str(entry["id"]),
            video=folder / entry["video"],
            skill=str(entry["skill"]),
            text=str(entry["text"]),
            answer=str(entry["answer"]),
            choices=tuple(map(str, entry.get("choices") or ())),
            seed=entry.get("seed"),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise HarnessError(
            f"{where} must be a JSON object with id, video, skill, text and answer: {error!r}"
        ) from error
    letters = ascii_uppercase[: len(question.choices)]
    if question.choices and (len(question.answer) != 1 or question.answer not in letters):
        raise HarnessError(
            f"{where}: of {len(question.choices)} choices the answer must be a letter of "
            f"{letters}, got {question.answer!r}"
        )
    return question


def write_questions(folder: Path, questions: Iterable[Question]) -> Path:
    """Write ``questions.jsonl``, whole or not at all, and return its path."""
    lines = [
        json.dumps({**asdict(question), "video": str(question.video)}) for question in questions
    ]
    write_text(folder / QUESTIONS, "\n".join(lines) + "\n")
    return folder / QUESTIONS


def describe_questions(folder: Path, questions: Sequence[Question]) -> dict[str, Any]:
    """Return a result file's description of its questions, with an item for each.

    ``fingerprint`` identifies texts and expected answers, ``video_bytes`` the files.

    Raises:
        HarnessError: a video is missing.
    """
    items = [question.as_item(folder) for question in questions]
    text = "\n".join(sorted(json.dumps(item, sort_keys=True) for item in items))
    sizes = {}
    for question in questions:
        try:
            sizes[question.video] = question.video.stat().st_size
        except OSError as error:
            raise HarnessError(
                f"question {question.id!r} is about a video that is missing, {question.video}: "
                "complete the folder"
            ) from error
    return {
        "folder": folder.resolve().name,
        "num_questions": len(questions),
        "num_videos": len(sizes),
        "video_bytes": sum(sizes.values()),
        "fingerprint": hashlib.sha256(text.encode()).hexdigest()[:16],
        "items": items,
    }
