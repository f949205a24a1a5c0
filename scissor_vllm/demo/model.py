"""The demo model: small, trained on made-up clips, shipped with the package.

Its card is ``checkpoint/README.md``: its answers and its training.
"""

from pathlib import Path

DEMO_MODEL = "demo"
"""The demo model's name for ``scissor-vllm serve``."""


def demo_model_path() -> Path:
    """Return the folder with its config, weights, tokenizer, chat template and processor."""
    return Path(__file__).with_name("checkpoint")
