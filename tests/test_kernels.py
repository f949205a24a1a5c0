"""Searches on a GPU give the CPU's results."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from scissor_vllm import CompressedTokens, compress
from scissor_vllm.compression import get_compressor

gpu = pytest.mark.gpu

DATA = Path(__file__).parent / "data"

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def make_video(
    num_things: int, noise: float, seed: int, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    things = torch.randn(num_things, 256, generator=generator)
    shown = things[torch.randint(0, num_things, (12, 100), generator=generator)]
    return (shown + noise * torch.randn(shown.shape, generator=generator)).to(dtype)


def check_same(tokens: torch.Tensor, **budget: float | None) -> None:
    cpu: CompressedTokens = compress(tokens, **budget)  # type: ignore[arg-type]
    cuda: CompressedTokens = compress(tokens.cuda(), **budget)  # type: ignore[arg-type]
    assert cuda.tokens.is_cuda
    assert cuda.tokens.dtype == tokens.dtype
    assert torch.equal(cpu.assignment, cuda.assignment.cpu()), budget
    assert torch.allclose(cpu.tokens.float(), cuda.tokens.cpu().float(), atol=2e-2)
    assert abs(cpu.similarity_threshold - cuda.similarity_threshold) < 1e-5  # type: ignore[operator]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("noise", [0.0, 0.3, 0.7])
@gpu
def test_a_budget_gives_what_the_cpu_gives(noise: float, dtype: torch.dtype) -> None:
    tokens = make_video(60, noise, int(10 * noise), dtype)
    for kept in (1, 12, 13, 60, 61, 120, 600, 1100, 1199, 1200):
        check_same(tokens, num_retained=kept)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("noise", [0.0, 0.3, 0.7])
@gpu
def test_a_threshold_gives_what_the_cpu_gives(noise: float, dtype: torch.dtype) -> None:
    tokens = make_video(60, noise, int(10 * noise) + 1, dtype)
    for threshold in (-1.0, 0.0, 0.2, 0.5, 0.8, 0.95, 1.0):
        check_same(tokens, similarity_threshold=threshold)


@pytest.mark.parametrize(("num_frames", "per_frame"), [(1, 400), (200, 1), (5, 31), (3, 1030)])
@gpu
def test_a_video_of_any_shape_gives_what_the_cpu_gives(num_frames: int, per_frame: int) -> None:
    generator = torch.Generator().manual_seed(num_frames)
    tokens = torch.randn(num_frames, per_frame, 40, generator=generator)
    num_tokens = num_frames * per_frame
    for kept in (1, num_tokens // 10, num_tokens // 2, num_tokens - 1):
        check_same(tokens, num_retained=kept)
    check_same(tokens, similarity_threshold=0.3)


@pytest.mark.parametrize("noise", [0.3, 0.7])
@gpu
def test_with_windows_they_give_what_the_cpu_gives(noise: float) -> None:
    tokens = make_video(60, noise, 9)
    for window in (1, 2, 4, 5, 11):
        for kept in (1, 3, 12, 120, 600, 1199):
            check_same(tokens, num_retained=kept, temporal_window=window)
        check_same(tokens, similarity_threshold=0.5, temporal_window=window)


@pytest.mark.parametrize("noise", [0.0, 0.001])
@gpu
def test_windows_that_show_the_same_are_cut_somewhere(noise: float) -> None:
    # Equal pairs of unlike windows differ in last bits, which decide where a cut is between them.
    tokens = make_video(60, noise, 9)
    for kept in (12, 120, 600):
        cpu = compress(tokens, num_retained=kept, temporal_window=2)
        cuda = compress(tokens.cuda(), num_retained=kept, temporal_window=2)
        assert len(cuda.tokens) == kept
        assert cuda.similarity_threshold == pytest.approx(cpu.similarity_threshold, abs=1e-4)


@gpu
def test_equal_merges_at_the_cut_are_those_of_the_cpu() -> None:
    # 60 things, each many times: below 60 kept nothing is tied, above it all weights are 1.
    tokens = make_video(60, 0.0, 5)
    for kept in (59, 61, 100, 500):
        check_same(tokens, num_retained=kept)


@pytest.fixture
def own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every search work on memory of its own, and the host read the device in between."""
    from scissor_vllm.compression import cuda
    from scissor_vllm.compression.cuda import graphs, search

    for module in (cuda, graphs, search):
        monkeypatch.setattr(module, "SHARED_TOKENS", 0)


@gpu
@pytest.mark.usefixtures("own_memory")
@pytest.mark.parametrize("window", [None, 4])
def test_searches_on_their_own_memory_give_the_same(window: int | None) -> None:
    tokens = make_video(60, 0.5, 6)
    for kept in (20, 120, 900):
        check_same(tokens, num_retained=kept, temporal_window=window)


