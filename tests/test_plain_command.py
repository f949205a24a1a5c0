"""Examples that cannot start `scissor-vllm serve` set in vLLM's options what that command sets."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scissor_vllm.cli.serve import PLUGIN
from scissor_vllm.demo.model import demo_model_path
from scissor_vllm.orphans import VARIABLE as END_WITH_PARENT
from tests.deployment import METRICS, TWO_GPUS, Example, chart, kserve, stages
from tests.preloaded import Preloaded
from tests.proxies import ROOT
from tests.vllm_parser import write_started

# A LLaVA-OneVision, as the model of the examples. Its config is at hand.
MODEL = str(demo_model_path())
PUBLISHED = "llava-hf/llava-onevision-qwen2-7b-ov-hf"
CACHE_OFF = ("--mm-processor-cache-gb", "0")


def page(*options: str) -> Example:
    """Return what the page on serving starts, with options and what its text adds for them."""
    text = (ROOT / "docs" / "serving.md").read_text()
    section = text.partition("\n## Plain vllm serve\n")[2].partition("\n## ")[0]
    (block,) = re.findall(r"^```sh\n(.*?)^```$", section, re.M | re.S)
    words = shlex.split(block.replace("\\\n", " ").replace("$(mktemp -d)", "/tmp/metrics"))
    start = words.index("vllm")
    assert words[0] == "export"
    pairs = [word.split("=", 1) for word in words[:start] if word != "export"]
    said: dict[tuple[str, ...], str] = {
        TWO_GPUS: r"With tensor parallelism of LLaVA's models, add\s+`([^`]*)`",
        CACHE_OFF: r"With `--mm-processor-cache-gb 0` and 16 CPUs or more, add `([^`]*)`",
    }
    added = re.findall(said[options], section)[0].split() if options else []
    return Example([*words[start + 1 :], *options, *added], dict(pairs))


def started(tmp_path: Path, *commands: tuple[str, list[str]]) -> list[dict[str, dict[str, Any]]]:
    """Return what the commands give vLLM's server, in an environment that sets nothing of it."""
    ours = ("VLLM_", "SCISSOR_", "PROMETHEUS_", "MALLOC_", "THP_", "GLIBC_")
    environment = {name: text for name, text in os.environ.items() if not name.startswith(ours)}
    path, log = tmp_path / "started.json", tmp_path / "log"
    local = [
        (program, [MODEL if word == PUBLISHED else word for word in command])
        for program, command in commands
    ]
    process = Preloaded(write_started, local, path, environment=environment, log=log)
    assert process.wait(120) == 0, log.read_text()
    found: list[dict[str, dict[str, Any]]] = json.loads(path.read_text())
    return found


def set_by_our_command(tmp_path: Path, *options: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the arguments and the variables that differ from those of `vllm serve`."""
    # An open server would be warned of, and the warning noted in a variable.
    command = ["serve", PUBLISHED, "--host", "127.0.0.1", *options]
    plain, ours = started(tmp_path, ("vllm", command), ("scissor-vllm", command))
    changed = {
        name: ours["arguments"][name]
        for name, value in plain["arguments"].items()
        if ours["arguments"][name] != value
    }
    environment: dict[str, str] = ours["environment"]
    # Its processes would outlive a server that was killed. In a container all of them end.
    del environment[END_WITH_PARENT]
    return changed, environment


@pytest.mark.parametrize(
    ("options", "more"),
    [
        ((), set()),
        (TWO_GPUS, {"mm_encoder_tp_mode", "enable_shm_tensor_arena"}),
        (CACHE_OFF, {"api_server_count"}),
    ],
)
def test_what_our_command_sets_is_seen(
    options: tuple[str, ...], more: set[str], tmp_path: Path
) -> None:
    changed, environment = set_by_our_command(tmp_path, *options)
    assert changed.keys() >= {*more, "mm_processor_kwargs", "ec_manager_config", "shutdown_timeout"}
    assert changed["mm_processor_kwargs"] == {"tower_merging_max_ratio": 0.1}
    assert environment.keys() >= {"VLLM_PLUGINS", "VLLM_VIDEO_LOADER_BACKEND", METRICS}


def holds(name: str, value: Any, of_example: Any) -> bool:
    """Return whether an example has a value that our command sets, or more of it."""
    if name == "shutdown_timeout":
        return bool(of_example >= value)
    if isinstance(value, dict):
        return of_example is not None and value.items() <= of_example.items()
    return bool(of_example == value)


@pytest.mark.parametrize(
    ("example", "options"),
    [(chart, ()), (chart, TWO_GPUS), (page, ()), (page, TWO_GPUS), (page, CACHE_OFF)],
)
def test_an_example_of_plain_vllm_serve_sets_what_our_command_sets(
    example: Callable[..., Example], options: tuple[str, ...], tmp_path: Path
) -> None:
    made = example(*options)
    changed, environment = set_by_our_command(tmp_path, *options)
    plain, ours = started(tmp_path, ("vllm", made.command), ("scissor-vllm", made.command))
    arguments = plain["arguments"]
    assert arguments["tensor_parallel_size"] == (2 if options == TWO_GPUS else 1)
    for name, value in changed.items():
        assert holds(name, value, arguments[name]), (name, value, arguments[name])
    # Our command has nothing to add, whatever it makes of the example's other options.
    assert {name: ours["arguments"][name] for name in arguments} == arguments
    for name, text in environment.items():
        in_force = made.environment[name]
        if name == METRICS:
            assert in_force
        elif name == "VLLM_PLUGINS":
            # Which other plugins load is the operator's choice.
            assert PLUGIN in in_force.split(",")
        else:
            assert in_force == text, name


def test_kserve_starts_our_command_and_takes_back_nothing_that_it_sets(tmp_path: Path) -> None:
    (container,) = kserve()["spec"]["predictor"]["containers"]
    assert "command" not in container
    assert json.loads(dict(stages("Dockerfile")[-1])["ENTRYPOINT"]) == [
        "/opt/scissor/entrypoint.sh"
    ]
    entry = (ROOT / "deploy" / "entrypoint.sh").read_text()
    assert entry.endswith('\nexec scissor-vllm "$@"\n')
    changed, _ = set_by_our_command(tmp_path)
    (ours,) = started(tmp_path, ("scissor-vllm", container["args"]))
    for name, value in changed.items():
        assert holds(name, value, ours["arguments"][name]), name
