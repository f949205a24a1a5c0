"""Reaches into vLLM's internals change no more than documented."""

from __future__ import annotations

import logging
from argparse import Namespace
from typing import Any

import pytest
import torch
import vllm.connections
import vllm.multimodal.media.base
from vllm import ir
from vllm.config.multimodal import MultiModalConfig

from scissor_vllm.vllm_compat import (
    _with_positions,
    ask_where_rows_carry_positions,
    forget_with_encoder_cache,
    fused_norms,
    media_budgets,
    place_without_waiting,
    tell_model_of_reset,
    watch_first_tokens,
)

MODEL = Namespace(row_width=8)
PLAIN, CARRYING = torch.zeros(3, 8), torch.zeros(3, 16)


def test_a_config_with_positions_has_the_same_values_and_leaves_the_first_as_it_is() -> None:
    config = MultiModalConfig(
        mm_processor_kwargs={"retention_ratio": 0.5}, language_model_only=True
    )
    changed = _with_positions(config)
    assert vars(changed) == vars(config)
    assert changed.is_multimodal_pruning_enabled()
    assert not config.is_multimodal_pruning_enabled()
    assert type(config) is MultiModalConfig


def make_runner() -> Any:
    """Return a class as V1's runner is, which says whether it asked the model."""

    class Runner:
        def __init__(self, config: MultiModalConfig, rows: list[torch.Tensor]) -> None:
            self.is_multimodal_pruning_enabled = False
            self.model_config = Namespace(multimodal_config=config)
            self.encoder_cache = dict(enumerate(rows))

        def get_model(self) -> Any:
            return MODEL

        def _gather_mm_embeddings(self, step: int, shift: int = 0) -> tuple[int, bool]:
            return step + shift, self.is_multimodal_pruning_enabled

    return Runner


@pytest.mark.parametrize(
    ("rows", "asks"), [([], False), ([PLAIN, PLAIN], False), ([PLAIN, CARRYING], True)]
)
def test_v1_asks_for_positions_in_steps_whose_rows_carry_them(
    rows: list[torch.Tensor], asks: bool
) -> None:
    runner_class = make_runner()
    ask_where_rows_carry_positions(runner_class)
    ask_where_rows_carry_positions(runner_class)
    runner = runner_class(_with_positions(MultiModalConfig()), rows)
    assert runner._gather_mm_embeddings(1, shift=2) == (3, asks)
    # Videos are encoded together.
    assert not runner.is_multimodal_pruning_enabled


def test_v1_goes_on_pruning_a_model_of_vllms() -> None:
    runner_class = make_runner()
    ask_where_rows_carry_positions(runner_class)
    runner = runner_class(MultiModalConfig(), [PLAIN])
    assert runner._gather_mm_embeddings(1) == (1, False)
    runner.is_multimodal_pruning_enabled = True
    assert runner._gather_mm_embeddings(1) == (1, True)


class Pruner:
    """In place of vLLM's ``MultiModalPruner``."""

    model: Any = Namespace(row_width=8, place_carried=None)

    def recompute(self, rows: list[torch.Tensor], batch: Any, states: Any) -> Any:
        return "recomputed"


def test_v2_leaves_steps_alone_whose_rows_carry_no_positions() -> None:
    class Pruned(Pruner):
        pass

    place_without_waiting(Pruned)
    place_without_waiting(Pruned)
    plain = [PLAIN, PLAIN]
    assert Pruned().recompute(plain, None, None) is plain


def test_v2_goes_on_pruning_a_model_of_vllms() -> None:
    class Pruned(Pruner):
        model = Namespace()

    place_without_waiting(Pruned)
    assert Pruned().recompute([PLAIN, CARRYING], None, None) == "recomputed"


def first_tokens(record: Any, latencies: list[float]) -> None:
    """Have an engine's step tell of first tokens."""
    client = Namespace(logger_manager=Namespace(stat_loggers=[]))
    watch_first_tokens(client, record)
    (watcher,) = client.logger_manager.stat_loggers
    watcher.record(None, None)
    step = Namespace(time_to_first_tokens_iter=latencies, num_prompt_tokens=70)
    watcher.record(None, step)