@gpu
@pytest.mark.usefixtures("own_memory")
def test_products_that_are_not_held_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from scissor_vllm.compression.cuda import products

    tokens = make_video(60, 0.5, 6)
    monkeypatch.setattr(products, "MAX_PRODUCTS", 0)
    monkeypatch.setattr(products, "BLOCK_PRODUCTS", 300 * tokens.shape[0] * tokens.shape[1])
    for kept in (20, 120, 900):
        check_same(tokens, num_retained=kept)


@gpu
@pytest.mark.usefixtures("own_memory")
def test_more_components_than_dense_weights_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from scissor_vllm.compression import cuda

    monkeypatch.setattr(cuda, "num_components", lambda *args: 100)
    tokens = make_video(60, 0.5, 7)
    for kept in (99, 101, 600):
        check_same(tokens, num_retained=kept)


@gpu
def test_a_graph_gives_what_separate_launches_give() -> None:
    from scissor_vllm.compression.cuda import graphs

    graphs.clear()
    # Shapes replace each other on one workspace, exact copies among them.
    videos = [make_video(60, noise, seed) for seed, noise in enumerate((0.3, 0.0, 0.7, 0.0, 0.5))]
    cases = [(video[:frames], kept) for video in videos for frames in (12, 9) for kept in (30, 200)]
    for _ in range(3):
        for video, kept in cases:
            check_same(video, num_retained=kept)
            check_same(video, similarity_threshold=kept / 250)
    other = torch.cuda.Stream()
    for video, kept in cases[:4] * 2:
        with torch.cuda.stream(other):
            on_another_stream = compress(video.cuda(), num_retained=kept)
        other.synchronize()
        expected = compress(video, num_retained=kept)
        assert torch.equal(on_another_stream.assignment.cpu(), expected.assignment)


