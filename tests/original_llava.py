"""A tiny checkpoint in LLaVA-OneVision's original format, and its forward pass in plain torch.

The forward pass uses neither transformers' nor vLLM's models. It reads the weights by their
original names and follows the papers of SigLIP, LLaVA-OneVision and Qwen2.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen2Tokenizer

Weights = Mapping[str, Tensor]

IMAGE_SIZE, PATCH = 100, 14
"""As in the real model, patches do not fill the pixels, nor pools the patches: 7 x 7 patches are
pooled to 4 x 4."""
TOKENS_PER_FRAME = 16
VISION_WIDTH, VISION_HEADS, VISION_LAYERS = 64, 2, 3
WIDTH, HEADS, KEY_HEADS, LAYERS, INNER = 128, 4, 2, 2, 160
THETA, EPSILON = 1000000.0, 1e-6
VOCABULARY = 320
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TOWER = "model.vision_tower.vision_tower.vision_model."

TOWER_CONFIG = {
    "model_type": "siglip",
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": VISION_WIDTH,
        "intermediate_size": 96,
        "num_hidden_layers": VISION_LAYERS,
        "num_attention_heads": VISION_HEADS,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH,
    },
}


def original_config(**changes: Any) -> dict[str, Any]:
    """Return a config.json with the keys of the public ones."""
    config: dict[str, Any] = {
        "architectures": ["LlavaQwenForCausalLM"],
        "model_type": "qwen2",
        "attention_dropout": 0.0,
        "eos_token_id": 258,
        "hidden_act": "silu",
        "hidden_size": WIDTH,
        "image_aspect_ratio": "anyres_max_9",
        "image_grid_pinpoints": [[100, 100], [100, 200], [200, 100]],
        "image_token_index": 151646,
        "initializer_range": 0.02,
        "intermediate_size": INNER,
        "max_position_embeddings": 32768,
        "max_window_layers": LAYERS,
        "mm_hidden_size": VISION_WIDTH,
        "mm_patch_merge_type": "spatial_unpad",
        "mm_projector_type": "mlp2x_gelu",
        "mm_resampler_type": None,
        "mm_spatial_pool_mode": "bilinear",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "google/siglip-tiny",
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KEY_HEADS,
        "rms_norm_eps": EPSILON,
        "rope_scaling": None,
        "rope_theta": THETA,
        "sliding_window": 131072,
        "tie_word_embeddings": False,
        "tokenizer_padding_side": "right",
        "torch_dtype": "float32",
        "transformers_version": "4.40.0.dev0",
        "use_cache": True,
        "use_mm_proj": True,
        "use_sliding_window": False,
        "vocab_size": VOCABULARY,
    }
    return {**config, **changes}


def _tower_shapes(prefix: str, num_layers: int) -> dict[str, tuple[int, ...]]:
    width, inner = VISION_WIDTH, 96
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.patch_embedding.weight": (width, 3, PATCH, PATCH),
        "embeddings.patch_embedding.bias": (width,),
        "embeddings.position_embedding.weight": ((IMAGE_SIZE // PATCH) ** 2, width),
        "post_layernorm.weight": (width,),
        "post_layernorm.bias": (width,),
    }
    for layer in range(num_layers):
        at = f"encoder.layers.{layer}."
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{at}{norm}.weight": (width,), f"{at}{norm}.bias": (width,)}
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes[f"{at}self_attn.{part}.weight"] = (width, width)
            shapes[f"{at}self_attn.{part}.bias"] = (width,)
        shapes |= {f"{at}mlp.fc1.weight": (inner, width), f"{at}mlp.fc1.bias": (inner,)}
        shapes |= {f"{at}mlp.fc2.weight": (width, inner), f"{at}mlp.fc2.bias": (width,)}
    return {prefix + name: shape for name, shape in shapes.items()}


def _language_shapes(num_layers: int, inner: int) -> dict[str, tuple[int, ...]]:
    head = WIDTH // HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, WIDTH),
        "model.norm.weight": (WIDTH,),
        "model.mm_projector.0.weight": (WIDTH, VISION_WIDTH),
        "model.mm_projector.0.bias": (WIDTH,),
        "model.mm_projector.2.weight": (WIDTH, WIDTH),
        "model.mm_projector.2.bias": (WIDTH,),
        "model.image_newline": (WIDTH,),
        "lm_head.weight": (VOCABULARY, WIDTH),
    }
    for layer in range(num_layers):
        at = f"model.layers.{layer}."
        rows = {"q_proj": WIDTH, "k_proj": KEY_HEADS * head, "v_proj": KEY_HEADS * head}
        for part, size in rows.items():
            shapes |= {f"{at}self_attn.{part}.weight": (size, WIDTH)}
            shapes |= {f"{at}self_attn.{part}.bias": (size,)}
        shapes |= {f"{at}self_attn.o_proj.weight": (WIDTH, WIDTH)}
        shapes |= {f"{at}mlp.gate_proj.weight": (inner, WIDTH)}
        shapes |= {f"{at}mlp.up_proj.weight": (inner, WIDTH)}
        shapes |= {f"{at}mlp.down_proj.weight": (WIDTH, inner)}
        shapes |= {f"{at}input_layernorm.weight": (WIDTH,)}
        shapes |= {f"{at}post_attention_layernorm.weight": (WIDTH,)}
    return shapes


def _drawn(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Return weights that are large enough for each to affect the result."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        drawn = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            weights[name] = drawn * (shape[0] / drawn.numel()) ** 0.5
        else:
            weights[name] = 0.2 * drawn + ("norm" in name and name.endswith("weight"))
    return weights


def original_weights(seed: int = 0, *, tower: bool = True) -> dict[str, Tensor]:
    """Return a checkpoint's weights as the original trainer saves them.

    The tower has no last layer and no head. A frozen tower is left out.
    """
    shapes = _language_shapes(LAYERS, INNER)
    if tower:
        shapes |= _tower_shapes(TOWER, VISION_LAYERS - 1)
    return _drawn(shapes, seed)


def large_weights(num_layers: int, inner: int) -> dict[str, Tensor]:
    """Return weights with other MLP sizes than :func:`original_weights`."""
    shapes = _language_shapes(num_layers, inner) | _tower_shapes(TOWER, VISION_LAYERS - 1)
    return {name: torch.full(shape, 0.01) for name, shape in shapes.items()}


def siglip_weights(seed: int = 1) -> dict[str, Tensor]:
    """Return the weights of a SigLIP repository: tower, head and text model."""
    shapes = _tower_shapes("vision_model.", VISION_LAYERS)
    shapes |= {"vision_model.head.probe": (1, 1, VISION_WIDTH), "logit_scale": (1,)}
    shapes |= {"text_model.final_layer_norm.weight": (VISION_WIDTH,)}
    return _drawn(shapes, seed)


def as_frozen_tower(siglip: Weights) -> dict[str, Tensor]:
    """Return a SigLIP repository's weights by their names in a checkpoint."""
    prefix = "vision_model."
    return {
        TOWER + name.removeprefix(prefix): weight
        for name, weight in siglip.items()
        if name.startswith(prefix)
    }


