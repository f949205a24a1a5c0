"""The result file: raw values of every request, saved after each cell.

    {"format": 1, "environment": {...}, "runs": [
      {"label", "commands": [...], "server": {...}, "settings": {...}, "cells": [
        {"retention_ratios", "max_concurrency", "request_rate_per_second", "started_at",
         "duration_seconds", "requests": [{...}], "server_metrics": {...}, "kv_cache": {...}}]}]}

``environment`` is the client's host. A run is one label: one server with one set of flags.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scissor_vllm.loadtest.record import write_json
from scissor_vllm.loadtest.workload import Cell

FORMAT = 1
_OF_EVERY_RUN = ("output_len", "ignore_eos", "question", "seed", "videos")
"""Settings that all runs of a file must share."""


class ResultError(Exception):
    """A result file cannot be used; the message names the remedy."""


@dataclass
class ResultFile:
    """A result file on disk and its content."""

    path: Path
    content: dict[str, Any]

    @property
    def runs(self) -> list[dict[str, Any]]:
        """The runs in order of their start."""
        runs: list[dict[str, Any]] = self.content["runs"]
        return runs

    def save(self) -> None:
        """Write the file, whole or not at all."""
        write_json(self.path, self.content)


def read_results(path: Path) -> ResultFile:
    """Return the file's content.

    Raises:
        ResultError: it is not a result of the load test.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ResultError(f"{path} is no result file of the load test: {error}") from error
    if not isinstance(content, dict) or "runs" not in content or content.get("format") != FORMAT:
        raise ResultError(
            f"{path} is no result file of the load test: format {FORMAT} is needed; measure again "
            "with `scissor-vllm bench`"
        )
    return ResultFile(path, content)


def open_results(
    path: Path, environment: dict[str, Any], *, append: bool, overwrite: bool
) -> ResultFile:
    """Return the file to write to, new or, with `append`, as it is.

    Raises:
        ResultError: the file exists and neither flag was given, or it is of another host.
    """
    if not path.exists() or overwrite:
        return ResultFile(path, {"format": FORMAT, "environment": environment, "runs": []})
    if not append:
        raise ResultError(
            f"{path} exists: --append adds to it and goes on where an aborted run stopped, "
            "--overwrite replaces it"
        )
    file = read_results(path)
    for key, value in environment.items():
        if (recorded := file.content["environment"].get(key)) != value:
            raise ResultError(
                f"{path} was measured with {key} {recorded}, this is {value}: write to another "
                "file; `bench table` and `bench plot` take several"
            )
    return file


def open_run(
    file: ResultFile, label: str, command: str, server: dict[str, Any], settings: dict[str, Any]
) -> dict[str, Any]:
    """Return the run of this label, new or resumed.

    Raises:
        ResultError: the label was measured on another server or with other settings, or another
            label of the file with another workload.
    """
    run = next((run for run in file.runs if run["label"] == label), None)
    if run is None:
        for first_run in file.runs[:1]:
            for key in _OF_EVERY_RUN:
                if (recorded := first_run["settings"].get(key)) != settings[key]:
                    raise ResultError(
                        f"{file.path} was measured with {key} {recorded}, this is {settings[key]}: "
                        "the runs of a file are compared, so give the same again, or write to "
                        "another file"
                    )
        run = {
            "label": label,
            "commands": [command],
            "server": server,
            "settings": settings,
            "cells": [],
        }
        file.runs.append(run)
        return run
    for recorded, now in ((run["server"], server), (run["settings"], settings)):
        for key, value in now.items():
            if recorded.get(key) != value:
                raise ResultError(
                    f"{file.path} has label {label!r} with {key} {recorded.get(key)}, this is "
                    f"{value}: give the same again, or another --label"
                )
    if command not in run["commands"]:
        run["commands"].append(command)
    return run


def find_cell(run: dict[str, Any], cell: Cell) -> dict[str, Any] | None:
    """Return the results of a cell, None without any."""
    return next((measured for measured in run["cells"] if Cell.from_dict(measured) == cell), None)
