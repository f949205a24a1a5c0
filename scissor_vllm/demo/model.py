"""The demo model: small, trained on made-up clips, shipped with the package.

Its card, ``checkpoint/README.md``, says what it answers and how it was trained.
"""

from pathlib import Path

DEMO_MODEL = "demo"
"""The name that ``scissor-vllm serve`` takes for it."""


def demo_model_path() -> Path:
    """Return the folder with its config, weights, tokenizer, chat template and processor."""
    return Path(__file__).with_name("checkpoint")
