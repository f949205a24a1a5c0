"""Shared by the readers: reading of files, errors, and two kinds of prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from bench.accuracy.questions import HarnessError

LETTER_ONLY = "Answer with the option's letter from the given choices directly."


def read_json(path: Path, hint: str) -> Any:
    """Return the content of a JSON file.

    Raises:
        HarnessError: the file is missing or no JSON; the message ends with `hint`.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise HarnessError(
            f"--annotations must hold {path.name}, got {path.parent} ({error}): {hint}"
        ) from error


def letter_of(answer: str, choices: Sequence[str], where: str) -> str:
    """Return the letter of the choice that is the answer.

    Raises:
        HarnessError: the answer is none of the choices.
    """
    if answer not in choices:
        raise HarnessError(f"{where}: the answer {answer!r} must be one of {list(choices)}")
    return ascii_uppercase[list(choices).index(answer)]


def bracketed_prompt(question: str, choices: Sequence[str]) -> str:
    """Return the prompt of MVBench and, after it, MLVU."""
    options = [f"({letter}) {c}" for letter, c in zip(ascii_uppercase, choices, strict=False)]
    return "\n".join([f"Question: {question}", "Options:", *options, "Only give the best option."])


def lettered_prompt(question: str, choices: Sequence[str]) -> str:
    """Return lmms-eval's prompt for benchmarks whose authors published none."""
    options = [f"{letter}. {c}" for letter, c in zip(ascii_uppercase, choices, strict=False)]
    return "\n".join([question, *options, LETTER_ONLY])