def test_a_step_tells_its_first_tokens_and_the_longest_wait_for_one() -> None:
    told: list[tuple[int, int, float]] = []
    first_tokens(lambda *step: told.append(step), [])
    assert told == []
    first_tokens(lambda *step: told.append(step), [0.2, 0.5, 0.1])
    assert told == [(3, 70, 0.5)]


def test_an_error_in_the_count_of_first_tokens_does_not_end_the_servers_outputs(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("the folder is gone")

    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    first_tokens(fail, [0.2])
    assert "the folder is gone" in caplog.text


@pytest.mark.parametrize("forgets", [True, False])
def test_a_model_forgets_what_it_encoded_after_the_runner_did(forgets: bool) -> None:
    calls = []

    class Runner:
        def get_model(self) -> Any:
            model = Namespace()
            if forgets:
                model.forget_encoded = lambda: calls.append("model")
            return model

        def reset_encoder_cache(self) -> None:
            calls.append("runner")

    tell_model_of_reset(Runner)
    tell_model_of_reset(Runner)
    Runner().reset_encoder_cache()
    assert calls == ["runner", "model"][: 1 + forgets]


def test_vllms_runner_has_the_reset_and_tells_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    monkeypatch.setattr(GPUModelRunner, "reset_encoder_cache", GPUModelRunner.reset_encoder_cache)
    forget_with_encoder_cache()
    runner, forgotten = CPUModelRunner.__new__(CPUModelRunner), []
    runner.encoder_cache = {"a": PLAIN}
    runner.late_interaction_runner = Namespace(clear=lambda: None)
    runner.model = Namespace(forget_encoded=lambda: forgotten.append(len(runner.encoder_cache)))
    runner.reset_encoder_cache()
    assert forgotten == [0]


def test_media_of_a_request_are_bounded_where_vllm_bounds_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Budget:
        pass

    monkeypatch.setattr(vllm.connections, "MediaRequestDownloadBudget", Budget, raising=False)
    monkeypatch.setattr(vllm.multimodal.media.base, "MediaDecodedBudget", Budget, raising=False)
    budgets = media_budgets()
    assert budgets.keys() == {"decoded_budget", "download_budget"}
    assert all(isinstance(budget, Budget) for budget in budgets.values())
    assert media_budgets()["decoded_budget"] is not budgets["decoded_budget"]
    monkeypatch.delattr(vllm.connections, "MediaRequestDownloadBudget")
    assert media_budgets() == {}


NORMS = (ir.ops.rms_norm, ir.ops.fused_add_rms_norm)


@pytest.fixture
def with_cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have vLLM's CUDA kernels count as supported, as they are on a GPU."""
    for op in NORMS:
        monkeypatch.setattr(op.impls["vllm_c"], "supported", True)


@pytest.mark.usefixtures("with_cuda_kernels")
def test_norms_run_vllms_kernels_where_a_compiled_server_would_not() -> None:
    for op in NORMS:
        with op.set_priority(["native"]):
            with fused_norms():
                assert op.get_priority() == ["vllm_c", "native"]
            assert op.get_priority() == ["native"]


@pytest.mark.usefixtures("with_cuda_kernels")
def test_norms_run_the_kernels_that_an_operator_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = ["oink", "native"]
    for op in NORMS:
        monkeypatch.setattr(op.impls["oink"], "supported", True)
        with op.set_priority(chosen), fused_norms():
            assert op.get_priority() == chosen


def test_norms_stay_where_there_are_no_cuda_kernels() -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU has them")
    for op in NORMS:
        with op.set_priority(["native"]), fused_norms():
            assert op.get_priority() == ["native"]


@pytest.mark.gpu
def test_vllms_kernels_give_the_norms_of_pytorchs_operations() -> None:
    x = torch.randn(300, 1280, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(1280, device="cuda", dtype=torch.bfloat16)
    with ir.ops.rms_norm.set_priority(["native"]):
        expected = ir.ops.rms_norm(x, weight, 1e-6)
        with fused_norms():
            assert ir.ops.rms_norm.dispatch(x, weight, 1e-6).provider == "vllm_c"
            torch.testing.assert_close(ir.ops.rms_norm(x, weight, 1e-6), expected)
