"""Prints the time of Qwen-VL's towers: vLLM's, with aligned MLPs, and with merged patches.

    python -m bench.qwen_tower [--models qwen2.5-vl qwen3-vl] [--computed-shares 0.5]
        [--repeats 20] [--compilation] [--json FILE]

The towers of Qwen2.5-VL-7B and Qwen3-VL-8B with random weights on a GPU, in bfloat16, with the
kernels that a server without compilation chooses, or one with it (``--compilation``). They encode
32 frames in 6480 tokens. All cases take turns, so a changing clock affects all of them. "gpu" is
the time of CUDA events, "launch" the time until the call returns, after which the GPU still works.
Merged patches are drawn at random, because time depends on their number only.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig

from bench.model_shapes.qwen_vl import VISION
from bench.tower import draw_anchors, make_tower, relative_error
from scissor_vllm.loadtest.record import environment, write_json
from scissor_vllm.patch_merging import Grid, computed_patches

GRID = (16, 30, 54)
"""Temporal patches, rows and columns of patches."""
NUM_WARM_UPS = 3


def make_qwen_tower(config: Any) -> Any:
    """Return vLLM's tower of Qwen2.5-VL."""
    from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VisionTransformer

    return Qwen2_5_VisionTransformer(config)


def make_qwen3_tower(config: Any) -> Any:
    """Return vLLM's tower of Qwen3-VL."""
    from vllm.model_executor.models.qwen3_vl import Qwen3_VisionTransformer

    return Qwen3_VisionTransformer(config)


def make_qwen2_tower(config: Any) -> Any:
    """Return vLLM's tower of Qwen2-VL."""
    from vllm.model_executor.models.qwen2_vl import Qwen2VisionTransformer

    return Qwen2VisionTransformer(config)


TOWERS: dict[str, tuple[Callable[..., Any], Callable[[Any], Any]]] = {
    "qwen2.5-vl": (Qwen2_5_VLVisionConfig, make_qwen_tower),
    "qwen3-vl": (Qwen3VLVisionConfig, make_qwen3_tower),
    "qwen2-vl": (Qwen2VLVisionConfig, make_qwen2_tower),
}
"""How a tower's config and the tower are made."""
FULL: dict[str, dict[str, Any]] = {
    "qwen2.5-vl": VISION["qwen2.5-vl-7b"],
    "qwen3-vl": VISION["qwen3-vl-8b"],
    "qwen2-vl": {"hidden_size": 3584},
}
"""Settings of the towers' configs."""

QWEN2_5_VL_7B = Qwen2_5_VLVisionConfig(**FULL["qwen2.5-vl"])


def random_patches(config: Any, grid: tuple[int, int, int], device: torch.device) -> torch.Tensor:
    """Return (patches, values of each) float32."""
    width = config.in_channels * config.temporal_patch_size * config.patch_size**2
    generator = torch.Generator(device).manual_seed(0)
    num_patches = grid[0] * grid[1] * grid[2]
    return torch.randn(num_patches, width, device=device, generator=generator)


