"""What one process of the benchmark measures."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from bench.real_features.figures import measure
from bench.row_variants import as_compressor
from scissor_vllm import num_retained_tokens
from scissor_vllm.compression import Compressor, get_compressor
from scissor_vllm.compression.linkage import AverageLinkage

_DIAL = "linkage, exponent "
_ROWS = "linkage, "

Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """One sequence and layer, measured in a process of its own."""

    sequence: str
    layer: int
    frames: torch.Tensor
    """(T + 1, P, D) float32; the last frame is the one after the sequence."""
    needles: torch.Tensor
    """(T + 1, P, D) float32, of another video."""
    ratios: tuple[float, ...]
    methods: tuple[str, ...]
    """Names of methods, and of exponents and variants as :func:`dial_name` and :func:`rows_name`
    write them."""


def measure_task(task: Task) -> list[Row]:
    """Return the figures of one sequence and layer."""
    # Processes share the cores.
    torch.set_num_threads(1)
    rows = []
    num_tokens = (len(task.frames) - 1) * task.frames.shape[1]
    for ratio in task.ratios:
        kept = num_retained_tokens(num_tokens, ratio)
        for name in task.methods:
            figures = measure(compressor(name), task.frames, task.needles, kept, seed=0)
            cell = {"method": name, "ratio": ratio, "layer": task.layer}
            rows.append(cell | {"sequence": task.sequence} | asdict(figures))
    return rows


def dial_name(exponent: float) -> str:
    """Return the name of average linkage with an exponent."""
    return f"{_DIAL}{exponent:g}"


def rows_name(variant: str) -> str:
    """Return the name of a variant of ``bench.row_variants``."""
    return _ROWS + variant


def compressor(name: str) -> Compressor:
    """Return a method by its name, or that of an exponent or of a variant of rows."""
    if name.startswith(_DIAL):
        return AverageLinkage(ward_exponent=float(name.removeprefix(_DIAL)))
    if name.startswith(_ROWS):
        return as_compressor(name.removeprefix(_ROWS))
    return get_compressor(name)
