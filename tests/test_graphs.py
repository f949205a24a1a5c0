"""When a search is captured in a CUDA graph, checked with stand-ins for graphs, without a GPU."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from scissor_vllm.compression.cuda import graphs


class FakeGraph:
    def __init__(self) -> None:
        self.num_replays = 0

    def replay(self) -> None:
        self.num_replays += 1


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> graphs.SharedSearches:
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda: None)
    return graphs.SharedSearches(16, torch.device("cpu"))


def test_a_kind_is_captured_when_it_comes_again_and_then_replayed(
    searches: graphs.SharedSearches, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs_captured: list[FakeGraph] = []

    def captured(key: Any, launch: Any) -> FakeGraph:
        graphs_captured.append(FakeGraph())
        return graphs_captured[-1]

    monkeypatch.setattr(searches, "_captured", captured)
    launched: list[int] = []
    for number in range(graphs.USES_BEFORE_CAPTURE + 3):
        searches.start(("a",), partial(launched.append, number))
    assert launched == list(range(graphs.USES_BEFORE_CAPTURE))
    assert [graph.num_replays for graph in graphs_captured] == [3]
    searches.start(("b",), partial(launched.append, -1))
    assert launched[-1] == -1


def test_where_a_capture_fails_searches_go_on_without_and_it_is_said_once(
    searches: graphs.SharedSearches,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(graphs.logger, "warning", lambda text, *args: warnings.append(text % args))

    class Failing:
        def capture_begin(self, **options: Any) -> None:
            raise RuntimeError("out of memory")

    class Stream:
        def wait_stream(self, stream: Any) -> None: ...

        def __enter__(self) -> None: ...

        def __exit__(self, *error: object) -> None: ...

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Failing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    searches._capture_stream = Stream()  # type: ignore[assignment]
    launched: list[int] = []
    for number in range(5):
        searches.start(("a",), partial(launched.append, number))
    assert launched == list(range(5))
    (warning,) = warnings
    assert "run without a CUDA graph: out of memory" in warning


def test_there_are_no_more_graphs_than_widths_of_frames_whatever_the_shapes() -> None:
    from scissor_vllm.compression.cuda.workspace import LANES, SHARED_LANES, num_lanes

    kinds = {(num_lanes(per_frame), per_frame % 4 == 0) for per_frame in range(1, SHARED_LANES + 1)}
    assert len(kinds) == 2 * sum(lanes <= SHARED_LANES for lanes in LANES) <= 10


def test_warm_up_takes_every_kind_of_frame_within_the_largest_video() -> None:
    from scissor_vllm.compression.cuda import warm_up_shapes
    from scissor_vllm.compression.cuda.workspace import LANES, num_lanes

    for most in (64, 8192, 32768):
        shapes = warm_up_shapes(most, torch.device("cpu"))
        assert all(num_frames * per_frame <= most for num_frames, per_frame, _ in shapes)
        assert {num_lanes(per_frame) for _, per_frame, _ in shapes} == {
            lanes for lanes in LANES if lanes - 1 <= most
        }
        sizes = [num_frames * per_frame for num_frames, per_frame, _ in shapes]
        assert min(sizes[0], 8192) == max(min(size, 8192) for size in sizes)


def test_only_small_videos_of_a_gpu_share_memory() -> None:
    with graphs.shared(100, 10, torch.device("cpu")) as on_cpu:
        assert on_cpu is None
    with graphs.shared(8193, 1, torch.device("cuda")) as too_many:
        assert too_many is None
    with graphs.shared(4096, 2048, torch.device("cuda")) as too_wide:
        assert too_wide is None
