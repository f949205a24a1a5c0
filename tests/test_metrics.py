"""Metrics: what each process records, without a wait for the GPU."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from scissor_vllm import metrics
from scissor_vllm.metrics import (
    DIRECTORY_VARIABLE,
    StageClock,
    ThresholdReader,
    metrics_directory,
)

GPU = torch.device("cuda")


class Recording(StageClock):
    """A clock that stores its records."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[tuple[str, float]] = []

    def _record(self, name: str, seconds: float) -> None:
        self.seconds.append((name, seconds))


def test_a_stage_on_the_cpu_is_recorded_when_it_ends() -> None:
    clock = Recording()
    with clock.stage("decode"):
        time.sleep(0.02)
        assert clock.seconds == []
    ((name, seconds),) = clock.seconds
    assert name == "decode"
    assert 0.02 <= seconds < 1


def test_a_stage_that_fails_is_not_recorded() -> None:
    clock = Recording()
    with pytest.raises(ValueError, match="broken"), clock.stage("decode"):
        raise ValueError("broken")
    assert clock.seconds == []


def test_stages_outside_of_requests_are_not_recorded() -> None:
    clock = Recording()
    with clock.silenced(), clock.stage("preprocess"):
        pass
    assert clock.seconds == []
    with clock.stage("preprocess"):
        pass
    assert [name for name, _ in clock.seconds] == ["preprocess"]


class FakeEvent:
    """A CUDA event that a test completes; a wait for it is an error."""

    made: list[FakeEvent]

    def __init__(self, enable_timing: bool = False) -> None:
        self.recorded = self.happened = False
        FakeEvent.made.append(self)

    def record(self) -> None:
        self.recorded = True

    def query(self) -> bool:
        return self.happened

    def elapsed_time(self, end: FakeEvent) -> float:
        assert self.recorded
        assert end.happened
        return 250.0


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> type[FakeEvent]:
    FakeEvent.made = []
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return FakeEvent


def run(clock: StageClock, name: str) -> None:
    with clock.stage(name, GPU):
        pass


def test_a_gpus_stage_is_read_at_a_later_call_without_waiting(gpu: Any) -> None:
    clock = Recording()
    run(clock, "tower")
    run(clock, "compress")
    assert all(event.recorded for event in gpu.made)
    assert clock.seconds == []
    gpu.made[1].happened = True
    run(clock, "tower")
    assert clock.seconds == [("tower", 0.25)]
    gpu.made[3].happened = True
    run(clock, "tower")
    assert clock.seconds == [("tower", 0.25), ("compress", 0.25)]


def test_stages_are_dropped_if_the_gpu_lags_behind(
    gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "_MAX_UNREAD", 3)
    clock = Recording()
    for _ in range(5):
        run(clock, "tower")
    assert len(gpu.made) == 6
    for event in gpu.made:
        event.happened = True
    run(clock, "tower")
    assert len(clock.seconds) == 3


def test_nothing_is_marked_in_a_graph_that_is_captured(
    gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    run(Recording(), "tower")
    assert gpu.made == []


class RecordingReader(ThresholdReader):
    """A reader that stores its records."""

    def __init__(self) -> None:
        super().__init__()
        self.thresholds: list[float] = []

    def _record(self, threshold: float) -> None:
        self.thresholds.append(threshold)


def on_device(threshold: float) -> torch.Tensor:
    return torch.tensor(threshold, dtype=torch.float64)


def test_a_gpus_threshold_is_read_at_a_later_call_without_waiting(gpu: Any) -> None:
    reader = RecordingReader()
    reader.read(on_device(0.8))
    reader.read(on_device(0.7))
    assert reader.thresholds == []
    gpu.made[0].happened = True
    reader.read(on_device(0.6))
    assert reader.thresholds == [0.8]
    gpu.made[1].happened = gpu.made[2].happened = True
    reader.read(on_device(0.5))
    assert reader.thresholds == [0.8, 0.7, 0.6]


def test_thresholds_are_dropped_if_the_gpu_lags_behind(
    gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "_MAX_UNREAD", 3)
    reader = RecordingReader()
    for number in range(5):
        reader.read(on_device(number / 10))
    for event in gpu.made:
        event.happened = True
    reader.read(on_device(0.9))
    assert reader.thresholds == [0.0, 0.1, 0.2]
    gpu.made[-1].happened = True
    reader.read(on_device(0.8))
    assert reader.thresholds == [0.0, 0.1, 0.2, 0.9]


def test_no_threshold_is_recorded_where_none_was_found(gpu: Any) -> None:
    reader, before = ThresholdReader(), num_thresholds()
    for threshold in (float("nan"), 0.5, 0.25):
        reader.read(on_device(threshold))
        gpu.made[-1].happened = True
    assert num_thresholds() - before == 1


def num_thresholds() -> float:
    from prometheus_client import REGISTRY

    return REGISTRY.get_sample_value("scissor_vllm:similarity_threshold_count") or 0.0


@pytest.mark.gpu
def test_a_real_gpus_threshold_is_the_one_that_is_found_by_waiting() -> None:
    from scissor_vllm import compress
    from scissor_vllm.compression.scc import compress_for_serving

    generator = torch.Generator(GPU).manual_seed(0)
    videos = torch.randn((6, 8, 49, 64), device=GPU, generator=generator)
    expected = [compress(video, num_retained=40).similarity_threshold for video in videos]
    reader = RecordingReader()
    reader.read(torch.zeros((), dtype=torch.float64, device=GPU))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for video in videos:
            served = compress_for_serving(video, 40)
            assert served.similarity_threshold is None
            assert served.threshold_on_device is not None
            reader.read(served.threshold_on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    reader.read(torch.zeros((), dtype=torch.float64, device=GPU))
    assert reader.thresholds == [0.0, *expected]


IN_ANOTHER_PROCESS = """
import sys
from scissor_vllm.metrics import CLOCK
for name in sys.argv[1:]:
    with CLOCK.stage(name):
        pass
"""

COLLECT = """
from prometheus_client import CollectorRegistry, generate_latest, multiprocess
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""


def test_metrics_of_processes_are_summed_and_their_files_removed() -> None:
    environment: dict[str, str] = {}

    def python(code: str, *arguments: str) -> str:
        run = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
            cwd=Path(__file__).parent.parent,
            timeout=120,
        )
        return run.stdout

    with metrics_directory(environment):
        folder = Path(environment[DIRECTORY_VARIABLE])
        python(IN_ANOTHER_PROCESS, "decode", "tower")
        python(IN_ANOTHER_PROCESS, "tower")
        text = python(COLLECT)
    assert 'scissor_vllm:video_stage_seconds_count{stage="decode"} 1.0' in text
    assert 'scissor_vllm:video_stage_seconds_count{stage="tower"} 2.0' in text
    assert not folder.exists()
    assert environment == {}


def test_a_directory_that_the_operator_named_is_made_and_stays(tmp_path: Path) -> None:
    named = tmp_path / "new" / "metrics"
    environment = {DIRECTORY_VARIABLE: str(named)}
    for _ in range(2):
        with metrics_directory(environment):
            assert environment == {DIRECTORY_VARIABLE: str(named)}
        assert named.is_dir()
    assert environment == {DIRECTORY_VARIABLE: str(named)}
