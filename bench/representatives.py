"""Compares rules for the position of a merged token, by their effect on a language model.

    python -m bench.representatives [--clips N] [--models N] [--ratios R ...] [--json FILE]

Synthetic clips and questions pass a small Qwen2.5-VL with random weights, once with all tokens of
the video and once with merged tokens at the positions of a rule. The distance is that of the last
layer's states of the question, relative to their norm. All rules have the same merged tokens,
ordered by position. So rules differ in position and order only, and the last rule separates these
two. The results are means over clips and models with 95 % intervals (paired bootstrap over clips).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize
from tqdm import tqdm

from bench.world.questions import ask
from bench.world.render import render
from bench.world.scene import sample_scene
from scissor_vllm import compress
from scissor_vllm.compression import CompressedTokens
from scissor_vllm.compression.members import representative_members
from scissor_vllm.loadtest.record import environment, write_json

TEXT: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": 0,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [8, 12, 12],
    },
}
VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_heads": 4,
    "out_hidden_size": TEXT["hidden_size"],
    "fullatt_block_indexes": [1],
}
ATTENTION_SPREAD = 1.8
"""Gain of queries' and keys' weights; without it attention is almost uniform."""
NUM_RESAMPLES = 2000


@dataclass(frozen=True)
class Video:
    """A clip's tokens and positions."""

    tokens: torch.Tensor
    """(T, P, D)."""
    places: torch.Tensor
    """(N, 3) int64: t, h, w."""


Rule = Callable[[Video, CompressedTokens], torch.Tensor]
"""Returns the member whose position each row takes, (K,) int64."""


def nearest(video: Video, compressed: CompressedTokens) -> torch.Tensor:
    """Return the member that is most similar to each row."""
    return representative_members(video.tokens, compressed)


def by_score(score: Callable[[Video, torch.Tensor], torch.Tensor]) -> Rule:
    """Return the rule that takes the member with the highest score, the first of equals.

    Args:
        score: returns the scores (n,) of a video's row, given the indices (n,) of its members.
    """

    def rule(video: Video, compressed: CompressedTokens) -> torch.Tensor:
        places = nearest(video, compressed)
        for row in range(len(places)):
            members = (compressed.assignment == row).nonzero().flatten()
            if len(members):
                places[row] = members[int(score(video, members).argmax())]
        return places

    return rule


def likeness_to_all(video: Video, members: torch.Tensor) -> torch.Tensor:
    """Return the mean cosine of each member with all members; the medoid has the highest."""
    rows = normalize(video.tokens.flatten(0, 1)[members], dim=-1)
    return (rows @ rows.T).mean(1)


def nearness_to_centre(video: Video, members: torch.Tensor) -> torch.Tensor:
    """Return how near each member is to the mean position, in tokens and temporal patches."""
    places = video.places[members].float()
    return -(places - places.mean(0)).square().sum(1)


def chance(video: Video, members: torch.Tensor) -> torch.Tensor:
    """Return pseudo-random scores that the members determine."""
    generator = torch.Generator().manual_seed(int(members.sum()))
    return torch.rand(len(members), generator=generator)


RULES: dict[str, Rule] = {
    "nearest": nearest,
    "medoid": by_score(likeness_to_all),
    "largest norm": by_score(
        lambda video, members: video.tokens.flatten(0, 1)[members].norm(dim=1)
    ),
    "first": by_score(lambda video, members: -members),
    "last": by_score(lambda video, members: members),
    "centre": by_score(nearness_to_centre),
    "random": by_score(chance),
}
ARRANGEMENTS = {rule: (rule, rule) for rule in RULES} | {
    "nearest, in first's order": ("nearest", "first")
}
"""Rules for a row's position and for its order."""


