"""MVBench: 20 tasks of 200 questions about short videos (Li et al., arXiv 2311.17005).

Annotations: ``json/`` of https://huggingface.co/datasets/OpenGVLab/MVBench, a file a task: a list
of ``video``, ``question``, ``candidates``, ``answer`` and, where a part of the video is meant,
``start`` and ``end``. Videos: the branch ``video`` of that repository, in which those parts are cut
out, as ``NAME_START_END.mp4``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.accuracy.benchmarks.annotations import bracketed_prompt, letter_of, read_json
from bench.accuracy.questions import Question

FOLDERS = {
    "action_antonym": "ssv2_video_mp4",
    "action_count": "perception/videos",
    "action_localization": "sta/sta_video_segment",
    "action_prediction": "star/Charades_segment",
    "action_sequence": "star/Charades_segment",
    "character_order": "perception/videos",
    "counterfactual_inference": "clevrer/video_validation",
    "egocentric_navigation": "vlnqa",
    "episodic_reasoning": "tvqa/video_fps3_hq_segment",
    "fine_grained_action": "Moments_in_Time_Raw/videos",
    "fine_grained_pose": "nturgbd_convert",
    "moving_attribute": "clevrer/video_validation",
    "moving_count": "clevrer/video_validation",
    "moving_direction": "clevrer/video_validation",
    "object_existence": "clevrer/video_validation",
    "object_interaction": "star/Charades_segment",
    "object_shuffle": "perception/videos",
    "scene_transition": "scene_qa/video",
    "state_change": "perception/videos",
    "unexpected_action": "FunQA_test/test",
}
"""The folder of each task's videos on the branch ``video``."""
_HINT = "get json/ of https://huggingface.co/datasets/OpenGVLab/MVBench"


def read(annotations: Path, videos: Path) -> list[Question]:
    """Return the questions of all tasks; a task is a skill.

    Raises:
        HarnessError: a task's file is missing or not of the form.
    """
    return [
        _question(task, number, entry, videos / folder)
        for task, folder in FOLDERS.items()
        for number, entry in enumerate(read_json(annotations / f"{task}.json", _HINT))
    ]


def _question(task: str, number: int, entry: dict[str, Any], folder: Path) -> Question:
    where = f"mvbench/{task}/{number}"
    choices = tuple(map(str, entry["candidates"]))
    return Question(
        id=where,
        video=_video(folder, entry),
        skill=task,
        choices=choices,
        answer=letter_of(str(entry["answer"]), choices, where),
        text=bracketed_prompt(entry["question"], choices),
    )


def _video(folder: Path, entry: dict[str, Any]) -> Path:
    """Return the part that is meant: a name of the branch ``main`` is that of the whole video."""
    whole = folder / entry["video"]
    if "start" not in entry or whole.exists():
        return whole
    return whole.with_name(f"{whole.stem}_{entry['start']}_{entry['end']}.mp4")
