"""The files of `deploy/` as the tests read them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml  # type: ignore[import-untyped]

from tests.proxies import DEPLOY

KUBERNETES = DEPLOY / "kubernetes"
TWO_GPUS = ("--tensor-parallel-size", "2")
METRICS = "PROMETHEUS_MULTIPROC_DIR"


def production_stack() -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the chart's values and the one model in them."""
    values = yaml.safe_load((KUBERNETES / "production-stack.yaml").read_text())
    (model,) = values["servingEngineSpec"]["modelSpec"]
    return values, model


def kserve() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((KUBERNETES / "kserve.yaml").read_text())
    return found


def stages(file: str) -> list[list[tuple[str, str]]]:
    """Return a Dockerfile's stages as lists of instruction and arguments."""
    text = (DEPLOY / file).read_text()
    text = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    found: list[list[tuple[str, str]]] = []
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if line:
            instruction, arguments = line.split(maxsplit=1)
            if instruction == "FROM":
                found.append([])
            found[-1].append((instruction, arguments))
    return found


def variables(stage: list[tuple[str, str]], known: Mapping[str, str]) -> dict[str, str]:
    """Return what a stage's ENV instructions set."""
    pairs = [
        pair.split("=", 1) for name, text in stage if name == "ENV" for pair in shlex.split(text)
    ]
    return {
        name: re.sub(r"\$(\w+)", lambda match: known.get(match[1], ""), value)
        for name, value in pairs
    }


@dataclass
class Example:
    """A command that starts plain `vllm serve`, and the variables in its environment."""

    command: list[str]
    environment: dict[str, str]


def chart(*options: str) -> Example:
    """Return what production-stack's chart starts, whose command no value changes.

    For two GPUs the values have what their comment adds.
    """
    text = (KUBERNETES / "production-stack.yaml").read_text()
    if options == TWO_GPUS:
        text = re.sub(r"^( +)# (- .*)$", r"\1\2", text, flags=re.M)
        text, num_changed = re.subn("(?<=tensorParallelSize: )1$", "2", text, flags=re.M)
        assert num_changed == 1
    (model,) = yaml.safe_load(text)["servingEngineSpec"]["modelSpec"]
    config = model["vllmConfig"]
    assert config["enablePrefixCaching"]
    flags = {
        "--host": "0.0.0.0",
        "--port": "8000",
        "--tensor-parallel-size": str(config["tensorParallelSize"]),
        "--gpu_memory_utilization": str(config["gpuMemoryUtilization"]),
    }
    return Example(
        [
            *("serve", model["modelURL"], "--enable-prefix-caching"),
            *(word for pair in flags.items() for word in pair),
            *config["extraArgs"],
        ],
        {
            **variables(stages("Dockerfile")[-1], {}),
            METRICS: config["prometheusMultiprocDir"],
            **{variable["name"]: variable["value"] for variable in model["env"]},
        },
    )
