"""The GPU's search against that of the CPU, on a GPU and by Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from scissor_vllm import CompressedTokens, compress
from tests.interpreter import run_interpreted

gpu = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def make_video(
    num_things: int, noise: float, seed: int, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    things = torch.randn(num_things, 256, generator=generator)
    shown = things[torch.randint(0, num_things, (12, 100), generator=generator)]
    return (shown + noise * torch.randn(shown.shape, generator=generator)).to(dtype)


def check_same(tokens: torch.Tensor, **budget: float) -> None:
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


@gpu
def test_products_that_are_not_held_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from scissor_vllm.compression import captures, gpu

    tokens = make_video(60, 0.5, 6).cuda()
    held = {kept: compress(tokens, num_retained=kept) for kept in (20, 120, 900)}
    monkeypatch.setattr(gpu, "MAX_PRODUCTS", 0)
    monkeypatch.setattr(gpu, "BLOCK_PRODUCTS", 300 * tokens.shape[0] * tokens.shape[1])
    captures.clear()
    monkeypatch.setattr(captures, "MAX_TOKENS", 0)
    for kept, expected in held.items():
        assert torch.equal(compress(tokens, num_retained=kept).assignment, expected.assignment)


@gpu
def test_more_components_than_a_tree_is_built_between_give_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from scissor_vllm.compression import captures, gpu

    tokens = make_video(60, 0.5, 7)
    captures.clear()
    monkeypatch.setattr(gpu, "MAX_COMPONENTS", 100)
    for kept in (99, 101, 600):
        check_same(tokens, num_retained=kept)


@gpu
def test_a_captured_search_gives_what_one_that_is_not_gives() -> None:
    from scissor_vllm.compression import captures

    captures.clear()
    # Among them exact copies, after which the host goes on, and shapes that replace each other.
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


@gpu
def test_a_found_threshold_gives_the_same_again_in_bfloat16() -> None:
    tokens = make_video(60, 0.5, 9).cuda()
    for kept in (20, 100, 333, 1000):
        found = compress(tokens, num_retained=kept)
        again = compress(tokens, similarity_threshold=found.similarity_threshold)
        assert len(again.tokens) >= kept
        if len(again.tokens) == kept:
            assert torch.equal(again.assignment, found.assignment)


@gpu
def test_two_calls_give_bitwise_the_same() -> None:
    tokens = make_video(60, 0.5, 10).cuda()
    one = compress(tokens, num_retained=77)
    for _ in range(5):
        other = compress(tokens, num_retained=77)
        assert torch.equal(one.tokens, other.tokens)
        assert torch.equal(one.assignment, other.assignment)


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


INTERPRETED = """
import sys

import torch

from scissor_vllm import compress
from scissor_vllm.compression import gpu, scc

scc.EXHAUSTIVE_TOKENS = 0
compared = []


def merge(video, parts):
    return gpu.merge(video.rows[None], [video], [parts])[0]


def on_kernels(tokens, num_retained=None, similarity_threshold=None, temporal_window=None):
    window = scc._window(len(tokens), temporal_window, num_retained)
    settings = gpu.SearchSettings(scc.LINE_STEPS, scc.THRESHOLD_MARGIN, window)
    if num_retained is None:
        found = gpu.AtThreshold(tokens, window)
        found.asked.fill_(similarity_threshold)
        found.start()
        video, parts = found.video, found.finish(similarity_threshold)
    else:
        num_tokens = tokens.shape[0] * tokens.shape[1]
        size = gpu.num_components(num_tokens, num_retained, tokens.device)
        search = gpu.Search(tokens, size, settings)
        search.asked.fill_(num_retained)
        search.start()
        video, unseen = search.video, None
        found = search.unseen_threshold()
        if num_tokens <= gpu.captures.MAX_TOKENS and search.first_cut.seen[0] == 0:
            unseen = merge(video, search.unseen(num_retained))
        parts = search.finish(num_retained)
        assert found.isnan() or found == parts.threshold
        if unseen is not None:
            assert found == parts.threshold
            assert torch.equal(unseen[1], merge(video, parts)[1])
            compared.append(num_retained)
    return parts.threshold, *merge(video, parts)


