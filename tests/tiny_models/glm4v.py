"""Tiny checkpoints of GLM-4.1V, 4.5V and 4.6V."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.model_shapes.llava_onevision import build_tokenizer
from tests.families import MARKS_FILE, SPECIAL_TOKENS, TEXT, text_config, write

_TOKENS = [
    f"<|{name}|>"
    for name in (
        *("begin_of_image", "image", "end_of_image"),
        *("begin_of_video", "video", "end_of_video"),
    )
]


def build_glm4v(folder: Path, *, version: str = "4.1") -> Any:
    """Write a checkpoint of GLM-4.1V or 4.6V, at most 384 tokens a video; return its model.

    4.6V differs in its processor and in the text that tells a frame's time.
    """
    from transformers import (
        Glm4vConfig,
        Glm4vForConditionalGeneration,
        Glm4vImageProcessor,
        Glm4vProcessor,
        Glm4vVideoProcessor,
        Glm46VImageProcessor,
        Glm46VProcessor,
        Glm46VVideoProcessor,
    )

    tokenizer = build_tokenizer([*SPECIAL_TOKENS, *_TOKENS], "{{ messages }}")
    token = tokenizer.convert_tokens_to_ids
    text = text_config(tokenizer, mrope_section=[4, 2, 2])
    text["rope_parameters"]["partial_rotary_factor"] = 0.5
    config = Glm4vConfig(
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "out_hidden_size": TEXT["hidden_size"],
            "image_size": 112,
        },
        text_config=text,
        image_token_id=token("<|image|>"),
        video_token_id=token("<|video|>"),
        image_start_token_id=token("<|begin_of_image|>"),
        image_end_token_id=token("<|end_of_image|>"),
        video_start_token_id=token("<|begin_of_video|>"),
        video_end_token_id=token("<|end_of_video|>"),
        tie_word_embeddings=False,
    )
    image = {"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * 2 * 64}
    video = {"shortest_edge": 28 * 28 * 8, "longest_edge": 2 * 28 * 28 * 384}
    old = version == "4.1"
    processor = (Glm4vProcessor if old else Glm46VProcessor)(
        image_processor=(Glm4vImageProcessor if old else Glm46VImageProcessor)(size=image),
        video_processor=(Glm4vVideoProcessor if old else Glm46VVideoProcessor)(size=video),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
    )
    model = write(folder, Glm4vForConditionalGeneration, config, processor)
    marks = {kind: f"<|begin_of_{kind}|><|{kind}|><|end_of_{kind}|>" for kind in ("image", "video")}
    (folder / MARKS_FILE).write_text(json.dumps(marks))
    return model
