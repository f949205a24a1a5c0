"""Tokenizer, chat template and processors of a converted model."""

from pathlib import Path
from typing import Any

from scissor_vllm.convert.config import ConversionError, reading

IMAGE, VIDEO = "<image>", "<video>"

CHAT_TEMPLATE = """\
{%- if messages[0]['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{- '<image>\\n' -}}
{%- elif part['type'] == 'video' -%}{{- '<video>\\n' -}}
{%- elif part['type'] == 'text' -%}{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
"""Qwen's chat format, as in the original's prompts: a system line, and a line for each video."""

_SIGLIP_PIXELS = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
"""SigLIP's normalization, because the saved classes default to CLIP's."""


def media_tokenizer(source: Path) -> Any:
    """Return a checkpoint's tokenizer with a token for an image and one for a video.

    The original replaces both before the model, so its tokenizer has neither.

    Raises:
        ConversionError: the folder has no tokenizer, or a damaged one.
    """
    from transformers import AddedToken, AutoTokenizer

    with reading(source, "download the checkpoint's tokenizer again"):
        tokenizer = AutoTokenizer.from_pretrained(source)
    tokens = [AddedToken(token, special=True, normalized=False) for token in (IMAGE, VIDEO)]
    tokenizer.add_tokens(tokens, special_tokens=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def media_token_ids(tokenizer: Any, vocab_size: int) -> tuple[int, int]:
    """Return the token ids of an image and a video.

    Raises:
        ConversionError: the embedding has no row for a token.
    """
    image, video = (tokenizer.convert_tokens_to_ids(token) for token in (IMAGE, VIDEO))
    if max(image, video) >= vocab_size:
        raise ConversionError(
            f"{IMAGE} and {VIDEO} are tokens {image} and {video}, but the embedding has "
            f"{vocab_size} rows (vocab_size): enlarge the embedding of the checkpoint first"
        )
    return image, video


def save_processor(tokenizer: Any, config: Any, folder: Path) -> None:
    """Write tokenizer, chat template and the processors of images and videos."""
    from transformers import (
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
    )

    vision, pinpoints = config.vision_config, config.image_grid_pinpoints
    pixels = {"size": {"height": vision.image_size, "width": vision.image_size}, **_SIGLIP_PIXELS}
    processor = LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(image_grid_pinpoints=pinpoints, **pixels),
        video_processor=LlavaOnevisionVideoProcessor(**pixels),
        tokenizer=tokenizer,
        num_image_tokens=(vision.image_size // vision.patch_size) ** 2,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        vision_aspect_ratio=config.vision_aspect_ratio,
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
