"""Fills a folder of `bench/shapes.py` with weights: ``python bench/random_weights.py FOLDER``.

Matrices are normal with deviation 0.02, as most models begin, norms 1 and biases 0. vLLM's
``--load-format dummy`` draws all from so narrow a range that a video's tokens come out alike in all
but the last bits: no real tower does that, and searching for components takes longest there. With
these, what is unlike in the pixels stays unlike. Answers mean nothing all the same.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.demo_training.model import hub_name  # noqa: E402

DEVIATION = 0.02


def weights(folder: Path, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the bfloat16 weights of a LLaVA-OneVision config by the hub's names, on the CPU.

    Drawn on the GPU if there is one: the same seed gives other numbers there.
    """
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    state = {name: value for name, value in model.state_dict().items() if name not in tied}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    for name, value in tqdm(state.items(), desc="weights"):
        drawn = torch.empty(value.shape, dtype=torch.bfloat16, device=device)
        if value.ndim > 1 or name.endswith("image_newline"):
            drawn.normal_(std=DEVIATION, generator=generator)
        else:
            drawn.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        yield hub_name(name), drawn.cpu()


def main() -> None:
    """Write the weights into the folder that the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="with config.json")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    state = dict(weights(args.folder, args.seed))
    save_torch_state_dict(state, args.folder, max_shard_size="5GB", metadata={"format": "pt"})
    size = sum(value.nbytes for value in state.values())
    print(f"{args.folder}: {len(state)} weights, {size / 1e9:.1f} GB, seed {args.seed}")


if __name__ == "__main__":
    main()
