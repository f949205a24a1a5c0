"""Laws of the CUDA kernels, run by Triton's interpreter on the CPU with tiny inputs.

Triton chooses its interpreter when it is imported, so ``test_interpreted_kernels.py`` runs this
file in a separate process:

    TRITON_INTERPRET=1 python -m tests.interpreted_kernels [LAW ...]

It prints a line of JSON for each law, with its name and the error or null.
"""

from __future__ import annotations

import json
import pkgutil
import sys
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from scissor_vllm.compression import CompressedTokens, compress, scc

LAWS: dict[str, Callable[[], None]] = {}
SLOW: dict[str, Callable[[], None]] = {}
DATA = Path(__file__).parent / "data"


def law(function: Callable[[], None]) -> Callable[[], None]:
    LAWS[function.__name__] = function
    return function


def slow(function: Callable[[], None]) -> Callable[[], None]:
    SLOW[function.__name__] = function
    return function


def make_tokens(
    num_things: int,
    noise: float,
    shape: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    seed: int = 1,
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    things = torch.randn(num_things, 16, generator=generator)
    shown = things[torch.randint(0, num_things, shape, generator=generator)]
    return (shown + noise * torch.randn(shown.shape, generator=generator)).to(dtype)


def near_still(seed: int) -> torch.Tensor:
    """Return a bfloat16 clip whose frames differ by single bits, so counts are not monotone."""
    generator = torch.Generator().manual_seed(seed)
    num_frames, per_frame = (int(torch.randint(2, 5, (), generator=generator)) for _ in range(2))
    scene = torch.randn(1, per_frame, 4, generator=generator)
    noise = 2.0 ** -float(torch.randint(5, 12, (), generator=generator))
    return (scene + noise * torch.randn(num_frames, per_frame, 4, generator=generator)).bfloat16()


class Kernels:
    """The device's kernels on the CPU, by the interpreter."""

    def __init__(self) -> None:
        from scissor_vllm.compression import cuda
        from scissor_vllm.compression.cuda import kernels, linkage, video, workspace

        _patch_triton_once()
        # Small tiles, so that few tokens need several tiles.
        linkage._TILE, linkage._DEPTH = 16, 32
        linkage._CHUNK, linkage._TILE_ELEMENTS, linkage._MIN_LANES = 8, 64, 16
        workspace.LANES = (8, 16, 64, 128, 1024, 4096)
        video._MAX_PROGRAMS = 2
        scc.LINE_STEPS = 2
        self.cuda = cuda
        self.launched: set[str] = set()
        self.all: set[str] = set()
        for module in pkgutil.iter_modules(kernels.__path__):
            loaded_module = import_module(f"{kernels.__name__}.{module.name}")
            for name, kernel in vars(loaded_module).items():
                if name.endswith("_kernel"):
                    self.all.add(name)
                    setattr(loaded_module, name, _Recorded(name, kernel, self.launched))

    def loaded(
        self, tokens: torch.Tensor, num_retained: int, window: int | None = None, **options: Any
    ) -> tuple[Any, Any]:
        """Return a video and its started search."""
        from scissor_vllm.compression.cuda.search import Search
        from scissor_vllm.compression.cuda.video import Video

        num_tokens = tokens.shape[0] * tokens.shape[1]
        window = scc._window(len(tokens), window, num_retained)
        options = {"num_components": num_tokens, **options}
        video = Video(tokens, window, num_retained, **options)
        settings = self.cuda.SearchSettings(scc.LINE_STEPS, scc.THRESHOLD_MARGIN, window)
        search = Search(video.passes, settings)
        search.start()
        return video, search

    def compressed(
        self, tokens: torch.Tensor, num_retained: int, window: int | None = None, **options: Any
    ) -> CompressedTokens:
        from scissor_vllm.compression.cuda.kernels import layout
        from scissor_vllm.compression.cuda.merge import merge

        video, search = self.loaded(tokens, num_retained, window, **options)
        threshold, num_joined, flags = search.run_to_end()
        assert flags == 0, flags
        assert video.passes.workspace.number[video.num_tokens - 1] == num_retained
        assert int(video.passes.workspace.state[layout.FLAGS]) == 0
        rows, assignment = merge(video, num_retained, num_joined)
        return CompressedTokens(rows, assignment, threshold)


def _patch_triton_once() -> None:
    """Make Triton's interpreter patch its language once, and not at each call of a function.

    The patch takes more time than the kernels. This uses an internal function of Triton. Without it
    the laws hold too, but take longer.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    modules = [tl, tl.core]
    patch = getattr(interpreter, "_patch_lang", None)
    if patch is None:
        return
    patched: set[int] = set()

    def patch_once(function: Any) -> Any:
        # The interpreter patches the modules that the function uses.
        seen = {
            id(module)
            for module in modules
            if any(value is module for value in function.__globals__.values())
        }
        if not seen <= patched:
            patch(function)
            patched.update(seen)
        return SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = patch_once


class _Recorded:
    """A kernel that records its launches."""

    def __init__(self, name: str, kernel: Any, launched: set[str]) -> None:
        self._name, self._kernel, self._launched = name, kernel, launched

    def __getitem__(self, grid: Any) -> Any:
        self._launched.add(self._name)
        return self._kernel[grid]


def check_same(result: CompressedTokens, expected: CompressedTokens) -> None:
    assert torch.equal(result.assignment, expected.assignment)
    torch.testing.assert_close(result.tokens, expected.tokens, atol=2e-2, rtol=0)
    assert result.similarity_threshold is not None
    assert expected.similarity_threshold is not None
    assert abs(result.similarity_threshold - expected.similarity_threshold) < 1e-5


def check_budget(
    tokens: torch.Tensor, num_retained: int, window: int | None = None, **options: Any
) -> None:
    expected = compress(tokens, num_retained=num_retained, temporal_window=window)
    check_same(KERNELS.compressed(tokens, num_retained, window, **options), expected)


@law
def a_budget_gives_what_the_cpu_gives() -> None:
    check_budget(make_tokens(6, 0.6, (2, 5), torch.bfloat16), 4)


@law
def with_windows_a_budget_gives_what_the_cpu_gives() -> None:
    check_budget(make_tokens(5, 0.4, (3, 3)), 4, window=2)


@law
def fewer_rows_than_windows_make_windows_longer() -> None:
    check_budget(make_tokens(5, 0.4, (3, 3)), 2, window=1)


@law
def equal_merges_at_the_cut_are_those_of_the_cpu() -> None:
    check_budget(make_tokens(4, 0.0, (2, 5), torch.bfloat16), 6)
    check_budget(torch.ones(2, 3, 8), 3)


@law
def a_threshold_gives_what_the_cpu_gives() -> None:
    tokens = make_tokens(5, 0.3, (3, 4))
    expected = compress(tokens, similarity_threshold=0.5)
    result = KERNELS.cuda._at_threshold(tokens, 0.5, window=3)
    check_same(result, expected)


@law
def a_workspace_that_is_larger_and_was_used_before_gives_the_same() -> None:
    from scissor_vllm.compression.cuda.workspace import Workspace

    workspace = Workspace.shared(15, torch.device("cpu"))
    for tokens, kept in (
        (make_tokens(9, 0.5, (3, 4)), 6),
        (make_tokens(5, 0.3, (2, 4), torch.bfloat16), 3),
    ):
        check_budget(tokens, kept, workspace=workspace)


@law
def more_components_than_dense_weights_give_the_same() -> None:
    check_budget(make_tokens(6, 0.6, (2, 5)), 4, num_components=3)


@law
def products_that_are_not_held_give_the_same() -> None:
    check_not_held(make_tokens(6, 0.6, (2, 5)), 4)


@slow
def and_so_do_those_of_windows() -> None:
    check_not_held(make_tokens(6, 0.6, (3, 3)), 5, window=2)


def check_not_held(tokens: torch.Tensor, num_retained: int, window: int | None = None) -> None:
    from scissor_vllm.compression.cuda import products

    before = products.MAX_PRODUCTS, products.BLOCK_PRODUCTS
    products.MAX_PRODUCTS, products.BLOCK_PRODUCTS = 0, 5 * 10
    try:
        check_budget(tokens, num_retained, window)
    finally:
        products.MAX_PRODUCTS, products.BLOCK_PRODUCTS = before


@law
def tokens_that_are_not_usable_count_as_zeros() -> None:
    from scissor_vllm.compression.cuda.kernels import layout
    from scissor_vllm.compression.cuda.merge import merge

    broken = make_tokens(5, 0.6, (3, 4))
    broken[1, 2, 3], broken[0, 3], broken[2, 1] = torch.nan, torch.inf, 3e38
    video, search = KERNELS.loaded(broken, 6)
    outcome = video.passes.workspace.outcome
    assert outcome[layout.THRESHOLD].isnan()
    assert search.run_to_end()[2] == layout.NOT_FINITE | layout.OUT_OF_RANGE
    rows, assignment = merge(video, 6, 6)
    zeroed = broken.clone()
    zeroed[1, 2], zeroed[0, 3], zeroed[2, 1] = 0, 0, 0
    assert torch.equal(assignment, compress(zeroed, num_retained=6).assignment)
    assert rows.isfinite().all()


@law
def a_search_that_took_an_uncounted_interval_takes_a_counted_one() -> None:
    check_saved("whole-video")


@slow
def and_so_does_one_with_windows() -> None:
    check_saved("windows")


def check_saved(name: str) -> None:
    """Check a clip for which a search once left a row of zeros."""
    saved = np.load(DATA / f"fewer-than-k-{name}.npz")
    tokens = torch.from_numpy(saved["tokens"])
    if name == "windows":
        tokens = tokens.bfloat16()
    kept, window = int(saved["num_retained"]), int(saved["temporal_window"]) or None
    result = KERNELS.compressed(tokens, kept, window)
    assert len(result.tokens) == kept
    assert (result.tokens.float().norm(dim=1) > 0).all()
    expected = compress(tokens, num_retained=kept, temporal_window=window)
    assert result.similarity_threshold is not None
    assert abs(result.similarity_threshold - (expected.similarity_threshold or 0)) < 1e-4


@law
def near_still_clips_have_k_parts() -> None:
    check_near_still(range(3))


@slow
def many_near_still_clips_have_k_parts() -> None:
    check_near_still(range(3, 60))


def check_near_still(seeds: range) -> None:
    for seed in seeds:
        tokens = near_still(seed)
        num_tokens = tokens.shape[0] * tokens.shape[1]
        kept = 1 + seed * 7 % (num_tokens - 1)
        # It asserts the count of parts.
        result = KERNELS.compressed(tokens, kept, window=None if seed % 2 else 2)
        assert (result.tokens.float().norm(dim=1) > 0).all(), seed


@law
def where_parts_are_missing_rows_are_tokens_and_the_outcome_says_so() -> None:
    from scissor_vllm.compression.cuda.kernels import layout, parts
    from scissor_vllm.compression.cuda.merge import merge

    for dtype in (torch.float32, torch.bfloat16):
        tokens = make_tokens(5, 0.3, (2, 5), dtype)
        video, _ = KERNELS.loaded(tokens, 4)
        workspace = video.passes.workspace
        # A search must not leave 4 parts if K is 6.
        workspace.shape[layout.RETAINED] = 6
        workspace.outcome.zero_()
        parts.summary_kernel[1,](
            workspace.outcome,
            workspace.state,
            workspace.tau,
            workspace.number,
            workspace.always,
            workspace.shape,
        )
        assert workspace.outcome[layout.THRESHOLD].isinf()
        assert int(workspace.outcome[layout.OUTCOME_FLAGS]) == layout.TOO_FEW
        rows, assignment = merge(video, 6, 6)
        flat = tokens.flatten(0, 1)
        assert torch.equal(rows[4], flat[4 * 10 // 6])
        assert torch.equal(rows[5], flat[5 * 10 // 6])
        assert assignment.max() < 4


@slow
def budgets_of_many_kinds_give_what_the_cpu_gives() -> None:
    for tokens, budgets in (
        (make_tokens(8, 0.3, (4, 12)), (1, 6, 40)),
        (make_tokens(6, 0.0, (3, 17), torch.bfloat16), (6, 20)),
        (make_tokens(9, 0.6, (5, 9), torch.bfloat16), (4, 20)),
        (1 + make_tokens(9, 0.0, (4, 8), torch.bfloat16) / 64, (3, 9, 17)),
        (torch.ones(3, 5, 8), (1, 4, 13)),
        (make_tokens(8, 0.3, (1, 12)), (1, 5, 12)),
        (make_tokens(8, 0.3, (12, 1)), (1, 5, 12)),
    ):
        for kept in budgets:
            check_budget(tokens, kept)
        if len(tokens.flatten(0, 1).unique(dim=0)) == tokens[..., 0].numel():
            # Equal pairs of different windows differ in the last bits.
            check_budget(tokens, budgets[-1], window=2)
            check_budget(tokens, max(budgets[-1], len(tokens)), window=1)


@law
def average_linkage_joins_what_the_cpu_joins_to_the_last_bit() -> None:
    noise = make_tokens(21, 0.5, (3, 7))
    zeroed = (noise * (torch.arange(3) > 0)[:, None, None]).bfloat16()
    check_linkage(noise, 0.0)
    check_linkage(zeroed, 0.15)
    # Copies, and tokens with equal distances.
    check_linkage(make_tokens(5, 0.0, (3, 7)), 0.0)
    check_linkage(torch.eye(15).view(3, 5, 15), 0.0)


@slow
def and_of_stars_and_of_unlike_weights() -> None:
    noise = make_tokens(30, 1.0, (4, 8), seed=2)
    star = 1 + noise * torch.linspace(0.01, 1, 32).view(4, 8, 1)
    for exponent in (0.0, 0.25):
        check_linkage(noise, exponent)
        check_linkage(star, exponent)


def check_linkage(tokens: torch.Tensor, exponent: float, window_frames: int = 2) -> None:
    from scissor_vllm.compression import linkage
    from scissor_vllm.compression.cuda import linkage as cuda_linkage

    rows, size = tokens.flatten(0, 1), tokens.shape[1] * window_frames
    tree = linkage.linkage_tree(tokens, window_frames=window_frames, ward_exponent=exponent)
    parent, height = cuda_linkage.join_windows(rows, size, exponent)
    assert torch.equal(parent, tree.parent), (parent, tree.parent)
    assert torch.equal(height, tree.height), (height, tree.height)


@law
def a_tree_is_cut_as_on_the_cpu() -> None:
    from scissor_vllm.compression import linkage
    from scissor_vllm.compression.cuda import linkage as cuda_linkage

    tokens = make_tokens(21, 0.5, (3, 7))
    tree = linkage.linkage_tree(tokens, window_frames=2)
    for num_groups in (2, 5, 21):
        expected = linkage.cut(tree, tokens, num_groups)
        root, is_root = cuda_linkage.group_roots(tree.parent, tree.rank, 14, num_groups)
        groups = (is_root.cumsum(0) - 1)[root]
        assert torch.equal(groups, linkage._groups(tree, num_groups))
        rows = cuda_linkage.group_means(tokens.flatten(0, 1), expected.assignment, num_groups)
        assert torch.equal(rows, expected.tokens)


@law
def tokens_that_are_not_finite_count_as_zeros_in_average_linkage() -> None:
    from scissor_vllm.compression.cuda import linkage as cuda_linkage

    broken = make_tokens(21, 0.5, (3, 7))
    broken[1, 2, 3], broken[0, 3] = torch.nan, torch.inf
    zeroed = broken.clone()
    zeroed[1, 2], zeroed[0, 3] = 0, 0
    result = cuda_linkage.join_windows(broken.flatten(0, 1), 14, 0.0)
    expected = cuda_linkage.join_windows(zeroed.flatten(0, 1), 14, 0.0)
    assert all(map(torch.equal, result, expected))
    part = torch.arange(21) // 3
    assert cuda_linkage.group_means(broken.flatten(0, 1), part, 7).isfinite().all()


def every_kernel_was_launched() -> None:
    assert KERNELS.launched == KERNELS.all, KERNELS.all - KERNELS.launched


LAWS[every_kernel_was_launched.__name__] = every_kernel_was_launched


def main(names: list[str]) -> None:
    """Run the named laws, by default all that are not slow."""
    scc.EXHAUSTIVE_TOKENS = 0
    for name in names or LAWS:
        error, begin = None, time.perf_counter()
        try:
            (LAWS | SLOW)[name]()
        except Exception:
            error = traceback.format_exc()
        seconds = round(time.perf_counter() - begin, 2)
        print(json.dumps({"law": name, "error": error, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    KERNELS = Kernels()
    main(sys.argv[1:])
