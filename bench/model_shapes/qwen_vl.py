"""Qwen-VL's shapes without weights.

All resize 32 frames of 640 x 360 pixels so that a quarter and a tenth of the video's tokens are
whole numbers, and methods that round differently keep equally many: 16 x (15 x 27) = 6480 tokens by
the real shapes, about as many as LLaVA-OneVision's, 16 x (6 x 10) = 960 by the tiny ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from bench.model_shapes.llava_onevision import CHAT_TEMPLATE, build_tokenizer

NUM_FRAMES = 32
"""For which Qwen3-VL's limits are set: they are of a whole video."""
_SYSTEM_PROMPT = "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}\n"
"""Qwen2.5-VL's. Qwen3-VL has none, but vLLM 0.32's pruning ends the engine at a video of Qwen3-VL
with fewer tokens before it than a time within it has."""
_MARKS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]

_TINY_TEXT: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
}
_TINY_VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 2,
    "out_hidden_size": _TINY_TEXT["hidden_size"],
}

TEXT: dict[str, dict[str, Any]] = {
    "qwen2.5-vl-7b": {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128000,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1000000.0,
            "mrope_section": [16, 24, 24],
        },
    },
    "qwen2.5-vl-tiny": {
        **_TINY_TEXT,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [4, 6, 6],
        },
    },
    "qwen3-vl-8b": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 262144,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5000000.0,
            "mrope_section": [24, 20, 20],
            "mrope_interleaved": True,
        },
    },
    "qwen3-vl-tiny": {
        **_TINY_TEXT,
        "num_hidden_layers": 3,
        "head_dim": 32,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [6, 5, 5],
            "mrope_interleaved": True,
        },
    },
}
"""Of the language model."""

VISION: dict[str, dict[str, Any]] = {
    "qwen2.5-vl-7b": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "window_size": 112,
        "tokens_per_second": 2,
    },
    "qwen2.5-vl-tiny": {**_TINY_VISION, "fullatt_block_indexes": [1], "tokens_per_second": 2},
    "qwen3-vl-8b": {
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_heads": 16,
        "out_hidden_size": 4096,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [8, 16, 24],
    },
    "qwen3-vl-tiny": {
        **_TINY_VISION,
        "depth": 3,
        "num_position_embeddings": 144,
        "deepstack_visual_indexes": [0, 1],
    },
}
"""Of the vision tower."""

SIZES = tuple(TEXT)


def build(size: str, folder: Path) -> None:
    """Write config, tokenizer and processor of these shapes."""
    tokenizer = _tokenizer()
    processor, config = (_qwen3_vl if size.startswith("qwen3") else _qwen2_5_vl)(size, tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _qwen2_5_vl(size: str, tokenizer: PreTrainedTokenizerFast) -> tuple[Any, Any]:
    """Return processor and config; a limit is of the pixels of a frame."""
    image = {"shortest_edge": 4 * 28 * 28, "longest_edge": 768 * 28 * 28}
    if size.endswith("tiny"):
        video = image | {"longest_edge": 66 * 28 * 28}
    else:
        video = image | {"shortest_edge": 384 * 28 * 28}
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=image),
        video_processor=Qwen2VLVideoProcessor(size=video),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
    )
    config = Qwen2_5_VLConfig(
        architectures=["Qwen2_5_VLForConditionalGeneration"], **_settings(size, tokenizer)
    )
    return processor, config


def _qwen3_vl(size: str, tokenizer: PreTrainedTokenizerFast) -> tuple[Any, Any]:
    """Return processor and config; a limit is of the pixels of all frames of a video."""
    image = {"shortest_edge": 4 * 32 * 32, "longest_edge": 768 * 32 * 32}
    video = {"shortest_edge": 4 * 32 * 32, "longest_edge": NUM_FRAMES * 768 * 32 * 32}
    if size.endswith("tiny"):
        video["longest_edge"] = NUM_FRAMES * 66 * 32 * 32
    else:
        video["shortest_edge"] = NUM_FRAMES * 390 * 32 * 32
    processor = Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(
            size=image, patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3
        ),
        video_processor=Qwen3VLVideoProcessor(size=video),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
    )
    config = Qwen3VLConfig(
        architectures=["Qwen3VLForConditionalGeneration"], **_settings(size, tokenizer)
    )
    return processor, config


def _settings(size: str, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    token = tokenizer.convert_tokens_to_ids
    text = TEXT[size] | {
        "bos_token_id": None,
        "eos_token_id": token("<|im_end|>"),
        "pad_token_id": token("<|endoftext|>"),
        "rms_norm_eps": 1e-6,
    }
    return {
        "text_config": text,
        "vision_config": VISION[size],
        "image_token_id": token("<|image_pad|>"),
        "video_token_id": token("<|video_pad|>"),
        "vision_start_token_id": token("<|vision_start|>"),
        "vision_end_token_id": token("<|vision_end|>"),
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }


def _tokenizer() -> PreTrainedTokenizerFast:
    """Return the demo's tokenizer with Qwen-VL's marks around media."""
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": _MARKS})
    template = _SYSTEM_PROMPT + CHAT_TEMPLATE
    for kind in ("image", "video"):
        template = template.replace(f"<{kind}>", f"<|vision_start|><|{kind}_pad|><|vision_end|>")
    tokenizer.chat_template = template
    return tokenizer
