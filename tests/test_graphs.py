"""When searches and towers are captured in CUDA graphs, by stand-ins for graphs, without a GPU."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from scissor_vllm import cuda_graphs
from scissor_vllm.compression.cuda import graphs
from scissor_vllm.worker import encoder_graphs


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

    def captured(*_: Any) -> FakeGraph:
        graphs_captured.append(FakeGraph())
        return graphs_captured[-1]

    monkeypatch.setattr(graphs, "captured", captured)
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
    monkeypatch.setattr(
        cuda_graphs.logger, "warning", lambda text, *args: warnings.append(text % args)
    )

    class Failing:
        def capture_begin(self, **options: Any) -> None:
            raise RuntimeError("out of memory")

    class Stream:
        device = None

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
    assert warning == "no CUDA graph of ('a',): out of memory"


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


class RecordedGraph:
    """A graph that launches again what was captured, on the tensors of that time."""

    num_replays = 0

    def __init__(self, launch: Any) -> None:
        self.launch = launch

    def replay(self) -> None:
        RecordedGraph.num_replays += 1
        self.launch()


@pytest.fixture
def tower_graphs(monkeypatch: pytest.MonkeyPatch) -> encoder_graphs.EncoderGraphs:
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(RecordedGraph, "num_replays", 0)
    made = encoder_graphs.EncoderGraphs(torch.device("cpu"))

    def record(launch: Any, *_: Any) -> RecordedGraph:
        # A capture launches and computes nothing.
        rows = made._rows.clone()
        launch()
        made._rows.copy_(rows)
        return RecordedGraph(launch)

    monkeypatch.setattr(encoder_graphs, "captured", record)
    return made


def add(rows: torch.Tensor, inputs: Any) -> torch.Tensor:
    rows += inputs[0]
    return rows


def add_pairs(rows: torch.Tensor, inputs: Any) -> torch.Tensor:
    """A new tensor, half as long and twice as wide."""
    return rows.view(-1, 2 * rows.shape[1]) + inputs[0]


def test_a_towers_graph_reads_each_runs_own_rows_and_inputs(
    tower_graphs: encoder_graphs.EncoderGraphs,
) -> None:
    # Lengths come again, grow beyond the buffer, which ends all graphs, and shrink.
    for number, (num_rows, num_padded) in enumerate(
        [(3, 4), (4, 4), (2, 4), (6, 8), (5, 8), (3, 4), (3, 4), (7, 8), (1, 4)]
    ):
        rows = torch.full((num_rows, 2), float(number))
        added = torch.tensor([1.0, 10.0]) * number
        result = tower_graphs.run(("a",), rows, num_padded, 0, [added], add)
        assert torch.equal(result[:num_rows], rows + added), number
        assert torch.equal(rows, torch.full((num_rows, 2), float(number))), number
    # 4: eager, then 2; 8 begins anew: eager, 1; 4: eager, 1; 8: 1; 4: 1.
    assert RecordedGraph.num_replays == 6


def test_a_tower_has_a_bounded_number_of_graphs(
    tower_graphs: encoder_graphs.EncoderGraphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder_graphs, "_MAX_GRAPHS", 2)
    rows = torch.zeros(8, 2)
    for _ in range(3):
        for num_rows in (8, 7, 6, 5):
            result = tower_graphs.run((), rows[:num_rows], num_rows, 8, [torch.ones(2)], add)
            assert torch.equal(result, torch.ones(num_rows, 2))
            assert len(tower_graphs._kinds) <= 2
    assert RecordedGraph.num_replays == 0
    # What comes again keeps its graph, and what does not makes room.
    for num_rows in (8, 8, 7, 8, 6, 8, 5, 8, 5, 8, 7, 8):
        result = tower_graphs.run((), rows[:num_rows], num_rows, 8, [torch.ones(2)], add)
        assert torch.equal(result, torch.ones(num_rows, 2))
    assert RecordedGraph.num_replays == 7


def test_outputs_of_all_graphs_share_a_buffer(
    tower_graphs: encoder_graphs.EncoderGraphs,
) -> None:
    addresses: set[int] = set()
    for number, num_rows in enumerate((4, 4, 8, 8, 4, 2, 2, 8)):
        rows = torch.full((num_rows, 3), float(number))
        replays = RecordedGraph.num_replays
        result = tower_graphs.run((), rows, num_rows, 8, [torch.arange(6.0)], add_pairs)
        assert torch.equal(result, rows.view(-1, 6) + torch.arange(6.0)), number
        if RecordedGraph.num_replays > replays:
            addresses.add(result.data_ptr())
    assert RecordedGraph.num_replays == 5
    assert len(addresses) == 1


def test_new_weights_end_all_graphs(tower_graphs: encoder_graphs.EncoderGraphs) -> None:
    for scale in (1.0, 2.0):
        weight = torch.full((2,), scale)

        def launch(rows: torch.Tensor, _: Any, weight: torch.Tensor = weight) -> torch.Tensor:
            return rows * weight

        for _ in range(3):
            result = tower_graphs.run((), torch.ones(4, 2), 4, 4, [], launch)
            assert torch.equal(result, torch.full((4, 2), scale))
        tower_graphs.forget()
