"""Makes a model folder of real shapes without weights: ``python bench/shapes.py 7b FOLDER``.

Config, processor and the demo's tokenizer, for ``--load-format dummy``: random weights in the
shapes of LLaVA-OneVision (SigLIP so400m and Qwen2) give honest speed where no checkpoint can be
downloaded. Answers mean nothing.
"""

import argparse
from pathlib import Path

from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    Qwen2Config,
    SiglipVisionConfig,
)

from scissor_vllm.demo.model import CHAT_TEMPLATE, build_tokenizer

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


def build(size: str, folder: Path) -> None:
    """Write the folder."""
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
    config = LlavaOnevisionConfig(
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
    config.architectures = ["LlavaOnevisionForConditionalGeneration"]
    config.dtype = "bfloat16"
    size_of = {"height": SIDE, "width": SIDE}
    processor = LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size=size_of, image_grid_pinpoints=pinpoints),
        video_processor=LlavaOnevisionVideoProcessor(size=size_of),
        tokenizer=tokenizer,
        num_image_tokens=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    )
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Write the folder that the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("size", choices=sorted(LANGUAGE))
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    build(args.size, args.folder)
    print(f"{args.folder}: LLaVA-OneVision-{args.size} shapes, no weights")


if __name__ == "__main__":
    main()
