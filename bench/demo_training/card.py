"""The model card of a trained demo model: every number in it is read from its ``training.json``.

    python -m bench.demo_training.card FOLDER

writes FOLDER/README.md anew; training writes it too.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

RECORD = "training.json"
CARD = "README.md"


def card(record: Mapping[str, Any]) -> str:
    """Return the card's text, Markdown, from what ``training.json`` holds."""
    model = record["model"]
    lines = [
        "---",
        "license: apache-2.0",
        "library_name: transformers",
        "pipeline_tag: video-text-to-text",
        "---",
        "",
        "# Scissor vLLM's demo model",
        "",
        f"A video language model of {model['num_parameters'] / 1e6:.1f} million parameters "
        f"({model['weights_bytes'] / 2**20:.1f} MiB in bfloat16) in LLaVA-OneVision's architecture "
        "(`LlavaOnevisionForConditionalGeneration`): a SigLIP-shaped tower of "
        f"{model['size']['vision_layers']} layers, a projector, a Qwen2-shaped language model of "
        f"{model['size']['text_layers']}. A frame of {model['size']['image_size']} pixels is "
        f"{model['tokens_per_frame']} tokens.",
        "",
        "It exists so that the compression of video tokens can be tested with answers that can be "
        "right or wrong, without a download.",
        "",
        "## What it is",
        "",
        "- Trained from random weights on made-up clips (`bench/world`), on nothing else: shapes, "
        "signs and places, and short questions about them, free or with choices A to D.",
        "- Trained without compression. What it answers when its video is compressed shows what "
        "the compression keeps. The positions of a video's tokens were drawn at random, as models "
        "meet them that learn from pictures of many sizes (`bench/demo_training/places.py`).",
        "",
        "## What it is not",
        "",
        "- No general model. It knows a few dozen words and nothing of real videos; whatever else "
        "it is asked, its answer means nothing.",
        "- Not trained on pictures or text alone, though both load and run.",
        "- Its accuracy here is measured on painted frames of validation seeds. Held-out clips as "
        "mp4 through a server are what `make accuracy` measures.",
        "",
        "## Accuracy",
        "",
        "Share of answers that greedy decoding gives exactly, on scenes of the validation seeds, "
        f"never trained on ({record['num_validation_clips']} clips):",
        "",
        *_accuracy_table(record["final_validation"]),
        "",
        f"The same on {record['num_compressed_clips']} of the clips, with their video tokens "
        "compressed by this package's methods to a share of their number, without a server:",
        "",
        *_accuracy_table(record["compressed_validation"]),
        "",
        "## Training",
        "",
        *_training(record),
        "Loss curve, configuration and environment: `training.json`.",
        "",
        "## Licence",
        "",
        "Apache-2.0, weights and code. The clips are made by the project's own code; no other data "
        "or weights were used.",
        "",
    ]
    return "\n".join(lines)


def _training(record: Mapping[str, Any]) -> Iterator[str]:
    """Yield what was run, the training that this one went on from first."""
    if record.get("before"):
        yield from _training(record["before"])
        yield "Gone on from there:"
        yield ""
    environment = record["environment"]
    versions = environment["versions"]
    yield f"`{record['command']}`"
    yield ""
    yield (
        f"- {record['num_steps']} steps of {record['batch_size']} clips or more, "
        f"{record['num_clips']} clips in all; seed {record['seed']}"
    )
    yield (
        f"- {record['seconds']:.0f} seconds in all, {record['training_seconds']:.0f} of them "
        f"training, on {environment['gpu'] or environment['cpu']}"
    )
    yield (
        f"- torch {versions.get('torch')}, transformers {versions.get('transformers')}; "
        f"commit {environment['commit']}"
    )
    yield ""


def _accuracy_table(scores: Mapping[str, Mapping[str, Mapping[str, int]]]) -> Iterator[str]:
    ways = list(scores)
    yield "| skill | " + " | ".join(ways) + " |"
    yield "| --- |" + " ---: |" * len(ways)
    for skill in scores["whole"]:
        cells = [scores[way][skill] for way in ways]
        yield f"| {skill} | " + " | ".join(_percent(cell) for cell in cells) + " |"
    means = [_mean(scores[way]) for way in ways]
    yield "| mean of the skills | " + " | ".join(f"{100 * mean:.1f} %" for mean in means) + " |"


def _percent(cell: Mapping[str, int]) -> str:
    if not cell["num_asked"]:
        return "none"
    return f"{100 * cell['num_right'] / cell['num_asked']:.1f} %"


def _mean(scores: Mapping[str, Mapping[str, int]]) -> float:
    shares = [
        cell["num_right"] / cell["num_asked"] for cell in scores.values() if cell["num_asked"]
    ]
    return sum(shares) / len(shares) if shares else float("nan")


def main() -> None:
    """Write the card of a folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="a trained model's, with training.json")
    folder = parser.parse_args().folder
    record = json.loads((folder / RECORD).read_text())
    temporary = folder / f"{CARD}.writing"
    temporary.write_text(card(record))
    temporary.rename(folder / CARD)


if __name__ == "__main__":
    main()
