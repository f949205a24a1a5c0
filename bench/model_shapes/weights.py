"""Random weights for a LLaVA-OneVision folder of this package.

Matrices are normal with deviation 0.02, as most models begin; norms are 1 and biases 0. vLLM's
``--load-format dummy`` draws from a far narrower range. A video's tokens then come out nearly
equal, as no real tower makes them, and the search for components takes longest there. With these
weights, pixels that differ give tokens that differ.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText

from bench.demo_training.model import hub_name

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


def save_weights(folder: Path, seed: int) -> tuple[int, int]:
    """Write weights for a folder's ``config.json``; return their number and bytes."""
    state = dict(weights(folder, seed))
    save_torch_state_dict(state, folder, max_shard_size="5GB", metadata={"format": "pt"})
    return len(state), sum(value.nbytes for value in state.values())
