"""The demo model: LLaVA-OneVision's architecture, small, with random weights, made in seconds.

It shows that tokens flow, counts are exact and the server is whole; its answers mean nothing.
"""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

DEMO_MODEL = "demo"
"""The name that ``scissor-vllm serve`` takes for it."""

_FORMAT = 1
"""Raised when what is built changes, so that an older build is not taken for it."""
_SEED = 0

_SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"]
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{- '<image>' -}}
{%- elif part['type'] == 'video' -%}{{- '<video>' -}}
{%- elif part['type'] == 'text' -%}{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def demo_model_path() -> Path:
    """Return the folder of the demo model, built on first use.

    It lies under ``$XDG_CACHE_HOME/scissor_vllm`` (``~/.cache`` if unset).
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scissor_vllm"
    path = cache / f"demo-{_FORMAT}"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f"{path.name}-", dir=cache))
        try:
            build_demo_model(temporary)
            temporary.rename(path)
        except OSError:
            # Another process was first, or the disk is full: only the former leaves a model.
            if not path.exists():
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return path


def build_demo_model(folder: Path) -> None:
    """Write config, weights, tokenizer, chat template and processor of the demo model.

    49 tokens a frame (98 pixels, patch 7, 14 x 14 patches, pooled to 7 x 7), width 128; head size
    32, the least that vLLM's CPU attention takes.
    """
    import torch
    from transformers import (
        LlavaOnevisionForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )

    tokenizer = build_tokenizer()
    side = 98
    vision = SiglipVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=side,
        patch_size=7,
        vision_use_head=False,
    )
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    )
    config = build_config(
        tokenizer, vision, text, pinpoints=[[side, side], [side, 2 * side], [2 * side, side]]
    )
    with torch.random.fork_rng():
        torch.manual_seed(_SEED)
        model = LlavaOnevisionForConditionalGeneration(config)
        # Of the usual small spread the tower would map every patch to nearly the same vector.
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "embed" not in name:
                torch.nn.init.orthogonal_(weight.data.flatten(1))
    model.save_pretrained(folder)
    save_processor(tokenizer, config, folder)


def build_config(tokenizer: Any, vision: Any, text: Any, pinpoints: list[list[int]]) -> Any:
    """Return LLaVA-OneVision's config around a vision and a text config."""
    from transformers import LlavaOnevisionConfig

    return LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
        tie_word_embeddings=text.tie_word_embeddings,
    )


def save_processor(tokenizer: Any, config: Any, folder: Path) -> None:
    """Write the tokenizer and the processor that fit a config."""
    from transformers import (
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
    )

    vision, pinpoints = config.vision_config, config.image_grid_pinpoints
    size = {"height": vision.image_size, "width": vision.image_size}
    processor = LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=pinpoints),
        video_processor=LlavaOnevisionVideoProcessor(size=size),
        tokenizer=tokenizer,
        num_image_tokens=(vision.image_size // vision.patch_size) ** 2,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def build_tokenizer() -> Any:
    """Return a byte-level tokenizer: 256 bytes and the special tokens, no merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=_SPECIAL_TOKENS,
        chat_template=CHAT_TEMPLATE,
    )
