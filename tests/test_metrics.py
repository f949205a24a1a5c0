"""Stage times: what is recorded, in which process, and that a GPU is never waited for."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from scissor_vllm import metrics
from scissor_vllm.metrics import DIRECTORY_VARIABLE, StageClock, metrics_directory

GPU = torch.device("cuda")


class Recording(StageClock):
    """A clock that keeps what it records."""

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


class FakeEvent:
    """A CUDA event that happens when told; waiting for it is an error."""

    made: list[FakeEvent]

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.recorded = self.happened = False
        FakeEvent.made.append(self)

    def record(self) -> None:
        self.recorded = True

    def query(self) -> bool:
        return self.happened

    def elapsed_time(self, end: FakeEvent) -> float:
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


def test_a_stage_on_a_gpu_is_read_by_a_later_one_once_it_has_ended(gpu: Any) -> None:
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


def test_stages_of_a_gpu_that_lags_behind_are_left_out(
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


def test_processes_add_up_and_leave_nothing_behind() -> None:
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


def test_a_directory_that_the_operator_named_stays(tmp_path: Path) -> None:
    environment = {DIRECTORY_VARIABLE: str(tmp_path)}
    with metrics_directory(environment):
        assert environment == {DIRECTORY_VARIABLE: str(tmp_path)}
    assert tmp_path.exists()
    assert environment == {DIRECTORY_VARIABLE: str(tmp_path)}
