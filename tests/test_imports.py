"""Which module may import what: the data's way, one way only."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("vllm", "transformers", "fastapi", "starlette", "pydantic", "av", "cv2", "openai")

ALLOWED = {
    "scissor_vllm": (),
    "scissor_vllm.retention": (),
    "scissor_vllm.compression": (),
    "scissor_vllm.compression.methods": (),
    "scissor_vllm.cli": (),
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

light, heavy = json.load(sys.stdin)
loaded = {module: loaded_after(module) for module in light}
import transformers, vllm
print("RESULT" + json.dumps([loaded, {module: loaded_after(module) for module in heavy}]))
"""
"""Imports each module in a fork of its own; for some, after vLLM, which takes ten seconds."""


@pytest.fixture(scope="module")
def loaded() -> dict[str, set[str]]:
    """The modules that are loaded after each."""
    light = [*ALLOWED, *(module for module in SEPARATE if set(SEPARATE[module]) & set(HEAVY))]
    heavy = [module for module in SEPARATE if module not in light]
    run = subprocess.run(
        [sys.executable, "-c", FORKS],
        input=json.dumps([light, heavy]),
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    found = json.loads(run.stdout.split("RESULT")[1].splitlines()[0])
    return {module: set(names) for part in found for module, names in part.items()}


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
