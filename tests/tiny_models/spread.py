"""Weights for checkpoints without any: made in the engine, the same for each engine."""

from __future__ import annotations

import zlib

import torch


def spread_engine_weights(model: torch.nn.Module) -> None:
    """Give a model of vLLM's its weights, matrices with orthogonal rows, by their names."""
    for name, weight in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        if weight.ndim > 1 and weight.is_floating_point():
            made = torch.randn(weight.flatten(1).shape, generator=generator)
            if "embed_tokens" not in name:
                made = torch.nn.init.orthogonal_(torch.empty_like(made), generator=generator)
            if "language_model" in name and "qkv_proj" in name:
                made *= 1.8
            weight.data.copy_(made.view(weight.shape))
        elif "norm" in name and name.endswith("weight"):
            weight.data.fill_(1)
