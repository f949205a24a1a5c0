"""When a search is captured in a CUDA graph, by a stand-in for graphs: no GPU is needed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from scissor_vllm.compression import captures


class FakeSearch:
    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens = tokens
        self.asked = torch.zeros(1, dtype=torch.int32)
        self.num_starts = 0

    def start(self) -> None:
        self.num_starts += 1


class FakeCapture(captures._Capture[Any]):
    fails = False

    def __init__(self, tokens: torch.Tensor, make: Any) -> None:
        if FakeCapture.fails:
            raise RuntimeError("out of memory")
        self._tokens = tokens.clone()
        self.search = make(self._tokens)
        self._graph: Any = self

    def replay(self) -> None:
        self.search.start()


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    class Stream:
        cuda_stream = 0

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(captures, "_Capture", FakeCapture)
    monkeypatch.setattr(FakeCapture, "fails", False)
    captures.clear()
    yield
    captures.clear()


def run(tokens: torch.Tensor, num_retained: int = 5, variant: object = 0) -> FakeSearch:
    with captures.search(tokens, num_retained, variant, FakeSearch) as search:
        assert search.asked.tolist() == [num_retained]
        assert torch.equal(search.tokens, tokens)
        return search


def video(num_frames: int = 3, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(num_frames, 4, 2, dtype=dtype)


def test_a_shape_that_comes_again_is_captured_once_and_given_new_tokens_and_k() -> None:
    alone = [run(video(), kept) for kept in range(1, captures.USES_BEFORE_CAPTURE + 1)]
    assert len(set(map(id, alone))) == captures.USES_BEFORE_CAPTURE
    captured = [run(video(), kept) for kept in (7, 8, 9)]
    assert len(set(map(id, captured))) == 1
    assert captured[0] not in alone
    assert captured[0].num_starts == 3


@pytest.mark.parametrize(
    "other",
    [
        lambda: run(video(4)),
        lambda: run(video(dtype=torch.bfloat16)),
        lambda: run(video(), variant=1),
    ],
)
def test_what_differs_is_captured_for_itself(other: Any) -> None:
    searches = [run(video()) for _ in range(3)] + [other() for _ in range(3)]
    assert searches[2] is run(video())
    assert searches[5] is other()
    assert searches[2] is not searches[5]


def test_inference_mode_has_captures_of_its_own() -> None:
    plain = [run(video()) for _ in range(3)][-1]
    with torch.inference_mode():
        inside = [run(video()) for _ in range(3)][-1]
    assert inside is not plain
    assert run(video()) is plain


def test_the_one_that_was_not_used_for_the_longest_time_goes() -> None:
    first, second = ([run(video(n)) for _ in range(3)][-1] for n in (1, 2))
    assert run(video(1)) is first
    third = [run(video(3)) for _ in range(3)][-1]
    assert run(video(1)) is first
    assert run(video(3)) is third
    assert run(video(2)) is not second


def test_large_videos_are_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captures, "MAX_TOKENS", 11)
    assert len({id(search) for search in [run(video()) for _ in range(5)]}) == 5


def test_where_a_capture_fails_the_search_goes_on_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(FakeCapture, "fails", True)
    searches = [run(video()) for _ in range(5)]
    assert len(set(map(id, searches))) == 5
    assert caplog.text.count("are not captured: out of memory") == 1
