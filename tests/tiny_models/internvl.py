"""Tiny checkpoints of InternVL 3 in transformers' format and in its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.model_shapes.llava_onevision import build_tokenizer
from tests.families import MARKS_FILE, SPECIAL_TOKENS, text_config, write

SIDE, PATCH = 56, 7


def build_internvl(folder: Path) -> Any:
    """Write a checkpoint in transformers' format, 16 tokens a frame; return its model."""
    from transformers import (
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        InternVLVideoProcessor,
        Qwen2Config,
    )
    from transformers.models.got_ocr2.image_processing_got_ocr2 import GotOcr2ImageProcessor

    special = [*SPECIAL_TOKENS, "<img>", "</img>", "<IMG_CONTEXT>", "<video>"]
    tokenizer = build_tokenizer(special, "{{ messages }}")
    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer._set_model_specific_special_tokens(special_tokens=names)
    config = InternVLConfig(
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": [SIDE, SIDE],
            "patch_size": [PATCH, PATCH],
        },
        text_config=Qwen2Config(**text_config(tokenizer)).to_dict(),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        tie_word_embeddings=False,
    )
    size = {"height": SIDE, "width": SIDE}
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=size, crop_to_patches=False),
        video_processor=InternVLVideoProcessor(size=size),
        tokenizer=tokenizer,
        image_seq_length=(SIDE // PATCH // 2) ** 2,
        chat_template=tokenizer.chat_template,
    )
    model = write(folder, InternVLForConditionalGeneration, config, processor)
    marks = {"image": "<IMG_CONTEXT>", "video": "<video>"}
    (folder / MARKS_FILE).write_text(json.dumps(marks))
    return model


_CONFIGURATION = """
from transformers import PretrainedConfig, Qwen2Config


class TinyChatConfig(PretrainedConfig):
    model_type = "internvl_chat"
    has_no_defaults_at_init = True

    def __init__(self, vision_config=None, text_config=None, **kwargs):
        self.vision_config = PretrainedConfig(**(vision_config or {}))
        self.text_config = Qwen2Config(**(text_config or {}))
        super().__init__(**kwargs)

    def get_text_config(self, *args, **kwargs):
        return self.text_config
"""


def build_internvl_chat(folder: Path) -> None:
    """Write a checkpoint in InternVL's own format, 16 tokens a frame, without weights."""
    special = [*SPECIAL_TOKENS, "<img>", "</img>", "<IMG_CONTEXT>"]
    tokenizer = build_tokenizer(special, "{{ messages }}")
    tokenizer.save_pretrained(folder)
    (folder / "configuration_tiny_chat.py").write_text(_CONFIGURATION)
    config = {
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoConfig": "configuration_tiny_chat.TinyChatConfig"},
        "model_type": "internvl_chat",
        "force_image_size": SIDE,
        "downsample_ratio": 0.5,
        "ps_version": "v2",
        "select_layer": -1,
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 4,
        "tie_word_embeddings": False,
        "vision_config": {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_channels": 3,
            "image_size": SIDE,
            "patch_size": PATCH,
            "qkv_bias": True,
            "qk_normalization": False,
            "norm_type": "layer_norm",
            "layer_norm_eps": 1e-6,
            "hidden_act": "gelu",
            "initializer_factor": 1.0,
        },
        "text_config": {
            **text_config(tokenizer),
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    marks = {"image": "<image>", "video": "<video>"}
    (folder / MARKS_FILE).write_text(json.dumps(marks))