def save_original(
    folder: Path, weights: Weights, num_shards: int = 1, suffix: str = "safetensors", **config: Any
) -> Path:
    """Write an original checkpoint of so many files and return its folder."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(original_config(**config)))
    save_tokenizer(folder)
    save_weights(folder, weights, num_shards, suffix)
    return folder


def save_siglip(folder: Path, weights: Weights | None = None) -> Path:
    """Write a SigLIP repository and return its folder; without weights, its config alone."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(TOWER_CONFIG))
    if weights is not None:
        save_weights(folder, weights)
    return folder


def save_weights(
    folder: Path, weights: Weights, num_shards: int = 1, suffix: str = "safetensors"
) -> None:
    """Write files of weights, with an index if there are several."""
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    names = list(weights)
    weight_map = {}
    for number in range(num_shards):
        part = names[number * len(names) // num_shards : (number + 1) * len(names) // num_shards]
        file = f"{stem}.{suffix}"
        if num_shards > 1:
            file = f"{stem}-{number + 1:05d}-of-{num_shards:05d}.{suffix}"
        if suffix == "safetensors":
            save_file({name: weights[name] for name in part}, folder / file)
        else:
            torch.save({name: weights[name] for name in part}, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    if num_shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def save_tokenizer(folder: Path) -> None:
    """Write a Qwen tokenizer of 256 bytes and three special tokens, without merges."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Qwen2Tokenizer(
        vocab={byte: number for number, byte in enumerate(alphabet)},
        merges=[],
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL),
    )
    tokenizer.save_pretrained(folder)


# The original forward pass.


def video_rows(weights: Weights, pixels: Tensor) -> Tensor:
    """Return tokens (T*P, D) without the newline, from normalized pixels (T, 3, H, W)."""
    features = _projected(weights, _vision_features(weights, pixels))
    side = IMAGE_SIZE // PATCH
    grid = features.view(len(pixels), side, side, -1).permute(0, 3, 1, 2)
    pooled = F.interpolate(grid, size=[-(-side // 2)] * 2, mode="bilinear")
    return pooled.flatten(2).transpose(1, 2).flatten(0, 1)


def _vision_features(weights: Weights, pixels: Tensor) -> Tensor:
    """Return the input of SigLIP's last layer, (T, patches, width)."""

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"{TOWER}{name}.weight"], weights[f"{TOWER}{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        weight, bias = weights[f"{TOWER}{name}.weight"], weights[f"{TOWER}{name}.bias"]
        return F.layer_norm(x, (VISION_WIDTH,), weight, bias, eps=EPSILON)

    embedding = f"{TOWER}embeddings.patch_embedding"
    patches = F.conv2d(
        pixels, weights[f"{embedding}.weight"], weights[f"{embedding}.bias"], stride=PATCH
    )
    x = patches.flatten(2).transpose(1, 2)
    x = x + weights[f"{TOWER}embeddings.position_embedding.weight"]
    for layer in range(VISION_LAYERS - 1):
        at = f"encoder.layers.{layer}."
        y = norm(x, f"{at}layer_norm1")
        q, k, v = (_heads(linear(y, f"{at}self_attn.{p}_proj"), VISION_HEADS) for p in "qkv")
        x = x + linear(_attended(q, k, v), f"{at}self_attn.out_proj")
        y = F.gelu(linear(norm(x, f"{at}layer_norm2"), f"{at}mlp.fc1"), approximate="tanh")
        x = x + linear(y, f"{at}mlp.fc2")
    return x


def _projected(weights: Weights, features: Tensor) -> Tensor:
    first, second = "model.mm_projector.0", "model.mm_projector.2"
    hidden = F.linear(features, weights[f"{first}.weight"], weights[f"{first}.bias"])
    return F.linear(F.gelu(hidden), weights[f"{second}.weight"], weights[f"{second}.bias"])


def embedded(weights: Weights, token_ids: Tensor, video_token: int, rows: Tensor) -> Tensor:
    """Return embeddings (N, D) of a prompt's tokens, with a video's rows at its tokens."""
    embeds = weights["model.embed_tokens.weight"][token_ids].clone()
    embeds[token_ids == video_token] = rows
    return embeds


def logits(weights: Weights, embeds: Tensor) -> Tensor:
    """Return the language model's logits at every position, (N, vocabulary)."""
    x = embeds
    cos, sin = _rotation(len(x))
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        y = _rms_norm(x, weights[f"{at}input_layernorm.weight"])
        q, k, v = (
            F.linear(
                y,
                weights[f"{at}self_attn.{p}_proj.weight"],
                weights[f"{at}self_attn.{p}_proj.bias"],
            )
            for p in "qkv"
        )
        query = _rotated(_heads(q, HEADS), cos, sin)
        key = _rotated(_heads(k, KEY_HEADS), cos, sin).repeat_interleave(HEADS // KEY_HEADS, 0)
        value = _heads(v, KEY_HEADS).repeat_interleave(HEADS // KEY_HEADS, 0)
        attended = _attended(query, key, value, is_causal=True)
        x = x + F.linear(attended, weights[f"{at}self_attn.o_proj.weight"])
        y = _rms_norm(x, weights[f"{at}post_attention_layernorm.weight"])
        gate = F.silu(F.linear(y, weights[f"{at}mlp.gate_proj.weight"]))
        up = F.linear(y, weights[f"{at}mlp.up_proj.weight"])
        x = x + F.linear(gate * up, weights[f"{at}mlp.down_proj.weight"])
    output = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    return F.linear(_rms_norm(x, weights["model.norm.weight"]), output)


def _heads(x: Tensor, num_heads: int) -> Tensor:
    return x.unflatten(-1, (num_heads, -1)).transpose(-3, -2)


def _attended(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool = False) -> Tensor:
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(-3, -2).flatten(-2)


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x * (x.square().mean(-1, keepdim=True) + EPSILON).rsqrt()


def _rotation(num_tokens: int) -> tuple[Tensor, Tensor]:
    width = WIDTH // HEADS
    frequencies = THETA ** -(torch.arange(0, width, 2) / width)
    angles = torch.outer(torch.arange(num_tokens), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin
