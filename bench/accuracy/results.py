"""The result file, and its journal, which an aborted run leaves behind.

    {"format": 1,
     "questions": {"folder", "num_questions", "num_videos", "video_bytes", "fingerprint",
                   "items": [{"id", "video", "skill", "text", "expected", "num_choices", "seed"}]},
     "runs": [{"label", "commands": [...], "environment": {...}, "server": {...},
               "settings": {...}, "answers": {"columns": [...], "rows": [[...], ...]}}]}

A run is one label: one server with one set of flags. Each answer is first added to the journal,
``NAME.answers.jsonl``. The file takes the answers in when a run ends or is interrupted, or when it
is opened after a kill.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from bench.accuracy.questions import HarnessError, Question
from scissor_vllm.loadtest.record import write_json

FORMAT = 1


@dataclass(frozen=True)
class Answer:
    """The answer to one question at one ratio."""

    id: str
    """Id of the question."""
    retention_ratio: float
    text: str | None
    """The model's answer, None after an error."""
    correct: bool | None
    num_video_tokens: int | None
    """Before compression, as the server reported."""
    num_retained_tokens: int | None
    """After compression, as the server reported."""
    prompt_tokens: int | None
    seconds: float
    """Seconds from the request to the whole answer, with the server's queue."""
    error: str | None
    """Reason of a failure, after a second try."""

    @property
    def key(self) -> tuple[str, float]:
        """The key of an answer in its run."""
        return self.id, self.retention_ratio


COLUMNS = tuple(each.name for each in fields(Answer))


@dataclass
class Run:
    """One label's answers and their source."""

    label: str
    environment: dict[str, Any]
    server: dict[str, Any]
    settings: dict[str, Any]
    commands: list[str] = field(default_factory=list)
    answers: dict[tuple[str, float], Answer] = field(default_factory=dict)

    @property
    def ratios(self) -> list[float]:
        """The ratios of the answers, largest first."""
        return sorted({answer.retention_ratio for answer in self.answers.values()}, reverse=True)

    def missing(
        self, questions: Sequence[Question], ratios: Sequence[float]
    ) -> list[tuple[Question, float]]:
        """Return the questions and ratios without an answer, or with an error, by question."""
        return [
            (question, ratio)
            for question in questions
            for ratio in ratios
            if (answer := self.answers.get((question.id, ratio))) is None
            or answer.error is not None
        ]

    def as_dict(self) -> dict[str, Any]:
        """Return the run as the file keeps it."""
        rows = [[asdict(answer)[name] for name in COLUMNS] for answer in self.answers.values()]
        return {
            "label": self.label,
            "commands": self.commands,
            "environment": self.environment,
            "server": self.server,
            "settings": self.settings,
            "answers": {"columns": list(COLUMNS), "rows": rows},
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Run:
        """Return the run that `as_dict` described."""
        columns = content["answers"]["columns"]
        answers = [
            Answer(**dict(zip(columns, row, strict=True))) for row in content["answers"]["rows"]
        ]
        return cls(
            label=content["label"],
            environment=content["environment"],
            server=content["server"],
            settings=content["settings"],
            commands=content["commands"],
            answers={answer.key: answer for answer in answers},
        )


@dataclass
class Results:
    """A result file on disk and its content."""

    path: Path
    questions: dict[str, Any]
    runs: list[Run]

    @property
    def journal(self) -> Path:
        """Path of the journal, to which answers are appended."""
        return self.path.with_suffix(".answers.jsonl")

    @property
    def skills(self) -> dict[str, str]:
        """The skill of each question, by id."""
        return {item["id"]: item["skill"] for item in self.questions["items"]}

    def add(self, run: Run, answer: Answer) -> None:
        """Store an answer, first in the journal."""
        with self.journal.open("a") as journal:
            journal.write(json.dumps({"label": run.label, **asdict(answer)}) + "\n")
        run.answers[answer.key] = answer

    def save(self) -> None:
        """Write the file atomically with the journal's answers, and delete the journal."""
        runs = [run.as_dict() for run in self.runs]
        write_json(self.path, {"format": FORMAT, "questions": self.questions, "runs": runs})
        self.journal.unlink(missing_ok=True)

    def begin(
        self,
        label: str,
        command: str,
        environment: dict[str, Any],
        server: dict[str, Any],
        settings: dict[str, Any],
    ) -> Run:
        """Return the run of this label, new or resumed.

        Raises:
            HarnessError: the label has another server or other settings; the message names both.
        """
        run = next((run for run in self.runs if run.label == label), None)
        if run is None:
            for first_run in self.runs[:1]:
                self._check_same("the other labels have", first_run.settings, settings)
            run = Run(label, environment, server, settings)
            self.runs.append(run)
        for recorded, now in (
            (run.environment, environment),
            (run.server, server),
            (run.settings, settings),
        ):
            self._check_same(f"label {label!r} has", recorded, now)
        if command not in run.commands:
            run.commands.append(command)
        self.save()
        return run

    def _check_same(self, whose: str, recorded: dict[str, Any], now: dict[str, Any]) -> None:
        for key, value in now.items():
            if recorded.get(key) != value:
                raise HarnessError(
                    f"{self.path}: {whose} {key} {recorded.get(key)}, this is {value}: give the "
                    "same again, another --label, or another --output"
                )


def open_results(path: Path, questions: dict[str, Any]) -> Results:
    """Return the file to write to, new or resumed.

    Args:
        path: of the file; its journal is taken in.
        questions: the questions, see `describe_questions`.

    Raises:
        HarnessError: the file has other questions; the message names both.
    """
    if not path.exists():
        return Results(path, questions, [])
    results = read_results(path)
    for key, value in questions.items():
        if key != "items" and (recorded := results.questions.get(key)) != value:
            raise HarnessError(
                f"{path} is about questions with {key} {recorded}, these have {value}: give the "
                "same questions, or another --output"
            )
    return results


def read_results(path: Path) -> Results:
    """Return the file's content, with the answers of its journal.

    Raises:
        HarnessError: the file is not a result of this harness.
    """
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, {FORMAT} is needed")
        runs = [Run.from_dict(run) for run in content["runs"]]
        results = Results(path, content["questions"], runs)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HarnessError(
            f"{path} must be a result file of `python -m bench.accuracy run`: {error!r}"
        ) from error
    _take_in_journal(results)
    return results


def _take_in_journal(results: Results) -> None:
    if not results.journal.exists():
        return
    runs = {run.label: run for run in results.runs}
    lines = results.journal.read_text().split("\n")
    # The last line is incomplete if the process was killed while writing it.
    for line in lines[:-1]:
        entry = json.loads(line)
        answer = Answer(**{name: entry[name] for name in COLUMNS})
        runs[entry["label"]].answers[answer.key] = answer
