"""Tiny checkpoints of Nemotron Nano VL 2 and of the Omni models, without weights."""

from __future__ import annotations

import json
from pathlib import Path

from bench.model_shapes.llava_onevision import build_tokenizer
from tests.families import MARKS_FILE, SPECIAL_TOKENS, TEXT
from tests.tiny_models.spread import TINY_TOWER, TINY_WIDTH

SIDE, PATCH = 64, 8

_CONFIGURATION = """
from transformers import NemotronHConfig, PretrainedConfig


class TinyNemotronConfig(PretrainedConfig):
    model_type = "NemotronH_Nano_VL_V2"
    has_no_defaults_at_init = True

    def __init__(self, vision_config=None, text_config=None, **kwargs):
        self.vision_config = PretrainedConfig(**(vision_config or {}))
        self.text_config = NemotronHConfig(**(text_config or {}))
        super().__init__(**kwargs)

    def get_text_config(self, *args, **kwargs):
        return self.text_config
"""


def build_nemotron(folder: Path, *, frames_at_once: int = 1) -> None:
    """Write a checkpoint, 16 tokens a frame, or in the Omni models a pair of frames.

    One layer of each kind: Mamba, MLP and attention.
    """
    special = [*SPECIAL_TOKENS, "<image>", "<img>", "</img>", "<video>"]
    tokenizer = build_tokenizer(special, "{{ messages }}")
    token = tokenizer.convert_tokens_to_ids
    tokenizer.save_pretrained(folder)
    (folder / "configuration_tiny_nemotron.py").write_text(_CONFIGURATION)
    vision = {
        "args": {"model": TINY_TOWER, "cpe_max_size": 256, "register_multiple": 8},
        "patch_size": PATCH,
        "preferred_resolution": [SIDE, SIDE],
        "video_temporal_patch_size": frames_at_once,
        "separate_video_embedder": True,
    }
    text = {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT["hidden_size"],
        "layers_block_type": ["mamba", "mlp", "attention"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 8192,
        "intermediate_size": 256,
        "ssm_state_size": 16,
        "mamba_num_heads": 8,
        "mamba_head_dim": 32,
        "n_groups": 2,
        "chunk_size": 64,
        "dtype": "bfloat16",
        "pad_token_id": token("<|endoftext|>"),
        "bos_token_id": token("<|im_start|>"),
        "eos_token_id": token("<|im_end|>"),
    }
    config = {
        "architectures": ["NemotronH_Nano_VL_V2"],
        "auto_map": {"AutoConfig": "configuration_tiny_nemotron.TinyNemotronConfig"},
        "model_type": "NemotronH_Nano_VL_V2",
        "force_image_size": SIDE,
        "patch_size": PATCH,
        "downsample_ratio": 0.5,
        "ps_version": "v2",
        "template": "",
        "image_tag_type": "internvl",
        "use_thumbnail": True,
        "norm_mean": [0.5] * 3,
        "norm_std": [0.5] * 3,
        "vit_hidden_size": TINY_WIDTH,
        "projector_hidden_size": 128,
        "dtype": "bfloat16",
        "tie_word_embeddings": False,
        "vision_config": vision,
        "text_config": text,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / MARKS_FILE).write_text(json.dumps({"image": "<image>", "video": "<video>"}))
