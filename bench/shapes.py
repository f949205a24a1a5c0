"""Makes a model folder of real shapes without weights: ``python bench/shapes.py 7b FOLDER``.

Config, processor and a tokenizer of bytes, for ``--load-format dummy``: random weights in the
shapes of LLaVA-OneVision (SigLIP so400m and Qwen2) give honest speed where no checkpoint can be
downloaded. Answers mean nothing. Sizes that begin with ``qwen`` are in ``bench/qwen_shapes.py``.
"""

import argparse
import sys
from pathlib import Path

from transformers import Qwen2Config, SiglipVisionConfig

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import qwen_shapes  # noqa: E402
from bench.llava_onevision import build_config, build_tokenizer, save_processor  # noqa: E402

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
    if size in qwen_shapes.SIZES:
        return qwen_shapes.build(size, folder)
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


def main() -> None:
    """Write the folder that the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("size", choices=[*sorted(LANGUAGE), *qwen_shapes.SIZES])
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    build(args.size, args.folder)
    name = args.size if args.size in qwen_shapes.SIZES else f"LLaVA-OneVision-{args.size}"
    print(f"{args.folder}: {name} shapes, no weights")


if __name__ == "__main__":
    main()
