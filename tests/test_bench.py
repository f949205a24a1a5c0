"""The benchmarks run, and their results name the host and the commit."""

from __future__ import annotations

import ast
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlavaOnevisionForConditionalGeneration

from bench import compress, worker_transfer
from bench.model_shapes.weights import save_weights
from scissor_vllm.demo.model import demo_model_path

ROOT = Path(__file__).parent.parent
RESULTS = sorted((ROOT / "bench" / "results").glob("*.json"))


def run_command(script: str, *arguments: str) -> None:
    command = [sys.executable, "-m", f"bench.{script}", *arguments]
    subprocess.run(command, check=True, capture_output=True, timeout=300, cwd=ROOT)


def run(script: str, result: Path, *arguments: str) -> dict[str, Any]:
    run_command(script, *arguments, "--json", str(result))
    content: dict[str, Any] = json.loads(result.read_text())
    return content


def test_compress_measures_every_form_on_every_kind_of_tokens(tmp_path: Path) -> None:
    shape = ("--shape", "4", "40", "16", "--dtype", "float32", "--device", "cpu", "--repeats", "2")
    measured = run("compress", tmp_path / "result.json", *shape)
    measured_cells = {(row["tokens"], row["form"]) for row in measured["runs"]}
    assert measured_cells == set(itertools.product(compress.KINDS, compress.FORMS))
    assert all(len(row["milliseconds"]) == 2 for row in measured["runs"])
    assert all(row["kept"] == 16 for row in measured["runs"] if row["form"].endswith(" 0.1"))
    assert measured["environment"]["num_cpus"] >= 1
    assert list(tmp_path.iterdir()) == [tmp_path / "result.json"]


def test_kinds_of_tokens_are_what_they_are_called() -> None:
    shape = (4, 12, 64)
    made = {kind: compress.make_tokens(kind, shape, seed=0) for kind in compress.KINDS}
    assert all(tokens.shape == shape for tokens in made.values())
    distinct = {kind: len(tokens.flatten(0, 1).unique(dim=0)) for kind, tokens in made.items()}
    assert distinct["random"] == distinct["star"] == distinct["near-ties"] == 48
    assert distinct["still"] == 12
    assert distinct["black"] == 1
    assert distinct["copies"] < 48
    assert len(made["alike"].bfloat16().unique()) < 4
    one_hot = made["one-hot"].flatten(0, 1)
    assert torch.equal(one_hot @ one_hot.T, torch.eye(48))


@pytest.mark.slow
def test_decode_measures_both_loaders(tmp_path: Path) -> None:
    measured = run("decode", tmp_path / "result.json", "--quick", "--repeats", "1")
    assert all(row["seconds"].keys() == {"pyav", "opencv"} for row in measured["runs"])


@pytest.mark.slow
def test_front_end_measures_stock_and_ours_and_sends_fewer_bytes(tmp_path: Path) -> None:
    small = ("--frames", "4", "--size", "64x48", "--repeats", "2", "--burst", "3")
    measured = run("front_end", tmp_path / "result.json", *small)
    stock, ours = measured["runs"]["stock"], measured["runs"]["ours"]
    assert len(stock) == len(ours) == 2
    assert stock[0].keys() == ours[0].keys() >= {"decode", "name", "prepare", "send"}
    for bursts in measured["bursts"].values():
        assert all(len(ends) == 3 and ends == sorted(ends) for ends in bursts)
    # bfloat16 against uint8.
    num_bytes = measured["num_bytes"]
    assert num_bytes["ours"] / num_bytes["stock"] == pytest.approx(0.5, abs=0.01)


@pytest.mark.slow
def test_worker_transfer_sends_a_steps_videos_both_ways(tmp_path: Path) -> None:
    small = ("--num-videos", "2", "--num-steps", "2", "--rounds", "1")
    measured = run("worker_transfer", tmp_path / "result.json", *small)
    for row, shape in zip(measured["rows"], worker_transfer.SHAPES.values(), strict=True):
        assert row["megabytes"] == pytest.approx(2 * math.prod(shape) / 1e6)
        assert row["milliseconds"].keys() == worker_transfer.WAYS.keys()
        assert min(row["milliseconds"].values()) > 0


def test_shapes_are_those_of_the_published_model(tmp_path: Path) -> None:
    run_command("model_shapes", "7b", str(tmp_path / "model"))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["text_config"]["hidden_size"] == 3584
    assert config["vision_config"]["image_size"] // config["vision_config"]["patch_size"] == 27


def test_random_weights_fill_a_models_shapes_and_follow_the_seed(tmp_path: Path) -> None:
    demo = Path(demo_model_path())
    folders = [tmp_path / name for name in ("one", "same", "other")]
    for folder, seed in zip(folders, (1, 1, 2), strict=True):
        shutil.copytree(demo, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        save_weights(folder, seed)
    first, same_seed, other_seed = (load_file(folder / "model.safetensors") for folder in folders)
    loaded = LlavaOnevisionForConditionalGeneration.from_pretrained(folders[0])
    tied = {"lm_head.weight"} if loaded.config.tie_word_embeddings else set()
    assert len(first) == len(loaded.state_dict().keys() - tied)
    assert "language_model.model.embed_tokens.weight" in first
    assert all(torch.equal(first[name], same_seed[name]) for name in first)
    matrices = [name for name, weight in first.items() if weight.ndim > 1]
    assert not any(torch.equal(first[name], other_seed[name]) for name in matrices)
    spread = torch.cat([first[name].flatten().float() for name in matrices]).std()
    assert spread == pytest.approx(0.02, rel=0.02)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_result_file_names_its_hardware_and_its_commit(path: Path) -> None:
    result = json.loads(path.read_text())
    runs = [result] if "environment" in result else result["runs"]
    assert runs
    for run in runs:
        environment = run["environment"]
        assert environment["cpu"]
        assert len(environment["commit"]) == 40
        assert environment["versions"]


MODULES = sorted((ROOT / "bench").rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_bench_module_is_of_a_package_and_needs_no_test(path: Path) -> None:
    assert (path.parent / "__init__.py").exists()
    text = path.read_text()
    assert "sys.path" not in text
    assert "E402" not in text
    imported = [
        name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
        )
    ]
    assert not [name for name in imported if name.split(".")[0] == "tests"]


def test_the_table_of_benchmarks_has_every_command_once() -> None:
    commands = {
        str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__main__")
        for path in MODULES
        if path.name == "__main__.py" or 'if __name__ == "__main__"' in path.read_text()
    }
    rows = re.findall(
        r"^\| `([\w.]+)` \| .*\? \| `python -m ([\w.]+)",
        (ROOT / "bench" / "README.md").read_text(),
        re.M,
    )
    assert sorted(name for name, _ in rows) == sorted(commands)
    assert all(name == command for name, command in rows)
