"""An untested vLLM stays stock and keeps running."""

from __future__ import annotations

import asyncio
import os
import sys
from argparse import Namespace
from typing import Any

import pytest
from starlette.datastructures import State
from vllm import ModelRegistry
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY
from vllm.multimodal.video import VIDEO_LOADER_REGISTRY

from scissor_vllm import plugin, version_gate
from scissor_vllm.cli import serve as command
from scissor_vllm.cli.serve import serve
from scissor_vllm.frontend.endpoint import RetentionEndpoint
from scissor_vllm.version_gate import ALLOW_UNTESTED, reason_for_stock, untested_reason

REASON = r">=0\.32,<0\.34 and found 0\.34\.0"


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is registered with vLLM, which is left as it was."""
    names: list[str] = []
    monkeypatch.setattr(ModelRegistry, "register_model", lambda name, _: names.append(name))
    monkeypatch.setattr(MEDIA_CONNECTOR_REGISTRY, "name2class", {})
    monkeypatch.setattr(VIDEO_LOADER_REGISTRY, "name2class", {})
    monkeypatch.setattr(version_gate, "_failure", None)
    monkeypatch.setenv("SCISSOR_VLLM_WARNED", "")
    monkeypatch.delenv(ALLOW_UNTESTED, raising=False)
    return names


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    given: list[str] = []
    monkeypatch.setattr(version_gate.logger, "warning", given.append)
    return given


@pytest.fixture
def untested(monkeypatch: pytest.MonkeyPatch, registered: list[str]) -> None:
    monkeypatch.setattr("vllm.version.__version__", "0.34.0")


@pytest.mark.parametrize("version", ["0.32.0", "0.33.1", "0.33.0rc1", "dev", ""])
def test_tested_versions_of_vllm_pass(version: str) -> None:
    assert untested_reason(version) is None


@pytest.mark.parametrize("version", ["0.31.9", "0.34.0", "1.0.0", "0.34.0rc1"])
def test_other_versions_are_named_with_the_range_and_the_way_to_try(version: str) -> None:
    reason = untested_reason(version)
    assert reason is not None
    assert f">=0.32,<0.34 and found {version}" in reason
    assert f"{ALLOW_UNTESTED}=1" in reason
    assert untested_reason(version, "1") is None
    assert untested_reason(version, "0") is not None


def test_an_untested_vllm_gets_nothing_and_each_warning_once(
    untested: None, registered: list[str], warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_VIDEO_LOADER_BACKEND", "decord")
    for _ in range(3):
        plugin.register()
    assert not registered
    assert not MEDIA_CONNECTOR_REGISTRY.name2class
    assert not VIDEO_LOADER_REGISTRY.name2class
    # A loader that is not registered would fail each video.
    first, second = warnings
    assert "found 0.34.0" in first
    assert "VLLM_VIDEO_LOADER_BACKEND=decord is taken back" in second
    assert "VLLM_VIDEO_LOADER_BACKEND" not in os.environ


def test_an_operator_may_have_an_untested_vllm_tried(
    untested: None, registered: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ALLOW_UNTESTED, "1")
    plugin.register()
    assert "Qwen3VLForConditionalGeneration" in registered
    assert MEDIA_CONNECTOR_REGISTRY.name2class
    assert reason_for_stock() is None


@pytest.mark.parametrize(
    "moved", ["vllm.multimodal.media", "vllm.multimodal.video_decoders", "vllm.connections"]
)
def test_where_vllms_parts_have_moved_it_stays_stock(
    registered: list[str], warnings: list[str], moved: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, moved, None)
    # An import that fails takes a package's modules off it: both come back after the test.
    for name in [name for name in sys.modules if name.startswith("scissor_vllm.frontend")]:
        parent, _, child = name.rpartition(".")
        if hasattr(sys.modules[parent], child):
            monkeypatch.setattr(sys.modules[parent], child, sys.modules[name])
    for name in [name for name in sys.modules if name.startswith("scissor_vllm.frontend")]:
        monkeypatch.delitem(sys.modules, name)
    plugin.register()
    assert not registered
    (warning,) = warnings
    assert moved in warning
    assert reason_for_stock() is not None


def test_a_setting_of_ours_that_cannot_be_honoured_ends_the_start(untested: None) -> None:
    multimodal = Namespace(mm_processor_kwargs={"retention_ratio": 0.5})
    state: Any = State()
    state.vllm_config = Namespace(model_config=Namespace(multimodal_config=multimodal))
    with pytest.raises(ValueError, match=rf"^retention_ratio cannot be honoured: .*{REASON}"):
        asyncio.run(RetentionEndpoint().init_state(None, state, Namespace()))
    multimodal.mm_processor_kwargs = {"do_resize": True}
    asyncio.run(RetentionEndpoint().init_state(None, state, Namespace()))


def test_our_command_serves_stock_vllm_after_one_line(
    untested: None, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    vllm = Namespace(validate=started.append, cmd=started.append)
    monkeypatch.setattr(command, "_parsed", lambda argv: (vllm, argv))
    monkeypatch.setenv("VLLM_PLUGINS", "mine")
    monkeypatch.delenv("VLLM_VIDEO_LOADER_BACKEND", raising=False)
    assert serve(["model", "--dtype", "float32"]) == 0
    assert started == [["model", "--dtype", "float32"]] * 2
    # The plugin has nothing to add.
    plugin.register()
    assert len(warnings) == 1
    # It refuses ratios.
    assert os.environ["VLLM_PLUGINS"] == "mine,scissor_vllm"
    assert "VLLM_VIDEO_LOADER_BACKEND" not in os.environ


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["model", "--default-retention-ratio", "0.5"], "--default-retention-ratio"),
        (["model", "--video-compression=scc", "--dtype", "auto"], "--video-compression"),
        (["--web-page", "model"], "--web-page"),
        (["demo"], "the demo"),
    ],
)
def test_our_command_refuses_what_an_untested_vllm_cannot_do(
    untested: None, argv: list[str], named: str
) -> None:
    with pytest.raises(SystemExit, match=rf"^scissor-vllm serve: {named} .*{REASON}"):
        serve(argv)


def test_the_rust_front_end_is_refused_by_our_command_and_warned_of_elsewhere(
    registered: list[str], warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(SystemExit, match=r"^scissor-vllm serve: VLLM_USE_RUST_FRONTEND"):
        serve(["model"])
    plugin.register()
    assert registered
    assert len(warnings) == 1
    assert "retention_ratio is ignored" in warnings[0]
