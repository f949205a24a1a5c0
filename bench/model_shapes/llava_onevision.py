"""A LLaVA-OneVision model's folder without weights: config, processor, chat template, tokenizer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

SIDE, PATCH = 384, 14
VOCABULARY = 152000

LANGUAGE = {
    "7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
    "0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
}
"""Qwen2's shapes, by the size in the checkpoint's name."""

SIZES = tuple(LANGUAGE)

_SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")
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


def build(size: str, folder: Path) -> None:
    """Write config, tokenizer and processor of SigLIP so400m and Qwen2 in one of ``SIZES``."""
    from transformers import Qwen2Config, SiglipVisionConfig

    tokenizer = build_tokenizer()
    pinpoints = [[SIDE * rows, SIDE * columns] for rows in range(1, 7) for columns in range(1, 7)]
    text = Qwen2Config(
        vocab_size=VOCABULARY,
        max_position_embeddings=32768,
        rope_theta=1000000.0,
        tie_word_embeddings=size == "0.5b",
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        **LANGUAGE[size],
    )
    vision = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=26,
        num_attention_heads=16,
        image_size=SIDE,
        patch_size=PATCH,
        vision_use_head=False,
    )
    config = build_config(tokenizer, vision, text, pinpoints)
    config.architectures = ["LlavaOnevisionForConditionalGeneration"]
    config.dtype = "bfloat16"
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    save_processor(tokenizer, config, folder)


def build_config(
    tokenizer: Any,
    vision: Any,
    text: Any,
    pinpoints: list[list[int]],
    tokens: tuple[str, str] = ("<image>", "<video>"),
) -> Any:
    """Return LLaVA-OneVision's config around a vision and a text config.

    Args:
        tokenizer: that knows ``tokens``.
        vision: config of the tower.
        text: config of the language model.
        pinpoints: heights and widths that an image may be resized to.
        tokens: that stand for an image and for a video.
    """
    from transformers import LlavaOnevisionConfig

    return LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(tokens[0]),
        video_token_index=tokenizer.convert_tokens_to_ids(tokens[1]),
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


def build_tokenizer(
    special_tokens: Sequence[str] = _SPECIAL_TOKENS, chat_template: str = CHAT_TEMPLATE
) -> Any:
    """Return a tokenizer of bytes: 256 of them and the special tokens, no merges."""
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
        additional_special_tokens=list(special_tokens),
        chat_template=chat_template,
    )
