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
from hypothesis import settings
from safetensors.torch import load_file, save_file

from bench.numbered_clips import make_clip
from scissor_vllm.demo.model import demo_model_path
from tests.collector import Collector, collecting
from tests.engines import stop_children
from tests.families import Family, build_qwen3_vl, tiny_families
from tests.serving import SCISSOR, STOCK, OneServer, Server

DEMO_FLAGS = (
    "--served-model-name=demo",
    "--enforce-eager",
    "--dtype=float32",
    "--max-model-len=8192",
    "--max-num-batched-tokens=8192",
)


SERVER_FIXTURES = (
    *("servers", "stock_answers", "plugin_server", "server", "page_server", "qwen"),
    "ending_server",
)
"""In the order in which tests start servers: each is started once."""
ENGINE_FIXTURES = ("families", "engines")
SERVERS, ENGINES = "servers", "engines"
"""Groups of tests, each for one process of pytest: one server at a time, and one engine.

Each file of other tests is a group, so that what its tests share is made once.
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that runs everything."""
    parser.addoption(
        "--slow",
        action="store_true",
        help="also run tests marked slow, and 500 examples of each property in place of 50",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Choose how many examples of a property are tried."""
    settings.register_profile("quick", max_examples=50, deadline=None, derandomize=True)
    settings.register_profile("full", max_examples=500, deadline=None, derandomize=True)
    settings.load_profile("full" if config.getoption("--slow") else "quick")


LONG_FILES = (
    *("test_compress", "test_family_processors", "test_world", "test_load", "test_budget"),
    *("test_accuracy", "test_convert", "test_interpreted_kernels", "test_video", "test_train_demo"),
)
"""They start before the other files, so that both processes of pytest end at about one time."""


@pytest.hookimpl(tryfirst=True)  # Before xdist reads the groups.
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is slow, skip GPU tests where there is no GPU, and order by servers."""
    if not config.getoption("--slow"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    items.sort(key=_group)


def _group(item: pytest.Item) -> int:
    """Put an item into its group, and return its place among the tests."""
    fixtures = getattr(item, "fixturenames", ())
    places = [place for place, name in enumerate(SERVER_FIXTURES) if name in fixtures]
    if places:
        item.add_marker(pytest.mark.server)
        item.add_marker(pytest.mark.xdist_group(SERVERS))
        return max(places)
    if any(name in fixtures for name in ENGINE_FIXTURES):
        item.add_marker(pytest.mark.server)
        item.add_marker(pytest.mark.xdist_group(ENGINES))
        return len(SERVER_FIXTURES)
    file = item.path.stem
    item.add_marker(pytest.mark.xdist_group(file))
    place = LONG_FILES.index(file) if file in LONG_FILES else len(LONG_FILES)
    return len(SERVER_FIXTURES) + 1 + place


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


DEFAULT_RATIO = 0.3
MIN_RATIO = 0.05
MAX_TOKENS = 31 * TOKENS_PER_FRAME
DEFAULT_BUDGET = 33 * TOKENS_PER_FRAME
"""What the operator of ``plugin_server`` chose."""


@pytest.fixture
def plugin_server(servers: OneServer) -> Server:
    """vLLM's own command with our plugins named, and clients trusted.

    Its video loader is stock vLLM's, so that pixels are the same to the bit.
    """
    chosen = {
        "retention_ratio": DEFAULT_RATIO,
        "min_retention_ratio": MIN_RATIO,
        "max_video_tokens": MAX_TOKENS,
        "max_retained_video_tokens": DEFAULT_BUDGET,
        "video_compression": "uniform",
        "allow_compress_images": True,
    }
    return servers.get(
        *STOCK,
        str(demo_model_path()),
        *DEMO_FLAGS,
        f"--mm-processor-kwargs={json.dumps(chosen)}",
        "--trust-request-mm-kwargs",
        environment={"VLLM_PLUGINS": "scissor_vllm", "VLLM_VIDEO_LOADER_BACKEND": "opencv"},
    )


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    """What gets the traces of ``page_server``."""
    with collecting() as listening:
        yield listening


@pytest.fixture(scope="session")
def metrics_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The metrics directory of ``page_server``."""
    return tmp_path_factory.mktemp("metrics")


PAGE_KEY = "x"
"""The key of ``page_server``, which the tests' client sends."""
PAGE_STEP_TOKENS = 3072
"""Of one step of ``page_server``, so also of a video: fewer than an uncompressed one may have."""


@pytest.fixture
def page_server(servers: OneServer, collector: Collector, metrics_folder: Path) -> Server:
    """A server with all that an operator may add.

    It has the page, a key, a minimum ratio, two API-server processes, a metrics directory that the
    operator named, tracing, and a short step.
    """
    return observed_server(servers, collector, metrics_folder)


def observed_server(servers: OneServer, collector: Collector, metrics_folder: Path) -> Server:
    """Return a server as ``page_server`` is, with this directory for metrics."""
    return servers.get(
        *(*SCISSOR, "demo", "--web-page", f"--api-key={PAGE_KEY}", "--min-retention-ratio=0.02"),
        *("--auto-retention-ratio=0.05:1.0", "--target-ttft-ms=1", "--allow-compress-images"),
        *("--api-server-count=2", f"--otlp-traces-endpoint={collector.url}"),
        f"--max-num-batched-tokens={PAGE_STEP_TOKENS}",
        environment={
            "PROMETHEUS_MULTIPROC_DIR": str(metrics_folder),
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
            "OTEL_BSP_SCHEDULE_DELAY": "200",
        },
    )


QWEN_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


@pytest.fixture(scope="session")
def qwen_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3-VL, for ``qwen``."""
    folder = tmp_path_factory.mktemp("qwen") / "model"
    build_qwen3_vl(folder)
    (folder / "template.jinja").write_text(QWEN_TEMPLATE)
    return folder


@pytest.fixture
def qwen(servers: OneServer, qwen_folder: Path) -> Server:
    """A server of a tiny Qwen3-VL, with the page."""
    return servers.get(
        *(*SCISSOR, str(qwen_folder), "--served-model-name=demo", "--web-page"),
        *("--enforce-eager", "--dtype=float32", "--max-model-len=8192", "--allow-compress-images"),
        f"--chat-template={qwen_folder / 'template.jinja'}",
    )


@pytest.fixture
def ending_server(servers: OneServer, qwen: Server) -> Iterator[Server]:
    """The last server of all, for a test that ends it."""
    yield qwen
    servers.stop()


@pytest.fixture(scope="session")
def engines() -> Iterator[None]:
    """Keep tests that ask offline engines together, so that their children are started once."""
    yield
    stop_children()


@pytest.fixture(scope="session")
def families(engines: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Family]:
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
        # Not compressed, since the request does not ask for it.
        "pictures": (*(clips["picture"],) * 4, "What are these?"),
        "text": ("Hello",),
        # Videos of unlike length in one batch end stock vLLM's engine, so these are alike.
        "several": (clips["short"], clips["picture"], clips["twin"], "Compare."),
    }
