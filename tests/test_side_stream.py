"""Work on a stream of its own gives what it gives in line."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from scissor_vllm import compress
from scissor_vllm.side_stream import SideStream

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def make_videos(num_videos: int) -> list[torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(3)
    shape = (8, 196, 256)
    return [
        torch.randn(shape, dtype=torch.bfloat16, device="cuda", generator=generator)
        for _ in range(num_videos)
    ]


def tenth(tokens: torch.Tensor) -> torch.Tensor:
    return compress(tokens, retention_ratio=0.1).tokens


@pytest.mark.parametrize("inference", [True, False])
def test_results_are_those_of_calls_in_line(inference: bool) -> None:
    side, videos = SideStream(torch.device("cuda")), make_videos(6)
    expected = [tenth(video) for video in videos]
    with torch.inference_mode(inference):
        for _ in range(4):
            waiting: list[Callable[[], torch.Tensor]] = []
            rows = []
            for video in videos:
                # Written on the caller's stream just before, and busy there meanwhile.
                copy = video * 0 + video
                waiting.append(side.start(tenth, copy))
                del copy
                _ = torch.randn(4096, 4096, device="cuda") @ torch.randn(4096, 4096, device="cuda")
                rows.append(waiting.pop(0)().clone())
            for row, wanted in zip(rows, expected, strict=True):
                torch.testing.assert_close(row, wanted, rtol=0, atol=0)


def test_what_the_work_raises_is_raised_where_the_result_is_taken() -> None:
    side = SideStream(torch.device("cuda"))
    take = side.start(lambda rows: compress(rows, num_retained=0).tokens, make_videos(1)[0])
    with pytest.raises(ValueError, match="num_retained"):
        take()
