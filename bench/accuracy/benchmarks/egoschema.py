"""EgoSchema: one question about each of 500 videos of 3 minutes (Mangalam et al., NeurIPS 2023).

https://github.com/egoschema/EgoSchema: ``questions.json``, a list of ``q_uid``, ``question`` and
``option 0`` to ``option 4``, and ``subset_answers.json``, the number of the right option by
``q_uid`` for the 500 questions whose answers are public; videos ``Q_UID.mp4``.
"""

from __future__ import annotations

from pathlib import Path
from string import ascii_uppercase

from bench.accuracy.benchmarks.annotations import lettered_prompt, read_json
from bench.accuracy.questions import HarnessError, Question

_HINT = "get it from https://github.com/egoschema/EgoSchema"


def read(annotations: Path, videos: Path) -> list[Question]:
    """Return the questions whose answers are public; all are one skill.

    Raises:
        HarnessError: a file is missing, or an answer has no question.
    """
    questions = {q["q_uid"]: q for q in read_json(annotations / "questions.json", _HINT)}
    answers = read_json(annotations / "subset_answers.json", _HINT)
    if unknown := answers.keys() - questions.keys():
        raise HarnessError(
            f"questions.json in {annotations} must have every question of subset_answers.json, "
            f"{len(unknown)} of {len(answers)} are missing, one is {min(unknown)}: {_HINT}"
        )
    questions_read = []
    for uid, answer in answers.items():
        entry = questions[uid]
        choices = tuple(entry[f"option {number}"] for number in range(5))
        questions_read.append(
            Question(
                id=f"egoschema/{uid}",
                video=videos / f"{uid}.mp4",
                skill="egoschema",
                choices=choices,
                answer=ascii_uppercase[int(answer)],
                text=lettered_prompt(entry["question"], choices),
            )
        )
    return questions_read
