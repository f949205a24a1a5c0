"""Which module may import what: the data's way, one way only."""

from __future__ import annotations

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
