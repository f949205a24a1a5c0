"""Video-MME without subtitles: 900 videos of 11 seconds to an hour (Fu et al., arXiv 2405.21075).

https://huggingface.co/datasets/lmms-lab/Video-MME, to which the authors point:
``videomme/test-00000-of-00001.parquet`` with the columns ``video_id, duration, domain,
sub_category, url, videoID, question_id, task_type, question, options, answer``; videos
``data/VIDEOID.mp4``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bench.accuracy.questions import HarnessError, Question

_INSTRUCTION = (
    "Select the best answer to the following multiple-choice question based on the video. Respond "
    "with only the letter (A, B, C, or D) of the correct option."
)


def read(annotations: Path, videos: Path) -> list[Question]:
    """Return all questions; a skill is a class of length: short, medium, long, 900 questions each.

    Raises:
        HarnessError: pyarrow, which reads parquet, is missing, or the file is not of the form.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise HarnessError("Video-MME is a parquet file: pip install pyarrow") from error
    try:
        rows = pyarrow.parquet.read_table(annotations).to_pylist()
    except (OSError, ValueError) as error:
        raise HarnessError(
            f"--annotations must be Video-MME's parquet file, got {annotations} ({error}): get "
            "videomme/ of https://huggingface.co/datasets/lmms-lab/Video-MME"
        ) from error
    return from_rows(rows, videos)


def from_rows(rows: Iterable[Mapping[str, Any]], videos: Path) -> list[Question]:
    """Return the questions of the file's rows."""
    return [
        Question(
            id=f"videomme/{row['question_id']}",
            video=_video(videos, row["videoID"]),
            skill=row["duration"],
            # An option begins with its letter: "A. Apples."
            choices=tuple(option.partition(". ")[2] or option for option in row["options"]),
            answer=row["answer"],
            text="\n".join([_INSTRUCTION, row["question"], *row["options"], "The best answer is:"]),
        )
        for row in rows
    ]


def _video(videos: Path, name: str) -> Path:
    candidates = [videos / f"{name}.{suffix}" for suffix in ("mp4", "MP4", "mkv")]
    return next((path for path in candidates if path.exists()), candidates[0])