def build_model(seed: int) -> Any:
    """Return a small Qwen2.5-VL whose weights distinguish patches and positions."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(
        text_config=TEXT, vision_config=VISION, image_token_id=256, video_token_id=257
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config).eval()
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "embed_tokens" not in name:
                torch.nn.init.orthogonal_(weight.data.flatten(1))
                if "language_model" in name and ("q_proj" in name or "k_proj" in name):
                    weight.data.mul_(ATTENTION_SPREAD)
    return model


def encode(model: Any, processor: Any, seed: int) -> tuple[Video, list[int]]:
    """Return a synthetic clip's tokens, and a question about it as bytes."""
    scene = sample_scene(seed)
    frames = render([scene], "cpu")[0].permute(0, 3, 1, 2)
    inputs = processor([frames], return_tensors="pt", do_sample_frames=False)
    grid = inputs["video_grid_thw"]
    (tokens,) = model.model.get_video_features(inputs["pixel_values_videos"], grid).pooler_output
    t, h, w = grid[0, 0], grid[0, 1] // 2, grid[0, 2] // 2
    places = torch.cartesian_prod(torch.arange(t), torch.arange(h), torch.arange(w))
    question = ask(scene, seed)[0].text
    return Video(tokens.view(int(t), -1, tokens.shape[-1]), places), list(question.encode())


def hidden_states(
    model: Any, rows: torch.Tensor, places: torch.Tensor, end: int, question: list[int]
) -> torch.Tensor:
    """Return the last layer's states of the question after a video, (n, D).

    Args:
        model: of `build_model`.
        rows: (K, D) of the video.
        places: (K, 3), positions of the rows, in order.
        end: first position after the uncompressed video.
        question: bytes.
    """
    text = model.get_input_embeddings()(torch.tensor(question))
    behind = (end + torch.arange(len(question)))[:, None].expand(-1, 3)
    return model.model.language_model(
        inputs_embeds=torch.cat([rows, text])[None],
        position_ids=torch.cat([places, behind]).T[:, None],
    ).last_hidden_state[0, -len(question) :]


def distances(model: Any, video: Video, question: list[int], ratio: float) -> Iterator[float]:
    """Yield for each arrangement the distance of the question's states to those of all tokens."""
    end = int(video.places.max()) + 1
    flat = video.tokens.flatten(0, 1)
    whole = hidden_states(model, flat, video.places, end, question)
    compressed = compress(video.tokens, retention_ratio=ratio)
    members = {name: rule(video, compressed) for name, rule in RULES.items()}
    for place, order in ARRANGEMENTS.values():
        rows = members[order].sort(stable=True).indices
        places = video.places[members[place][rows]]
        states = hidden_states(model, compressed.tokens[rows], places, end, question)
        yield float(((states - whole).norm(dim=1) / whole.norm(dim=1)).mean())


def interval(differences: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of a mean over clips."""
    rng = np.random.default_rng(0)
    chosen = rng.integers(0, len(differences), (NUM_RESAMPLES, len(differences)))
    low, high = np.quantile(differences[chosen].mean(1), [0.025, 0.975])
    return float(low), float(high)


@torch.no_grad()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--models", type=int, default=3)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.25, 0.1])
    parser.add_argument("--json", type=Path, help="also write each distance to this file")
    args = parser.parse_args()
    from transformers import Qwen2VLVideoProcessor

    processor = Qwen2VLVideoProcessor()
    sums = np.zeros((len(args.ratios), args.clips, len(ARRANGEMENTS)))
    work = tqdm(total=args.models * args.clips, unit="clip", disable=None)
    for seed in range(args.models):
        model = build_model(seed)
        for clip in range(args.clips):
            video, question = encode(model, processor, clip)
            for number, ratio in enumerate(args.ratios):
                sums[number, clip] += list(distances(model, video, question, ratio))
            work.update()
    sums /= args.models
    work.close()
    rows = []
    print("ratio  rule                       distance   more than nearest (95 %)")
    for ratio, of_clips in zip(args.ratios, sums, strict=True):
        for index, rule in enumerate(ARRANGEMENTS):
            more = of_clips[:, index] - of_clips[:, 0]
            low, high = interval(more)
            mean = of_clips[:, index].mean()
            print(f"{ratio:<6} {rule:25} {mean:9.4f}   {more.mean():+.4f} ({low:+.4f} {high:+.4f})")
            rows.append({"ratio": ratio, "rule": rule, "distances": of_clips[:, index].tolist()})
    if args.json:
        settings = {"clips": args.clips, "models": args.models}
        write_json(args.json, {"environment": environment(), **settings, "runs": rows})


if __name__ == "__main__":
    main()
