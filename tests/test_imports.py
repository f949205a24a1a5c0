"""Which module may import what: the data's way, one way only."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.preloaded import Preloaded

HEAVY = ("vllm", "transformers", "fastapi", "starlette", "pydantic", "av", "cv2", "openai",
         "prometheus_client")  # fmt: skip

ALLOWED = {
    "scissor_vllm": (),
    "scissor_vllm.retention": (),
    "scissor_vllm.compression": (),
    "scissor_vllm.compression.methods": (),
    "scissor_vllm.cli": (),
    # They run before `scissor-vllm serve` names the directory of metrics, which prometheus_client
    # looks for as it is imported.
    "scissor_vllm.cli.serve": (),
    "scissor_vllm.allocator": (),
    "scissor_vllm.metrics": (),
    "scissor_vllm.loadtest.command": (),
    "scissor_vllm.loadtest.plot": (),
    "scissor_vllm.models": (),
    "scissor_vllm.demo.client": (),
    "scissor_vllm.demo.model": (),
}
"""Modules that import without any of HEAVY."""

ENTRY = "scissor_vllm.frontend.endpoint"
PROCESSOR = "scissor_vllm.frontend.processor"
MODELS = "scissor_vllm.models"
WORKER = "scissor_vllm.worker.video_compression"

SEPARATE = {
    "scissor_vllm.retention": (PROCESSOR, ENTRY),
    "scissor_vllm.compression": (PROCESSOR, WORKER),
    "scissor_vllm.frontend.frame_transport": (PROCESSOR, ENTRY, WORKER, MODELS),
    "scissor_vllm.worker.positions": (PROCESSOR, ENTRY, WORKER, MODELS),
    "scissor_vllm.frontend.frame_cache": (
        "scissor_vllm.frontend.video.loader",
        "scissor_vllm.frontend.frame_transport",
        "vllm",
    ),
    WORKER: (PROCESSOR, ENTRY, MODELS),
    PROCESSOR: (ENTRY, MODELS, WORKER),
    "scissor_vllm.models.llava_onevision": (ENTRY, "scissor_vllm.plugin"),
    "scissor_vllm.frontend.video.loader": (PROCESSOR, ENTRY, MODELS),
}
"""Modules, and what must not come with them: nothing knows what lies before it on the way."""


FORKS = """
import importlib, json, os, sys

def loaded_after(module):
    read, write = os.pipe()
    if os.fork() == 0:
        importlib.import_module(module)
        os.write(write, json.dumps(sorted(sys.modules)).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as answer:
        return json.load(answer)

import torch
print(json.dumps({module: loaded_after(module) for module in json.load(sys.stdin)}))
"""
"""Imports each module in a fork of its own after PyTorch, which takes seconds."""


def write_loaded_after(module: str, path: Path) -> None:
    """Import a module, and write the names of all that are loaded."""
    importlib.import_module(module)
    path.write_text(json.dumps(sorted(sys.modules)))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """The modules that are loaded after each, by those that may come with vLLM after vLLM."""
    light = [*ALLOWED, *(module for module in SEPARATE if set(SEPARATE[module]) & set(HEAVY))]
    run = subprocess.run(
        [sys.executable, "-c", FORKS],
        input=json.dumps(light),
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    names = json.loads(run.stdout)
    folder = tmp_path_factory.mktemp("imports")
    for module in SEPARATE:
        if module not in light:
            path, log = folder / f"{module}.json", folder / f"{module}.log"
            process = Preloaded(write_loaded_after, module, path, environment=os.environ, log=log)
            assert process.wait(120) == 0, log.read_text()
            names[module] = json.loads(path.read_text())
    return {module: set(all_names) for module, all_names in names.items()}


@pytest.mark.parametrize("module", ALLOWED)
def test_importing_it_needs_no_serving_package(loaded: dict[str, set[str]], module: str) -> None:
    assert module in loaded[module]
    assert not loaded[module] & set(HEAVY)


@pytest.mark.parametrize("module", SEPARATE)
def test_it_does_not_import_what_comes_before_it(loaded: dict[str, set[str]], module: str) -> None:
    assert module in loaded[module]
    assert not loaded[module] & set(SEPARATE[module])


def test_the_public_names() -> None:
    import scissor_vllm

    assert sorted(scissor_vllm.__all__) == [
        "CompressedTokens",
        "__version__",
        "compress",
        "num_retained_tokens",
    ]
