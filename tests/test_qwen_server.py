"""Qwen-VL over HTTP: a clip is sampled as vLLM samples it, decoded once, and encoded once."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.model_shapes import qwen_vl
from bench.numbered_clips import make_clip
from scissor_vllm import num_retained_tokens
from scissor_vllm.loadtest.clips import ClipShape, make_clips
from tests.serving import SCISSOR, OneServer, Server

FPS, NUM_FRAMES = 12, 48


@dataclass(frozen=True)
class Served:
    """A server, and how many tokens two frames of 128 x 96 pixels are."""

    server: Server
    tokens_per_patch: int

    @property
    def num_tokens(self) -> int:
        """Of the clip, of which two frames a second are sampled."""
        return NUM_FRAMES // FPS * self.tokens_per_patch


@pytest.fixture
def qwen3(qwen: Server) -> Served:
    """Qwen3-VL."""
    return Served(qwen, 3 * 4)


@pytest.fixture
def qwen2_5(servers: OneServer, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """Qwen2.5-VL, with random weights."""
    folder = tmp_path_factory.getbasetemp() / "qwen2.5-vl-tiny"
    if not folder.exists():
        qwen_vl.build("qwen2.5-vl-tiny", folder)
    server = servers.get(
        *(*SCISSOR, str(folder), "--served-model-name=demo", "--load-format=dummy"),
        *("--enforce-eager", "--dtype=float32", "--max-model-len=8192", "--enable-mm-embeds"),
    )
    return Served(server, 3 * 5)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four seconds."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    return make_clip(path, width=128, height=96, num_frames=NUM_FRAMES, fps=FPS)


def counts(server: Server) -> dict[str, float]:
    """Return how often each stage ran, and what the caches found."""
    stage, cache = "scissor_vllm:video_stage_seconds_count", "scissor_vllm:video_cache_hits_total"
    return {
        **{name: server.counter(stage, stage=name) for name in ("decode", "tower", "compress")},
        **{name: server.counter(cache, cache=name) for name in ("frames", "features")},
    }


def check_one_decoding(served: Served, clip: Path) -> None:
    server = served.server
    server.ask(clip, "First.", ratio=0.9)
    before = counts(server)
    for ratio in (0.61, 0.33, 0.12):
        report = server.ask(clip, "Again?", ratio=ratio).video_compression
        assert report["num_video_tokens"] == served.num_tokens
        assert report["num_retained_video_tokens"] == num_retained_tokens(served.num_tokens, ratio)
    after = counts(server)
    assert {name: after[name] - before[name] for name in after} == {
        **{"decode": 0, "tower": 0, "compress": 3},
        **{"frames": 3, "features": 3},
    }


def check_prompts(served: Served, clip: Path) -> None:
    server = served.server
    whole = server.ask(clip, "How many?").usage.prompt_tokens
    for ratio in (0.5, 0.01):
        fewer = whole - served.num_tokens + num_retained_tokens(served.num_tokens, ratio)
        assert server.ask(clip, "How many?", ratio=ratio).usage.prompt_tokens == fewer


def test_a_clip_asked_about_at_three_ratios_is_decoded_and_encoded_once(
    qwen3: Served, clip: Path
) -> None:
    check_one_decoding(qwen3, clip)


def test_what_a_prompt_counts_follows_from_the_ratio(qwen3: Served, clip: Path) -> None:
    check_prompts(qwen3, clip)


@pytest.mark.slow
def test_the_same_holds_for_qwen2_5_vl(qwen2_5: Served, clip: Path) -> None:
    check_one_decoding(qwen2_5, clip)
    check_prompts(qwen2_5, clip)


@pytest.mark.slow
def test_an_answer_and_the_metrics_tell_how_many_patches_the_tower_computed(
    servers: OneServer, qwen_folder: Path, tmp_path: Path
) -> None:
    server = servers.get(
        *(*SCISSOR, str(qwen_folder), "--served-model-name=demo", "--tower-merging-max-ratio=0.2"),
        *("--enforce-eager", "--dtype=float32", "--max-model-len=8192"),
        f"--chat-template={qwen_folder / 'template.jinja'}",
    )
    num_frames = 64
    shape = ClipShape(width=320, height=192, num_frames=num_frames, fps=8)
    patches, computed = (
        "scissor_vllm:video_patches_total",
        ("scissor_vllm:computed_video_patches_total"),
    )
    told = {}
    for camera in ("fixed", "moving"):
        (clip,) = make_clips(tmp_path, 1, replace(shape, camera=camera))
        for ratio in (0.5, 0.2):
            report = server.ask(clip.path, "What moves?", ratio=ratio).video_compression
            told[camera, ratio] = report
            num_tokens = report["num_video_tokens"]
            assert report["num_retained_video_tokens"] == num_retained_tokens(num_tokens, ratio)
    assert [key for key, report in told.items() if "num_video_patches" in report] == [
        ("fixed", 0.2)
    ]
    report = told["fixed", 0.2]
    assert report["num_video_patches"] == 4 * report["num_video_tokens"]
    share = report["num_computed_video_patches"] / report["num_video_patches"]
    assert 1 / 3 < share < 0.9
    # Both videos could have had patches left out.
    num_moving = 4 * told["moving", 0.2]["num_video_tokens"]
    assert server.counter(patches) == report["num_video_patches"] + num_moving
    assert server.counter(computed) == report["num_computed_video_patches"] + num_moving


def encoded(array: np.ndarray) -> str:
    """Return an array as vLLM takes one over HTTP."""
    file = BytesIO()
    np.save(file, array)
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.slow
def test_a_video_sent_as_embeddings_is_vllms(
    qwen2_5: Served, tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = json.loads(
        (tmp_path_factory.getbasetemp() / "qwen2.5-vl-tiny" / "config.json").read_text()
    )
    num_tokens, width = 12, config["vision_config"]["out_hidden_size"]
    part = {
        "type": "video_embeds",
        "video_embeds": {
            "video_embeds": encoded(np.ones((num_tokens, width), np.float32)),
            "video_grid_thw": encoded(np.array([2, 4, 6])),
        },
    }
    body: dict[str, Any] = {
        "model": "demo",
        "max_tokens": 2,
        "messages": [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}],
    }
    path = "/v1/chat/completions"
    status, content = qwen2_5.server.post(path, json.dumps(body).encode())
    assert status == 200, content
    answer = json.loads(content)
    assert "video_compression" not in answer
    # Beside the text there are its tokens, and those that begin and end a video.
    text_only = qwen2_5.server.ask("What?").usage.prompt_tokens
    assert answer["usage"]["prompt_tokens"] == text_only + num_tokens + 2
    status, content = qwen2_5.server.post(
        path, json.dumps({**body, "retention_ratio": 0.5}).encode()
    )
    assert status == 400
    assert b"must be 1.0 or absent for videos sent as embeddings" in content
