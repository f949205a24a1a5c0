"""Writes a model folder of real shapes: ``python -m bench.model_shapes 7b FOLDER``.

The folder has config, processor and a tokenizer of bytes. ``--random-weights`` adds weights, see
``weights.py``. Without them, serve with ``--load-format dummy``.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench.model_shapes import llava_onevision, qwen_vl
from bench.model_shapes.weights import save_weights


def main(argv: Sequence[str] | None = None) -> None:
    """Write the folder that the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.model_shapes", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("size", choices=[*llava_onevision.SIZES, *qwen_vl.SIZES])
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--random-weights", action="store_true", help="LLaVA-OneVision's only: 16 GB for 7b"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.random_weights and args.size in qwen_vl.SIZES:
        parser.error(
            f"--random-weights is for {', '.join(llava_onevision.SIZES)}, got {args.size}: "
            "serve Qwen-VL's shapes with --load-format dummy"
        )
    if args.size in qwen_vl.SIZES:
        qwen_vl.build(args.size, args.folder)
    else:
        llava_onevision.build(args.size, args.folder)
    print(f"{args.folder}: {args.size} shapes")
    if args.random_weights:
        num_weights, num_bytes = save_weights(args.folder, args.seed)
        print(f"{num_weights} random weights, {num_bytes / 1e9:.1f} GB, seed {args.seed}")


if __name__ == "__main__":
    main()
