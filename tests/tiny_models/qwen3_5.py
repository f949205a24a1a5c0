"""Tiny checkpoints of Qwen3.5 and of the models that vLLM serves with its classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.families import TEXT, build_qwen_tokenizer, text_config, tokens_of, write


def build_qwen3_5(folder: Path, *, moe: bool = False) -> Any:
    """Write a checkpoint of Qwen3.5, at most 384 tokens a video, and return its model.

    Three layers of gated delta net and one of full attention, as every four layers of the
    published models.
    """
    from transformers import (
        Qwen3_5Config,
        Qwen3_5ForConditionalGeneration,
        Qwen3_5MoeConfig,
        Qwen3_5MoeForConditionalGeneration,
    )

    tokenizer = build_qwen_tokenizer()
    text = text_config(tokenizer, mrope_section=[3, 3, 2], mrope_interleaved=True)
    text["rope_parameters"]["partial_rotary_factor"] = 0.25
    text |= {
        "num_hidden_layers": 4,
        "head_dim": 64,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    }
    if moe:
        del text["intermediate_size"]
        text |= {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 64,
        }
    config = (Qwen3_5MoeConfig if moe else Qwen3_5Config)(
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "out_hidden_size": TEXT["hidden_size"],
            "num_position_embeddings": 144,
        },
        text_config=text,
        tie_word_embeddings=False,
        **tokens_of(tokenizer),
    )
    make = Qwen3_5MoeForConditionalGeneration if moe else Qwen3_5ForConditionalGeneration
    return write(folder, make, config, qwen3_vl_processor(tokenizer))


def qwen3_vl_processor(tokenizer: Any) -> Any:
    """Return Qwen3-VL's processor, which Qwen3.5 uses: at most 384 tokens a video."""
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    image = {"shortest_edge": 32 * 32 * 4, "longest_edge": 32 * 32 * 64}
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(
            size=image, patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3
        ),
        video_processor=Qwen3VLVideoProcessor(
            size={"shortest_edge": 32 * 32 * 8, "longest_edge": 2 * 32 * 32 * 384}
        ),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
    )


def build_exaone4_5(folder: Path) -> None:
    """Write a checkpoint of EXAONE 4.5 without weights, at most 64 tokens a frame."""
    from transformers import Exaone4_5_Config, Qwen2VLImageProcessor, Qwen2VLVideoProcessor
    from transformers.models.exaone4_5 import Exaone4_5_Processor

    tokenizer = build_qwen_tokenizer()
    config = Exaone4_5_Config(
        architectures=["Exaone4_5_ForConditionalGeneration"],
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "num_key_value_heads": 1,
            "out_hidden_size": TEXT["hidden_size"],
            "fullatt_block_indexes": [1],
        },
        text_config=text_config(tokenizer) | {"sliding_window": 128, "sliding_window_pattern": 2},
        tie_word_embeddings=False,
        **tokens_of(tokenizer),
    )
    size = {"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * 64}
    processor = Exaone4_5_Processor(
        image_processor=Qwen2VLImageProcessor(size=size),
        video_processor=Qwen2VLVideoProcessor(size=size),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
    )
    _write_without_weights(folder, config, processor)


def build_cosmos3(folder: Path) -> None:
    """Write a checkpoint of Cosmos 3 without weights, at most 384 tokens a video."""
    from transformers import Cosmos3OmniConfig

    tokenizer = build_qwen_tokenizer()
    text = text_config(tokenizer, mrope_section=[6, 5, 5], mrope_interleaved=True)
    config = Cosmos3OmniConfig(
        architectures=["Cosmos3ForConditionalGeneration"],
        vision_config={
            "depth": 3,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "out_hidden_size": TEXT["hidden_size"],
            "num_position_embeddings": 144,
            "deepstack_visual_indexes": [0, 1],
        },
        text_config=text | {"num_hidden_layers": 3, "head_dim": 32},
        tie_word_embeddings=False,
        **tokens_of(tokenizer),
    )
    _write_without_weights(folder, config, qwen3_vl_processor(tokenizer))


def build_interns2_preview(folder: Path) -> None:
    """Write a checkpoint of Intern-S2-Preview without weights: Qwen3.5's, as its class takes it."""
    build_qwen3_5(folder, moe=True)
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["InternS2PreviewForConditionalGeneration"]
    (folder / "config.json").write_text(json.dumps(config))


def _write_without_weights(folder: Path, config: Any, processor: Any) -> None:
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
