"""Tiny checkpoints of Gemma 4."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.model_shapes.llava_onevision import build_tokenizer
from tests.families import MARKS_FILE, SPECIAL_TOKENS, text_config, write

_NAMES = {
    "image_token": "<|image|>",
    "boi_token": "<|image>",
    "eoi_token": "<image|>",
    "audio_token": "<|audio|>",
    "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
    "video_token": "<|video|>",
}


def build_gemma4(folder: Path, *, per_layer: bool = True) -> Any:
    """Write a checkpoint with per-layer embeddings as E2B and E4B have; return its model."""
    from transformers import (
        Gemma4AudioFeatureExtractor,
        Gemma4Config,
        Gemma4ForConditionalGeneration,
        Gemma4ImageProcessor,
        Gemma4Processor,
        Gemma4TextConfig,
        Gemma4VideoProcessor,
        Gemma4VisionConfig,
    )

    tokenizer = build_tokenizer([*SPECIAL_TOKENS, *_NAMES.values()], "{{ messages }}")
    tokenizer._set_model_specific_special_tokens(special_tokens=_NAMES)
    token = tokenizer.convert_tokens_to_ids
    text = text_config(tokenizer)
    del text["rope_parameters"], text["bos_token_id"]
    config = Gemma4Config(
        text_config=Gemma4TextConfig(
            **text
            | {
                "num_hidden_layers": 4,
                "head_dim": 32,
                "global_head_dim": 32,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
                "sliding_window": 128,
                "num_kv_shared_layers": 0,
                "hidden_size_per_layer_input": 32 if per_layer else 0,
                "vocab_size_per_layer_input": len(tokenizer),
                "bos_token_id": token("<|endoftext|>"),
            }
        ),
        vision_config=Gemma4VisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=32,
            patch_size=8,
            pooling_kernel_size=2,
            position_embedding_size=256,
            default_output_length=70,
        ),
        image_token_id=token("<|image|>"),
        video_token_id=token("<|video|>"),
        boi_token_id=token("<|image>"),
        eoi_token_id=token("<image|>"),
        audio_config=None,
        tie_word_embeddings=False,
    )
    settings = {"patch_size": 8, "pooling_kernel_size": 2}
    processor = Gemma4Processor(
        feature_extractor=Gemma4AudioFeatureExtractor(),
        image_processor=Gemma4ImageProcessor(**settings, max_soft_tokens=70),
        video_processor=Gemma4VideoProcessor(**settings),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
    )
    model = write(folder, Gemma4ForConditionalGeneration, config, processor)
    (folder / MARKS_FILE).write_text(json.dumps({"image": "<|image|>", "video": "<|video|>"}))
    return model
