"""Weights for checkpoints without any: made while a model is loaded, the same in every engine."""

from __future__ import annotations

import zlib
from typing import Any

import torch

LOAD_FORMAT = "spread"
"""For vLLM's ``load_format``, once :func:`register_spread_weights` was called in its process."""


TINY_TOWER = "vit_tiny"
"""A tower for Nemotron's checkpoints: vLLM's smallest takes a second for a video on a CPU."""
TINY_WIDTH = 64
"""Of its hidden states."""


def register_spread_weights() -> None:
    """Let vLLM load checkpoints without weights, and those with the tiny tower."""
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader
    from vllm.transformers_utils.configs.radio import VIT_TIMM_DIM_BY_NAME

    VIT_TIMM_DIM_BY_NAME[TINY_TOWER] = (TINY_WIDTH, 2, 2, 2 * TINY_WIDTH)

    class SpreadModelLoader(DummyModelLoader):
        def __init__(self, load_config: Any) -> None:
            load_config.load_format = "dummy"
            super().__init__(load_config)

        def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
            super().load_weights(model, model_config)
            spread_weights_by_name(model)

    register_model_loader(LOAD_FORMAT)(SpreadModelLoader)


def spread_weights_by_name(model: torch.nn.Module) -> None:
    """Give a model of vLLM's its weights, matrices with orthogonal rows, by their names."""
    for name, weight in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        if weight.ndim > 1 and weight.is_floating_point():
            made = torch.randn(
                weight.flatten(1).shape, generator=generator, dtype=torch.float32, device="cpu"
            )
            if "embed_tokens" not in name:
                made = torch.nn.init.orthogonal_(torch.empty_like(made), generator=generator)
            if "language_model" in name and "qkv_proj" in name:
                made *= 1.8
            weight.data.copy_(made.view(weight.shape))
        elif "norm" in name and name.endswith("weight"):
            weight.data.fill_(1)