def make(num_things, noise, shape, dtype):
    generator = torch.Generator().manual_seed(1)
    things = torch.randn(num_things, 64, generator=generator)
    shown = things[torch.randint(0, num_things, shape, generator=generator)]
    return (shown + noise * torch.randn(shown.shape, generator=generator)).to(dtype)


for tokens, kept in (
    (make(8, 0.3, (4, 12), torch.float32), (1, 6, 40)),
    (make(6, 0.0, (3, 17), torch.bfloat16), (6, 20)),
    (make(9, 0.6, (5, 9), torch.bfloat16), (4, 20)),
    (1 + make(9, 0.0, (4, 8), torch.bfloat16) / 64, (3, 9, 17)),
    (torch.ones(3, 5, 8), (1, 4, 13)),
):
    budgets = [{"num_retained": k} for k in kept] + [{"similarity_threshold": 0.3}]
    if len(tokens.flatten(0, 1).unique(dim=0)) == tokens[..., 0].numel():
        # Equal pairs of unlike windows differ in last bits.
        budgets += [{**budgets[-2], "temporal_window": 2}, {**budgets[-1], "temporal_window": 1}]
        budgets += [{**budgets[0], "temporal_window": 2}]
        budgets += [{"num_retained": len(tokens), "temporal_window": 1}]
    for budget in budgets:
        expected = compress(tokens, **budget)
        threshold, merged, assignment = on_kernels(tokens, **budget)
        assert torch.equal(assignment, expected.assignment), budget
        torch.testing.assert_close(merged, expected.tokens, atol=2e-2, rtol=0)
        assert abs(threshold - expected.similarity_threshold) < 1e-5, budget

assert len(compared) >= 10, compared
broken = make(9, 0.6, (5, 9), torch.float32)
broken[1, 2, 3], broken[0, 4], broken[3, 3] = torch.nan, torch.inf, 3e38
settings = gpu.SearchSettings(scc.LINE_STEPS, scc.THRESHOLD_MARGIN, len(broken))
search = gpu.Search(broken, 45, settings)
search.asked.fill_(20)
search.start()
merged, assignment = merge(search.video, search.unseen(20))
assert search.unseen_threshold().isnan()
zeroed = broken.clone()
zeroed[1, 2], zeroed[0, 4], zeroed[3, 3] = 0, 0, 0
assert torch.equal(assignment, compress(zeroed, num_retained=20).assignment)
assert merged.isfinite().all()

gpu.MAX_COMPONENTS = 3
tokens = make(9, 0.6, (5, 9), torch.bfloat16)
for video in (tokens, torch.ones(3, 9, 8)):
    expected = compress(video, num_retained=4)
    assert torch.equal(on_kernels(video, num_retained=4)[2], expected.assignment)

gpu.captures.MAX_TOKENS = 10
budget = {"num_retained": 4}
in_windows = {"num_retained": 7, "temporal_window": 2}
for each in (budget, in_windows):
    assert torch.equal(on_kernels(tokens, **each)[2], compress(tokens, **each).assignment)
gpu.MAX_PRODUCTS, gpu.BLOCK_PRODUCTS = 0, 2 * 9 * 45
for each in (budget, in_windows):
    assert torch.equal(on_kernels(tokens, **each)[2], compress(tokens, **each).assignment)
for video in (tokens, torch.ones(3, 9, 8)):
    expected = compress(video, **budget)
    assert torch.equal(on_kernels(video, **budget)[2], expected.assignment)
print("the same")
"""


def test_interpreted_on_the_cpu_they_give_what_torch_gives() -> None:
    run = run_interpreted(INTERPRETED)
    assert run.stdout.strip() == "the same", run.stderr
