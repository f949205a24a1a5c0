"""MLVU: questions about videos of 3 minutes to 2 hours (Zhou et al., arXiv 2406.04264).

https://huggingface.co/datasets/MLVU/MVLU: annotations ``MLVU/json/``, a file a task, a list of
``video``, ``duration``, ``question``, ``candidates``, ``answer``, ``question_type``; videos
``MLVU/video/``, a folder a task. The seven multiple-choice tasks of the development set; its two
tasks of free text are scored by a model and left out.
"""

from __future__ import annotations

from pathlib import Path

from bench.accuracy.benchmarks.annotations import bracketed_prompt, letter_of, read_json
from bench.accuracy.questions import Question

TASKS = (
    "1_plotQA",
    "2_needle",
    "3_ego",
    "4_count",
    "5_order",
    "6_anomaly_reco",
    "7_topic_reasoning",
)
_HINT = "get MLVU/json/ of https://huggingface.co/datasets/MLVU/MVLU"


def read(annotations: Path, videos: Path) -> list[Question]:
    """Return the questions of the seven tasks; a task is a skill.

    Raises:
        HarnessError: a task's file is missing or not of the form.
    """
    questions = []
    for task in TASKS:
        for number, entry in enumerate(read_json(annotations / f"{task}.json", _HINT)):
            where = f"mlvu/{task}/{number}"
            choices = tuple(map(str, entry["candidates"]))
            questions.append(
                Question(
                    id=where,
                    video=videos / task / entry["video"],
                    skill=task.partition("_")[2],
                    choices=choices,
                    answer=letter_of(str(entry["answer"]), choices, where),
                    text=bracketed_prompt(entry["question"], choices),
                )
            )
    return questions