def median_ms(method: str, videos: list[torch.Tensor], repeats: int = 7) -> float:
    """Return the milliseconds of a served call, in turns through the videos."""
    compressor, times = get_compressor(method), []
    for turn in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for video in videos:
            compressor(video, video.shape[0] * video.shape[1] // 10)
        end.record()
        torch.cuda.synchronize()
        if turn >= 3:
            times.append(start.elapsed_time(end) / len(videos))
    return statistics.median(times)


@gpu
@pytest.mark.parametrize("method", ["scc-windows", "average-linkage"])
def test_twenty_shapes_in_turn_cost_as_one_and_take_no_more_memory(method: str) -> None:
    from scissor_vllm.compression.methods import warm_up_shapes

    device = torch.device("cuda", torch.cuda.current_device())
    for num_frames, per_frame, ratio in warm_up_shapes(method, 8192, device):
        tokens = torch.randn(num_frames, per_frame, 3584, dtype=torch.bfloat16, device=device)
        kept = max(num_frames, int(num_frames * per_frame * ratio))
        get_compressor(method)(tokens, kept)
    del tokens
    videos = [
        torch.randn(32, per_frame, 3584, dtype=torch.bfloat16, device=device)
        for per_frame in range(100, 188, 4)
    ][:20]
    torch.cuda.synchronize()
    free, _ = torch.cuda.mem_get_info()
    largest = median_ms(method, videos[-1:])
    in_turn = median_ms(method, videos)
    assert in_turn <= 1.5 * largest, (in_turn, largest)
    torch.cuda.synchronize()
    # What warm-up left in the allocator is enough for all of them.
    assert torch.cuda.mem_get_info()[0] >= free - (4 << 20)


@gpu
@pytest.mark.parametrize("name", ["whole-video", "windows"])
def test_a_clip_whose_search_took_an_uncounted_interval_has_k_rows(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scissor_vllm.compression import scc

    monkeypatch.setattr(scc, "EXHAUSTIVE_TOKENS", 0)
    saved = np.load(DATA / f"fewer-than-k-{name}.npz")
    kept, window = int(saved["num_retained"]), int(saved["temporal_window"]) or None
    for dtype in DTYPES:
        tokens = torch.from_numpy(saved["tokens"]).to("cuda", dtype)
        served = scc.compress_for_serving(tokens, kept, window)
        assert served.threshold_on_device is not None
        assert served.threshold_on_device.isfinite()
        for result in (served, compress(tokens, num_retained=kept, temporal_window=window)):
            assert len(result.tokens) == kept
            assert (result.tokens.float().norm(dim=1) > 0).all()


@gpu
def test_no_search_of_a_near_still_clip_leaves_fewer_than_k_parts() -> None:
    from bench.near_still_search import search

    assert search(num_searches=20_000, num_branches=32)["failed"] == 0


@gpu
@pytest.mark.parametrize(
    ("num_frames", "per_frame", "method"),
    [
        (70_000, 1, "scc-windows"),
        (30_000, 1, "scc"),
        (8_192, 1, "scc"),
        (65, 128, "scc"),
        (160, 225, "scc-windows"),
        (8, 4_096, "scc-windows"),
        (70_000, 1, "average-linkage"),
        (160, 225, "average-linkage"),
        (8, 4_096, "average-linkage"),
        (4, 4_095, "average-linkage"),
        (8, 4_096, "scc"),
        (2, 4_095, "scc"),
    ],
)
def test_a_served_video_of_any_shape_takes_no_seconds(
    num_frames: int, per_frame: int, method: str
) -> None:
    shape = num_frames, per_frame, 64
    tokens = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
    kept = num_frames * per_frame // 4
    for _ in range(2):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        result = get_compressor(method)(tokens, kept)
        torch.cuda.synchronize()
        took = time.perf_counter() - begin
    assert took < 1
    assert result.tokens.shape == (kept, 64)
    assert torch.unique(result.assignment).numel() <= kept
    assert (result.tokens.float().norm(dim=1) > 0).all()


@gpu
def test_a_served_video_of_larger_frames_is_refused() -> None:
    for shape in ((4, 5000, 8), (1 << 17, 3, 8)):
        with pytest.raises(ValueError, match="at most 262144 tokens, and 4096 a frame"):
            get_compressor("scc")(torch.zeros(shape, dtype=torch.bfloat16, device="cuda"), 1000)


@gpu
def test_a_found_threshold_gives_the_same_again_in_bfloat16() -> None:
    tokens = make_video(60, 0.5, 9).cuda()
    for kept in (20, 100, 333, 1000):
        by_budget = compress(tokens, num_retained=kept)
        again = compress(tokens, similarity_threshold=by_budget.similarity_threshold)
        assert len(again.tokens) >= kept
        if len(again.tokens) == kept:
            assert torch.equal(again.assignment, by_budget.assignment)


@gpu
def test_two_calls_give_bitwise_the_same() -> None:
    tokens = make_video(60, 0.5, 10).cuda()
    first = compress(tokens, num_retained=77)
    for _ in range(5):
        second = compress(tokens, num_retained=77)
        assert torch.equal(first.tokens, second.tokens)
        assert torch.equal(first.assignment, second.assignment)


@gpu
def test_magnitudes_at_the_ends_of_bfloat16_are_compressed() -> None:
    tokens = make_video(20, 0.2, 3)
    for scale in (2.0**-120, 2.0**-60, 2.0**60, 2.0**120):
        plain = compress(tokens.cuda(), num_retained=50)
        scaled = compress((tokens * scale).cuda(), num_retained=50)
        assert torch.equal(plain.assignment, scaled.assignment)
    mixed = tokens.clone()
    mixed[::2] *= 2.0**100
    mixed[1::2] *= 2.0**-100
    cpu, cuda = compress(mixed, num_retained=50), compress(mixed.cuda(), num_retained=50)
    assert torch.equal(cpu.assignment, cuda.assignment.cpu())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@gpu
def test_a_token_that_is_not_finite_is_refused_as_on_the_cpu(value: float) -> None:
    tokens = make_video(20, 0.2, 4).cuda()
    tokens[3, 7, 11] = value
    for budget in ({"num_retained": 50}, {"similarity_threshold": 0.5}):
        for _ in range(4):
            with pytest.raises(ValueError, match="finite"):
                compress(tokens, **budget)


@pytest.mark.parametrize("noise", [0.0, 1e-4])
@gpu
def test_tokens_that_are_nearly_all_alike_are_compressed(noise: float) -> None:
    # More components than a tree is built between at once, all at the same cosine.
    generator = torch.Generator().manual_seed(11)
    tokens = 1 + noise * torch.randn(32, 196, 64, generator=generator)
    for kept in (1, 63, 627, 3136):
        check_same(tokens, num_retained=kept)


@gpu
@pytest.mark.parametrize("noise", [0.0, 0.001, 0.3, 0.7, 20.0])
def test_for_serving_the_host_does_not_wait_and_the_result_is_the_same(noise: float) -> None:
    from scissor_vllm.compression.scc import compress_for_serving

    tokens = make_video(60, noise, 4).cuda()
    for kept in (1, 120, 700):
        expected = compress(tokens, num_retained=kept)
        for _ in range(4):
            torch.cuda.set_sync_debug_mode("error")
            try:
                served = compress_for_serving(tokens, kept)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert torch.equal(served.assignment, expected.assignment)
            assert torch.equal(served.tokens, expected.tokens)


@gpu
def test_zero_tokens_are_like_nothing() -> None:
    tokens = make_video(20, 0.2, 8)
    tokens[::3] = 0
    check_same(tokens, num_retained=90)
    check_same(tokens, similarity_threshold=0.5)
