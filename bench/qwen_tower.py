"""Prints the time of Qwen2.5-VL-7B's tower with vLLM's MLPs and with aligned MLPs.

    python -m bench.qwen_tower [--repeats 20] [--json FILE]

The tower has random weights on a GPU, in bfloat16, and encodes 32 frames of 756x420 pixels. Both
take turns; times are those of CUDA events. Outside of a server vLLM runs slower norms and
activations, so a server gains another share.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

from bench.tower import make_tower, milliseconds
from scissor_vllm.loadtest.record import environment, write_json

QWEN2_5_VL_7B = Qwen2_5_VLVisionConfig(out_hidden_size=3584)
GRID = (16, 30, 54)
"""Temporal patches, rows and columns of patches."""


def make_qwen_tower(config: Any) -> Any:
    """Return vLLM's tower of Qwen2.5-VL."""
    from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VisionTransformer

    return Qwen2_5_VisionTransformer(config)


def random_patches(grid: tuple[int, int, int], device: torch.device) -> torch.Tensor:
    """Return (patches, values of each) float32."""
    config = QWEN2_5_VL_7B
    width = config.in_channels * config.temporal_patch_size * config.patch_size**2
    generator = torch.Generator(device).manual_seed(0)
    num_patches = grid[0] * grid[1] * grid[2]
    return torch.randn(num_patches, width, device=device, generator=generator)


@torch.inference_mode()
def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path, help="where to write all times")
    args = parser.parse_args()
    from scissor_vllm.worker.aligned_mlp import AlignedMLPs

    device = torch.device("cuda")
    tower = make_tower(QWEN2_5_VL_7B, device, torch.bfloat16, make=make_qwen_tower)
    aligned = AlignedMLPs(tower)
    assert len(aligned) == len(tower.blocks), "vLLM's MLPs are not as this package knows them"
    patches = random_patches(GRID, device).bfloat16()

    def stock() -> torch.Tensor:
        result: torch.Tensor = tower(patches, grid_thw=[list(GRID)])
        return result

    def ours() -> torch.Tensor:
        with aligned.in_use():
            return stock()

    ways = {"vLLM's": stock, "aligned MLPs": ours}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(args.repeats + 3):
        for name, run in ways.items():
            taken = milliseconds(run)
            if turn >= 3:
                times[name].append(taken)
    first = statistics.median(times["vLLM's"])
    print(f"32 frames, {len(patches)} patches, {torch.cuda.get_device_name()}")
    for name, all_taken in times.items():
        median = statistics.median(all_taken)
        print(f"{name:14} {median:7.2f} ms {median / first:6.2f}")
    if args.json:
        write_json(args.json, {"environment": environment(), "milliseconds": times})


if __name__ == "__main__":
    main()
