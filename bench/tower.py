"""Prints the time of SigLIP's encoder: vLLM's, fused, with MLPs in FP8, and with merged patches.

    python -m bench.tower [--frames 32] [--computed-shares 0.5] [--repeats 20] [--json FILE]

LLaVA-OneVision-7B's tower (SigLIP so400m, 384 pixels) with random weights on a GPU, in bfloat16.
All cases take turns, so a changing clock affects all of them. Times are those of CUDA events.
Errors are relative to the same weights in float32, with the same merged patches. Merged patches are
drawn at random, because time depends on their number only.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from transformers import SiglipVisionConfig

from scissor_vllm.loadtest.record import environment, write_json
from scissor_vllm.patch_merging import Grid, computed_patches, group_lengths
from scissor_vllm.worker.fp8_mlp import FP8MLP, make_mlps

SO400M = SiglipVisionConfig(
    hidden_size=1152,
    intermediate_size=4304,
    num_hidden_layers=26,
    num_attention_heads=16,
    image_size=384,
    patch_size=14,
    hidden_act="gelu_pytorch_tanh",
    vision_use_head=False,
)


def make_siglip(config: Any) -> Any:
    """Return vLLM's SigLIP tower without its pooling head."""
    from vllm.model_executor.models.siglip import SiglipVisionModel

    return SiglipVisionModel(config, use_head=False)


def make_tower(
    config: Any,
    device: torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    make: Callable[[Any], Any] = make_siglip,
    as_served: bool = False,
    with_compilation: bool = False,
) -> Any:
    """Return vLLM's tower with random matrices of standard deviation 0.02, see ``model_shapes``.

    Args:
        config: of the tower.
        device: where to.
        dtype: of the weights.
        seed: of the weights.
        make: of the tower, from its config.
        as_served: whether norms and activations are the kernels that a server chooses.
        with_compilation: whether that server compiles its language model.
    """
    from vllm.config import (
        CompilationConfig,
        CompilationMode,
        VllmConfig,
        set_current_vllm_config,
    )
    from vllm.distributed import (
        ensure_model_parallel_initialized,
        init_distributed_environment,
        model_parallel_is_initialized,
    )
    from vllm.utils.network_utils import get_open_port

    default = torch.get_default_dtype()
    vllm_config = VllmConfig()
    if as_served:
        mode = CompilationMode.VLLM_COMPILE if with_compilation else CompilationMode.NONE
        vllm_config = VllmConfig(compilation_config=CompilationConfig(mode=mode))
        # As a worker does.
        vllm_config.kernel_config.ir_op_priority.set_default()
    torch.set_default_dtype(dtype)
    try:
        with set_current_vllm_config(vllm_config), device:
            if not model_parallel_is_initialized():
                address = f"tcp://127.0.0.1:{get_open_port()}"
                init_distributed_environment(1, 0, address, 0, backend="gloo")
                ensure_model_parallel_initialized(1, 1)
            tower = make(config)
    finally:
        torch.set_default_dtype(default)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, weight in tower.named_parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.02, generator=generator)
            else:
                weight.fill_(float(name.endswith("weight")))
    return tower.eval()


def draw_anchors(
    num_frames: int, num_places: int, share: float, seed: int = 0, grid: Grid | None = None
) -> torch.Tensor:
    """Return anchors, int64 (T, P), with which the tower computes about ``share`` of all patches.

    The first frames of groups and the probes are always computed, so a low share is not reached.

    Args:
        num_frames: T.
        num_places: P.
        share: of places that are computed.
        seed: of the places.
        grid: of the places, None for a square.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(num_frames, num_places, generator=generator)
    begins = set(accumulate(group_lengths(num_frames), initial=0))
    frames = torch.arange(num_frames)[:, None]
    low, high = 0.0, 1.0
    for _ in range(20):
        joined = (low + high) / 2
        anchors = frames.repeat(1, num_places)
        for number in range(num_frames):
            if number not in begins:
                joins = drawn[number] < joined
                anchors[number] = torch.where(joins, anchors[number - 1], number)
        if computed_patches(anchors, grid).float().mean() > share:
            low = joined
        else:
            high = joined
    return anchors


def milliseconds(run: Callable[[], Any]) -> float:
    """Return the milliseconds of a run on the GPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def fused(tower: Any, pixels: torch.Tensor, mlps: Sequence[FP8MLP] | None = None) -> torch.Tensor:
    """Return the tower's tokens by the fused encoder."""
    from scissor_vllm.worker.siglip import fused_encoder

    with fused_encoder(tower, None, mlps) as is_on:
        assert is_on, "vLLM's layers are not as siglip.py knows them"
        tokens: torch.Tensor = tower(pixels)
        return tokens