def cases_of(
    name: str, tower: Any, patches: torch.Tensor, shares: list[float]
) -> dict[str, Callable[[], torch.Tensor]]:
    """Return the ways to encode patches of ``GRID``, by name.

    Args:
        name: of the model.
        tower: on the GPU.
        patches: its input.
        shares: of tokens that are computed where patches are merged.
    """
    from contextlib import nullcontext

    from scissor_vllm.vllm_compat import fused_norms
    from scissor_vllm.worker.aligned_mlp import AlignedMLPs
    from scissor_vllm.worker.merged_grid import MAX_GRAPH_PATCHES, MergingTower, why_not_merging

    assert (reason := why_not_merging(tower)) is None, reason
    merging_tower = MergingTower(tower, MAX_GRAPH_PATCHES)
    launching_tower = MergingTower(tower)
    aligned = AlignedMLPs(tower)
    assert len(aligned) == (len(tower.blocks) if name == "qwen2.5-vl" else 0), (
        "vLLM's MLPs are not as this package knows them"
    )

    def stock() -> torch.Tensor:
        tokens: torch.Tensor = tower(patches, grid_thw=[list(GRID)])
        return tokens

    def with_norms() -> torch.Tensor:
        with fused_norms():
            return stock()

    def with_aligned() -> torch.Tensor:
        with fused_norms(), aligned.in_use():
            return stock()

    def merging(encoder: MergingTower, anchors: torch.Tensor) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            with fused_norms(), aligned.in_use() if len(aligned) else nullcontext():
                return encoder.encode(patches, GRID, anchors)

        return run

    cases: dict[str, Callable[[], torch.Tensor]] = {"vllm": stock, "fused norms": with_norms}
    if len(aligned):
        cases["aligned MLPs"] = with_aligned
    grid: Grid = (GRID[1] // 2, GRID[2] // 2)
    for share in shares:
        anchors = draw_anchors(GRID[0], grid[0] * grid[1], share, grid=grid)
        computed = float(computed_patches(anchors, grid).float().mean())
        cases[f"{computed:.2f} computed"] = merging(launching_tower, anchors)
        cases[f"{computed:.2f}, by graph"] = merging(merging_tower, anchors)
    return cases


def measure(cases: dict[str, Callable[[], torch.Tensor]], repeats: int) -> dict[str, Any]:
    """Return milliseconds of the GPU and of the launch of each run, by name of the case."""
    times: dict[str, dict[str, list[float]]] = {name: {"gpu": [], "launch": []} for name in cases}
    for turn in range(repeats + NUM_WARM_UPS):
        for name, run in cases.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            before = time.perf_counter()
            start.record()
            run()
            end.record()
            launched = time.perf_counter() - before
            torch.cuda.synchronize()
            if turn >= NUM_WARM_UPS:
                times[name]["gpu"].append(start.elapsed_time(end))
                times[name]["launch"].append(1000 * launched)
    return times


@torch.inference_mode()
def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=TOWERS, default=["qwen2.5-vl", "qwen3-vl"])
    parser.add_argument("--computed-shares", type=float, nargs="*", default=[1, 0.75, 0.5, 0.35])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument(
        "--compilation", action="store_true", help="with the kernels of a server that compiles"
    )
    parser.add_argument("--json", type=Path, help="where to write all times")
    args = parser.parse_args()

    device = torch.device("cuda")
    record: dict[str, Any] = {"environment": environment(), "dtype": "bfloat16"}
    record |= {"with_compilation": args.compilation, "models": {}}
    print(f"32 frames, {GRID[0] * GRID[1] * GRID[2]} patches, {torch.cuda.get_device_name()}")
    print("                             gpu  of first     launch  error to vLLM's")
    for model in args.models:
        make_config, make = TOWERS[model]
        config = make_config(**FULL[model])
        tower = make_tower(
            config,
            device,
            torch.bfloat16,
            make=make,
            as_served=True,
            with_compilation=args.compilation,
        )
        patches = random_patches(config, GRID, device).bfloat16()
        cases = cases_of(model, tower, patches, args.computed_shares)
        expected = cases["vllm"]().float()
        errors = {
            name: relative_error(run().view_as(expected), expected) for name, run in cases.items()
        }
        times = measure(cases, args.repeats)
        first = statistics.median(times["vllm"]["gpu"])
        for name, taken in times.items():
            gpu, launch = (statistics.median(taken[kind]) for kind in ("gpu", "launch"))
            print(
                f"{model:11}{name:14} {gpu:7.2f} ms {gpu / first:6.2f} {launch:8.2f} ms"
                f" {errors[name]:.2g}"
            )
        record["models"][model] = {"milliseconds": times, "errors_to_vllm": errors}
    if args.json:
        write_json(args.json, record)


if __name__ == "__main__":
    main()
