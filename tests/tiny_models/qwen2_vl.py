"""Tiny checkpoint of Qwen2-VL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.families import TEXT, build_qwen_tokenizer, text_config, tokens_of, write


def build_qwen2_vl(folder: Path) -> Any:
    """Write a checkpoint of Qwen2-VL, at most 64 tokens a frame, and return its model."""
    from transformers import (
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer = build_qwen_tokenizer()
    config = Qwen2VLConfig(
        vision_config={
            "depth": 2,
            "embed_dim": 64,
            "num_heads": 2,
            "mlp_ratio": 2,
            "hidden_size": TEXT["hidden_size"],
        },
        text_config=text_config(tokenizer, mrope_section=[4, 6, 6]),
        tie_word_embeddings=False,
        **tokens_of(tokenizer),
    )
    size = {"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * 64}
    processor = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size),
        video_processor=Qwen2VLVideoProcessor(size=size),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
    )
    return write(folder, Qwen2VLForConditionalGeneration, config, processor)
