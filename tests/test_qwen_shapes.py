"""``bench/model_shapes/qwen_vl.py`` and the plans that compare servers on its models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor
from vllm.multimodal.video_prune import evs, vidcom2

from bench import serving
from bench.model_shapes import qwen_vl
from scissor_vllm import num_retained_tokens

ROOT = Path(__file__).parent.parent
PLANS = {
    "qwen2.5-vl-7b": ROOT / "bench" / "serving-qwen2_5-vl-7b.toml",
    "qwen3-vl-8b": ROOT / "bench" / "serving-qwen3-vl-8b.toml",
}
COUNTS: dict[str, Any] = {
    "evs": evs.compute_retained_tokens_count,
    "vidcom2": vidcom2.compute_retained_tokens_count,
}


def grid_of_the_clips(folder: Path, config: dict[str, Any]) -> tuple[int, int]:
    """Return temporal patches and tokens of each, as the processor makes them of 4 seconds."""
    processor = AutoProcessor.from_pretrained(folder).video_processor
    frames = torch.zeros(qwen_vl.NUM_FRAMES, 3, 360, 640, dtype=torch.uint8)
    output = processor([frames], do_sample_frames=False, return_tensors="pt")
    t, h, w = output["video_grid_thw"][0].tolist()
    return t, h * w // config["vision_config"]["spatial_merge_size"] ** 2


@pytest.mark.parametrize("size", qwen_vl.SIZES)
def test_all_methods_of_a_plan_keep_equally_many_tokens(size: str, tmp_path: Path) -> None:
    qwen_vl.build(size, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    num_frames, per_frame = grid_of_the_clips(tmp_path, config)
    assert num_frames * per_frame == (960 if size.endswith("tiny") else 6480)
    plan = PLANS["qwen3-vl-8b" if size.startswith("qwen3") else "qwen2.5-vl-7b"]
    compared = [server for server in serving.read_plan(plan)[0] if server.label[-1].isdigit()]
    assert compared
    for server in compared:
        method, ratio = server.label.split()
        assert method == server.options[server.options.index("--video-pruning-method") + 1]
        rate = float(server.options[server.options.index("--video-pruning-rate") + 1])
        kept = COUNTS[method](per_frame, num_frames, rate)
        assert kept == num_retained_tokens(num_frames * per_frame, float(ratio)), server.label


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_all_servers_of_a_plan_have_the_same_front_end(plan: Path) -> None:
    servers, _ = serving.read_plan(plan)
    pruning = {"--video-pruning-method", "--video-pruning-rate", "--tower-merging-max-ratio"}
    for server in servers:
        server_options = server.options[len(servers[0].options) :]
        assert server.options[: len(servers[0].options)] == servers[0].options
        assert set(server_options[::2]) <= pruning


def test_the_language_models_are_those_of_the_published_sizes(tmp_path: Path) -> None:
    for size, width, layers in (("qwen2.5-vl-7b", 3584, 28), ("qwen3-vl-8b", 4096, 36)):
        qwen_vl.build(size, tmp_path / size)
        config = json.loads((tmp_path / size / "config.json").read_text())
        text, vision = config["text_config"], config["vision_config"]
        assert (text["hidden_size"], text["num_hidden_layers"]) == (width, layers)
        assert vision["out_hidden_size"] == width
        assert sum(text["rope_parameters"]["mrope_section"]) * 2 == 128
