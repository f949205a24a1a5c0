"""Bounds on the tokens that are compressed together, so that no video delays others."""

from __future__ import annotations

import pytest
import torch

from scissor_vllm import compress
from scissor_vllm.compression import get_compressor, scc


def same_rows(tokens: torch.Tensor, kept: int, method: str, window: int) -> bool:
    served = get_compressor(method)(tokens, kept)
    divided = compress(tokens, num_retained=kept, temporal_window=window)
    return torch.equal(served.assignment, divided.assignment)


@pytest.mark.parametrize(
    ("limit", "value", "window"),
    [("MAX_FRAME_PAIRS", 12 * 3, 3), ("MAX_TOKEN_PAIRS", 12 * 5 * 5 * 2, 2)],
)
def test_a_window_holds_no_more_than_the_limits(
    limit: str, value: int, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = torch.randn(12, 5, 8, generator=torch.Generator().manual_seed(1))
    assert not same_rows(tokens, 20, "scc", window)
    monkeypatch.setattr(scc, limit, value)
    assert same_rows(tokens, 20, "scc", window)
    assert same_rows(tokens, 20, "scc-windows", window)


def test_a_window_has_a_frame_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scc, "MAX_TOKEN_PAIRS", 1)
    tokens = torch.randn(12, 5, 8, generator=torch.Generator().manual_seed(1))
    assert same_rows(tokens, 20, "scc", window=1)


def test_fewer_rows_than_such_windows_are_refused_with_the_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scc, "MAX_FRAME_PAIRS", 12 * 3)
    tokens = torch.randn(12, 5, 8, generator=torch.Generator().manual_seed(1))
    assert len(get_compressor("scc")(tokens, 4).tokens) == 4
    with pytest.raises(
        ValueError, match=r"12 frames of 5 tokens in windows of 3 frames.*got 3 row"
    ):
        get_compressor("scc")(tokens, 3)


def test_videos_of_usual_size_are_not_divided() -> None:
    for num_frames, per_frame in ((32, 196), (128, 196), (768, 40), (160, 200), (8, 1024)):
        tokens = torch.empty(num_frames, per_frame, 1)
        assert scc._served_window(tokens, 1, None) == num_frames
        assert scc._served_window(tokens, num_frames, 4) == 4
