"""Which module may import what: the data's way, one way only."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("vllm", "transformers", "fastapi", "starlette", "pydantic", "decord", "cv2", "openai")

ALLOWED = {
    "scissor_vllm": (),
    "scissor_vllm.retention": (),
    "scissor_vllm.compression": (),
    "scissor_vllm.compression.methods": (),
    "scissor_vllm.cli": (),
    "scissor_vllm.bench.command": (),
    "scissor_vllm.bench.plot": (),
    "scissor_vllm.models": (),
    "scissor_vllm.demo.client": (),
    "scissor_vllm.demo.model": (),
}
"""Modules that import without any of HEAVY."""

SEPARATE = {
    "scissor_vllm.retention": ("scissor_vllm.processor", "scissor_vllm.server"),
    "scissor_vllm.compression": ("scissor_vllm.processor", "scissor_vllm.tower"),
    "scissor_vllm.pixels": (
        "scissor_vllm.processor",
        "scissor_vllm.server",
        "scissor_vllm.tower",
        "scissor_vllm.models",
    ),
    "scissor_vllm.positions": (
        "scissor_vllm.processor",
        "scissor_vllm.server",
        "scissor_vllm.tower",
        "scissor_vllm.models",
    ),
    "scissor_vllm.reuse": ("scissor_vllm.video", "scissor_vllm.pixels", "vllm"),
    "scissor_vllm.tower": ("scissor_vllm.processor", "scissor_vllm.server", "scissor_vllm.models"),
    "scissor_vllm.processor": ("scissor_vllm.server", "scissor_vllm.models", "scissor_vllm.tower"),
    "scissor_vllm.models.llava_onevision": ("scissor_vllm.server", "scissor_vllm.plugin"),
    "scissor_vllm.video": ("scissor_vllm.processor", "scissor_vllm.server", "scissor_vllm.models"),
}
"""Modules, and what must not come with them: nothing knows what lies before it on the way."""


def loaded_after(module: str) -> set[str]:
    code = f"import sys, {module}; print('\\n'.join(sys.modules))"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    return set(run.stdout.split())


@pytest.mark.parametrize("module", ALLOWED)
def test_importing_it_needs_no_serving_package(module: str) -> None:
    assert not loaded_after(module) & set(HEAVY)


@pytest.mark.parametrize("module", SEPARATE)
def test_it_does_not_import_what_comes_before_it(module: str) -> None:
    assert not loaded_after(module) & set(SEPARATE[module])


def test_the_public_names() -> None:
    import scissor_vllm

    assert sorted(scissor_vllm.__all__) == [
        "CompressedTokens",
        "__version__",
        "compress",
        "compress_batch",
        "num_retained_tokens",
    ]
