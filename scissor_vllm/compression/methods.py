"""The compression methods by name. A new method is one function and one line in METHODS."""

from collections.abc import Mapping
from typing import Protocol

import torch

from scissor_vllm.compression.result import CompressedTokens
from scissor_vllm.compression.scc import compress
from scissor_vllm.compression.uniform import select_evenly


class Compressor(Protocol):
    """A method: exactly ``num_retained`` rows from one video's tokens."""

    def __call__(self, tokens: torch.Tensor, num_retained: int) -> CompressedTokens:
        """Return K rows for tokens (T, P, D), for any K in 1..T*P and any finite input."""
        ...


def _scc(tokens: torch.Tensor, num_retained: int) -> CompressedTokens:
    return compress(tokens, num_retained=num_retained)


METHODS: Mapping[str, Compressor] = {
    "scc": _scc,
    "uniform": select_evenly,
}


def get_compressor(name: str) -> Compressor:
    """Return the method of that name.

    Raises:
        ValueError: no such method; the message lists those there are.
    """
    try:
        return METHODS[name]
    except KeyError:
        known = ", ".join(sorted(METHODS))
        raise ValueError(
            f"unknown video compression method {name!r}: choose one of {known}"
        ) from None