def merged(
    tower: Any,
    anchors: torch.Tensor,
    pixels: torch.Tensor,
    mlps: Sequence[FP8MLP] | None = None,
) -> torch.Tensor:
    """Return the tower's tokens with patches merged by anchors."""
    from scissor_vllm.worker.merged_encoder import merging_encoder

    with merging_encoder(tower, anchors, None, mlps):
        tokens: torch.Tensor = tower(pixels)
        return tokens


def relative_error(tokens: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference over that of the expected tokens."""
    return float((tokens.float() - expected).norm() / expected.norm())


def measure(
    tower: Any, exact: Any, num_frames: int, computed_shares: list[float], repeats: int
) -> dict[str, Any]:
    """Return milliseconds of each run and relative errors, by name of the case.

    Args:
        tower: in bfloat16, on the GPU.
        exact: the same weights in float32.
        num_frames: T.
        computed_shares: shares of patches that the tower computes where it merges.
        repeats: timed runs of each case.
    """
    generator = torch.Generator("cuda").manual_seed(1)
    shape = (num_frames, 3, SO400M.image_size, SO400M.image_size)
    pixels = torch.randn(shape, device="cuda", generator=generator).to(torch.bfloat16)
    num_places = (SO400M.image_size // SO400M.patch_size) ** 2
    mlps = make_mlps(tower.vision_model.encoder.layers)
    cases: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "vllm": tower,
        "fused": partial(fused, tower),
        "FP8": partial(fused, tower, mlps=mlps),
    }
    with torch.inference_mode():
        expected = torch.cat([exact(frames.float()) for frames in pixels.split(8)])
        errors = {name: relative_error(run(pixels), expected) for name, run in cases.items()}
        del expected
        for share in computed_shares:
            anchors = draw_anchors(num_frames, num_places, share)
            name = f"{float(computed_patches(anchors).float().mean()):.2f} computed"
            cases[name] = partial(merged, tower, anchors)
            in_fp8 = f"{name}, FP8"
            cases[in_fp8] = partial(merged, tower, anchors, mlps=mlps)
            part = slice(sum(group_lengths(num_frames)[:2]))
            exactly = merged(exact, anchors[part], pixels[part].float())
            for case, of_case in ((name, None), (in_fp8, mlps)):
                found = merged(tower, anchors[part], pixels[part], of_case)
                errors[case] = relative_error(found, exactly)
        times: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(repeats):
            for name, run in cases.items():
                times[name].append(milliseconds(partial(run, pixels)))
    return {"num_frames": num_frames, "milliseconds": times, "relative_errors": errors}


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--frames", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--computed-shares", type=float, nargs="*", default=[0.75, 0.5, 0.35, 0.28])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    device = torch.device("cuda")
    tower = make_tower(SO400M, device, torch.bfloat16)
    exact = make_tower(SO400M, device, torch.float32)
    exact.load_state_dict({name: w.float() for name, w in tower.state_dict().items()})
    record: dict[str, Any] = {"environment": environment(), "dtype": "bfloat16", "cases": []}
    print("frames                          time  of fused, relative error")
    for num_frames in args.frames:
        case = measure(tower, exact, num_frames, args.computed_shares, args.repeats)
        fused_median = statistics.median(case["milliseconds"]["fused"])
        for name, values in case["milliseconds"].items():
            median = statistics.median(values)
            part, error = median / fused_median, case["relative_errors"][name]
            print(f"{num_frames:6} {name:19} {median:7.2f} ms {part:5.3f} {error:.2g}")
        record["cases"].append(case)
    if args.json:
        write_json(args.json, record)


if __name__ == "__main__":
    main()
