"""Fixtures: clips, and one server at a time."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.numbered_clips import make_clip
from scissor_vllm.demo.model import demo_model_path
from tests.families import Family, tiny_families
from tests.serving import SCISSOR, STOCK, OneServer, Server

DEMO_FLAGS = (
    "--served-model-name=demo",
    "--enforce-eager",
    "--dtype=float32",
    "--max-model-len=8192",
    "--max-num-batched-tokens=8192",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that runs everything."""
    parser.addoption("--slow", action="store_true", help="also run tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is slow, and skip GPU tests where there is no GPU."""
    if not config.getoption("--slow"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Clips that differ in resolution, number of frames and codec, and one picture."""
    folder = tmp_path_factory.mktemp("clips")
    made = {
        "long": make_clip(folder / "long.mp4", width=640, height=360, num_frames=64),
        "short": make_clip(folder / "short.mp4", width=320, height=240, num_frames=7),
        "tall": make_clip(folder / "tall.mp4", codec="mpeg4", width=176, height=320, num_frames=20),
        "webm": make_clip(folder / "webm.webm", codec="vp9", width=192, height=144, num_frames=12),
        "twin": make_clip(folder / "twin.mp4", width=160, height=120, num_frames=7, gop=3),
        "one": make_clip(folder / "one.mp4", width=96, height=96, num_frames=1),
    }
    picture = np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8)
    cv2.imwrite(str(folder / "picture.png"), picture)
    return {**made, "picture": folder / "picture.png"}


NUM_FRAMES = {"long": 32, "short": 7, "tall": 20, "webm": 12, "twin": 7, "one": 1}
"""Frames that vLLM samples of each clip: 32 at most."""


def _tokens_per_frame(config: Path) -> int:
    vision = json.loads(config.read_text())["vision_config"]
    return math.ceil(vision["image_size"] // vision["patch_size"] / 2) ** 2


TOKENS_PER_FRAME = _tokens_per_frame(demo_model_path() / "config.json")
"""Of the demo model."""
DEMO_CLIP_TOKENS = 16 * TOKENS_PER_FRAME
"""Of the demo's clip: all its frames are sampled."""


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OneServer]:
    """Servers, one at a time."""
    pool = OneServer(tmp_path_factory.mktemp("servers"))
    yield pool
    pool.stop()


@pytest.fixture
def server(servers: OneServer) -> Server:
    """``scissor-vllm serve demo``."""
    return servers.get(*SCISSOR, "demo")


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Family]:
    """A tiny model of each family but the demo's."""
    return tiny_families(tmp_path_factory.mktemp("families"))


@pytest.fixture(scope="session")
def resaved_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with its weights named as transformers 5 saves a model that it made.

    Stock vLLM does not load it: its tower is without the ``vision_model`` level of the hub's.
    """
    folder = tmp_path_factory.mktemp("resaved") / "model"
    shutil.copytree(demo_model_path(), folder)
    weights = load_file(folder / "model.safetensors")
    hub = "vision_tower.vision_model."
    assert any(name.startswith(hub) for name in weights)
    renamed = {name.replace(hub, "vision_tower."): weight for name, weight in weights.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def stock_answers(servers: OneServer, clips: dict[str, Path]) -> dict[str, Any]:
    """What vLLM without any plugin answers to each clip, a picture and plain text."""
    server = servers.get(
        *STOCK,
        str(demo_model_path()),
        *DEMO_FLAGS,
        environment={
            "VLLM_PLUGINS": "",
            "VLLM_VIDEO_LOADER_BACKEND": "opencv",
            "VLLM_CPU_KVCACHE_SPACE": "1",
        },
    )
    # Two questions begin with one video: a salt of its own keeps each from the other's prefix.
    return {
        name: server.ask(*parts, extra_body={"cache_salt": name})
        for name, parts in stock_questions(clips).items()
    }


def stock_questions(clips: dict[str, Path]) -> dict[str, tuple[Path | str, ...]]:
    """Return the questions whose answers at ratio 1.0 must be vLLM's own."""
    videos: dict[str, tuple[Path | str, ...]] = {
        # vLLM's OpenCV loader finds no frame in a clip of one.
        name: (clips[name], "What is this?")
        for name in NUM_FRAMES
        if name != "one"
    }
    return {
        **videos,
        "picture": (clips["picture"], "What is this?"),
        "text": ("Hello",),
        # Videos of unlike length in one batch end stock vLLM's engine, so these are alike.
        "several": (clips["short"], clips["picture"], clips["twin"], "Compare."),
    }
