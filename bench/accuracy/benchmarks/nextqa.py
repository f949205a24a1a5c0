"""NExT-QA, multiple choice: why, how and when in everyday videos (Xiao et al., CVPR 2021).

https://github.com/doc-doc/NExT-QA, ``dataset/nextqa/``: ``val.csv`` or ``test.csv`` with the
columns ``video, frame_count, width, height, question, answer, qid, type, a0, ..., a4``, and
``map_vid_vidorID.json``, the path of each video without its suffix. Videos: those of VidOR.
"""

from __future__ import annotations

import csv
from pathlib import Path
from string import ascii_uppercase

from bench.accuracy.benchmarks.annotations import lettered_prompt, read_json
from bench.accuracy.questions import HarnessError, Question

COLUMNS = {"video", "question", "answer", "qid", "type", "a0", "a1", "a2", "a3", "a4"}
_HINT = "get dataset/nextqa/ of https://github.com/doc-doc/NExT-QA"


def read(annotations: Path, videos: Path) -> list[Question]:
    """Return the questions of a split; a skill is a type, as CW: causal, why.

    Args:
        annotations: ``val.csv`` or ``test.csv``, ``map_vid_vidorID.json`` beside it.
        videos: the folder that the map's paths begin in, or that holds all videos side by side.

    Raises:
        HarnessError: a file is missing or not of the form.
    """
    try:
        with annotations.open(newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise HarnessError(
            f"--annotations must be val.csv or test.csv, got {annotations} ({error}): {_HINT}"
        ) from error
    if not rows or not rows[0].keys() >= COLUMNS:
        raise HarnessError(
            f"{annotations} must have the columns {', '.join(sorted(COLUMNS))}: {_HINT}"
        )
    paths = read_json(annotations.with_name("map_vid_vidorID.json"), _HINT)
    return [_question(row, videos, paths) for row in rows]


def _question(row: dict[str, str], videos: Path, paths: dict[str, str]) -> Question:
    choices = tuple(row[f"a{number}"] for number in range(5))
    beside = videos / f"{row['video']}.mp4"
    mapped = videos / f"{paths.get(row['video'], row['video'])}.mp4"
    return Question(
        id=f"nextqa/{row['video']}/{row['qid']}",
        video=beside if beside.exists() else mapped,
        skill=row["type"],
        choices=choices,
        answer=ascii_uppercase[int(row["answer"])],
        text=lettered_prompt(row["question"], choices),
    )
