"""Prints how similar the tokens of videos are, and the components of SCC at a budget.

    python -m bench.component_report --tokens FILE... --json FILE
    python -m bench.component_report --model FOLDER --videos FOLDER [--save-tokens FILE] --json FILE

Tokens come from ``.pt`` or ``.npz`` files, (T, P, D) for each video. Or transformers computes them
from mp4 files with a LLaVA-OneVision checkpoint. The report explains where SCC falls behind:

- cosines: with single linkage, a few high cosines between different objects join all of them in one
  chain. If neighbours, random pairs and frames have the same cosines, no threshold separates
  objects.
- components: a chain shows as one component with most tokens, while single tokens take the rest of
  the budget. `linked` is the share of pairs inside the largest component that are themselves above
  the threshold: 1 in a clique, near 0 in a chain.
- frames: the number of different rows among a frame's tokens.
- coverage: the cosine of each token with its nearest row, by method.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from scissor_vllm import num_retained_tokens
from scissor_vllm.compression import METHODS, get_compressor
from scissor_vllm.compression.components import count_components, threshold_labels
from scissor_vllm.compression.similarity import Similarity, most_similar, unit_rows
from scissor_vllm.frontend.video.loader import PyAVVideoBackend
from scissor_vllm.loadtest.record import environment, write_json

RATIOS = (0.5, 0.35, 0.25, 0.1, 0.07, 0.05)
QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
SEED = 0
NUM_PAIRS = 1 << 16
"""Number of random pairs of a video."""
NUM_MEMBERS = 2048
"""Most members of a component whose pairs are compared."""


# --- tokens ---------------------------------------------------------------------------------------


def load_tokens(paths: list[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name and tokens (T, P, D) of each video in ``.pt`` and ``.npz`` files.

    A ``.pt`` file holds a tensor, or a list or dict of tensors; an ``.npz`` file arrays.
    """
    for path in paths:
        if path.suffix == ".npz":
            with np.load(path) as arrays:
                held: Any = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        else:
            held = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(held, torch.Tensor):
            held = {"": held}
        named = held.items() if isinstance(held, dict) else enumerate(held)
        for name, tokens in named:
            yield f"{path.stem} {name}".strip(), tokens


def encode_videos(
    model_folder: Path, videos: list[Path], num_frames: int, device: str
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name and tokens (T, P, D) float32 of each video, as input of the language model."""
    from transformers import LlavaOnevisionForConditionalGeneration, LlavaOnevisionVideoProcessor

    processor = LlavaOnevisionVideoProcessor.from_pretrained(model_folder)
    model = LlavaOnevisionForConditionalGeneration.from_pretrained(model_folder)
    model = model.to(device).eval()
    for path in videos:
        frames, _ = PyAVVideoBackend.load_bytes(path.read_bytes(), num_frames=num_frames)
        count = len(frames)
        prepared = processor(videos=[frames], do_sample_frames=False, return_tensors="pt")
        with torch.inference_mode():
            encoded = model.get_video_features(
                prepared["pixel_values_videos"].to(device),
                vision_feature_layer=model.config.vision_feature_layer,
                vision_feature_select_strategy=model.config.vision_feature_select_strategy,
            )
        # The newline that ends a video is not compressed.
        tokens = encoded.pooler_output[0, :-1]
        yield path.name, tokens.float().reshape(count, -1, tokens.shape[-1])


# --- cosines --------------------------------------------------------------------------------------


def cosine_quantiles(tokens: torch.Tensor) -> dict[str, list[float]]:
    """Return the quantiles ``QUANTILES`` of the cosines of several kinds of pairs."""
    num_frames, per_frame, width = tokens.shape
    unit = unit_rows(tokens)
    side = math.isqrt(per_frame)
    grid = unit.view(num_frames, *((side, side) if side**2 == per_frame else (1, -1)), width)
    draw = torch.Generator().manual_seed(SEED)

    def numbers(below: int) -> torch.Tensor:
        return torch.randint(below, (NUM_PAIRS,), generator=draw).to(unit.device)

    frame, other_frame = numbers(num_frames), numbers(num_frames)
    left, right = numbers(per_frame), numbers(per_frame)
    inside, across = left != right, frame != other_frame
    cosines = {
        "neighbours in a frame": torch.cat(
            [
                (grid[:, 1:] * grid[:, :-1]).sum(-1).flatten(),
                (grid[:, :, 1:] * grid[:, :, :-1]).sum(-1).flatten(),
            ]
        ),
        "any two in a frame": (unit[frame, left] * unit[frame, right]).sum(-1)[inside],
        "most alike in a frame": torch.cat(
            [block.cosines.amax(dim=2).flatten() for block in Similarity(tokens).blocks()]
        ),
        "same place, next frame": (unit[1:] * unit[:-1]).sum(-1).flatten(),
        "most alike in next frame": torch.cat(
            [unit.new_empty(0), *((a @ b.T).amax(dim=1) for a, b in itertools.pairwise(unit))]
        ),
        "any two of two frames": (unit[frame, left] * unit[other_frame, right]).sum(-1)[across],
    }
    return {kind: quantiles(values) for kind, values in cosines.items() if len(values)}


def quantiles(values: torch.Tensor) -> list[float]:
    """Return the values' ``QUANTILES``."""
    return [float(q) for q in np.quantile(values.double().cpu().numpy(), QUANTILES)]


# --- components -----------------------------------------------------------------------------------


def component_statistics(tokens: torch.Tensor, num_retained: int) -> dict[str, Any]:
    """Return statistics of one video's components at SCC's budget.

    Sizes are numbers of tokens of the K components before the merge. ``merged_*`` are sizes after
    it, when tokens have moved to the nearest component.
    """
    num_frames, per_frame, _ = tokens.shape
    out = get_compressor("scc-no-merge")(tokens, num_retained)
    merged = get_compressor("scc")(tokens, num_retained)
    threshold = out.similarity_threshold
    assert threshold is not None
    labels = threshold_labels(Similarity(tokens), threshold).view(num_frames, per_frame)
    in_frame = [torch.unique(frame, return_counts=True)[1] for frame in labels]
    of_frame = out.assignment.view(num_frames, per_frame)
    told_apart = [len(torch.unique(frame)) for frame in of_frame]
    begun = torch.full((num_retained,), len(out.assignment), device=tokens.device)
    number = torch.arange(len(out.assignment), device=tokens.device)
    begun = begun.scatter_reduce(0, out.assignment, number, "amin") // per_frame
    return {
        "num_retained": num_retained,
        "threshold": threshold,
        "num_spatial": count_components(labels.flatten()),
        "frames_of_one_component": sum(len(sizes) == 1 for sizes in in_frame),
        "largest_share_of_a_frame": [float(sizes.max()) / per_frame for sizes in in_frame],
        **size_statistics(out.assignment, num_retained),
        **{
            f"merged_{name}": value
            for name, value in size_statistics(merged.assignment, num_retained).items()
        },
        **cohesion(tokens, out.assignment, threshold),
        "rows_of_a_frame": told_apart,
        "rows_begun_in_a_frame": torch.bincount(begun, minlength=num_frames).tolist(),
    }


def size_statistics(assignment: torch.Tensor, num_rows: int) -> dict[str, float]:
    """Return statistics of the components' sizes.

    ``largest_share`` is the largest component's share of all tokens. ``singleton_share`` is the
    share of rows with one token. ``effective_share`` is the number of equally large components with
    the same entropy, as a share of K.
    """
    sizes = torch.bincount(assignment, minlength=num_rows).double()
    share = sizes[sizes > 0] / sizes.sum()
    entropy = float(-(share * share.log2()).sum())
    return {
        "largest_share": float(share.max()),
        "singleton_share": float((sizes == 1).double().mean()),
        "entropy_bits": entropy,
        "effective_share": 2**entropy / num_rows,
    }


def cohesion(tokens: torch.Tensor, assignment: torch.Tensor, threshold: float) -> dict[str, float]:
    """Return how similar the tokens of the largest component are."""
    flat = tokens.reshape(-1, tokens.shape[-1])
    largest = int(torch.bincount(assignment).argmax())
    members = (assignment == largest).nonzero().flatten()
    frames = len(torch.unique(members // tokens.shape[1]))
    draw = torch.Generator().manual_seed(SEED)
    chosen = torch.randperm(len(members), generator=draw)[:NUM_MEMBERS].to(members.device)
    unit = unit_rows(flat[members[chosen]])
    linked = mean = least = 1.0
    if len(unit) > 1:
        row, column = torch.triu_indices(len(unit), len(unit), 1)
        cosines = (unit @ unit.T)[row, column]
        linked, mean = float((cosines > threshold).double().mean()), float(cosines.mean())
        least = float(cosines.min())
    return {
        "largest_linked": linked,
        "largest_mean_cosine": mean,
        "largest_least_cosine": least,
        "largest_num_frames": frames,
    }


def coverage(tokens: torch.Tensor, method: str, num_retained: int) -> list[float]:
    """Return the ``QUANTILES`` of the cosine of each token with its nearest row."""
    rows = get_compressor(method)(tokens, num_retained).tokens
    flat = tokens.reshape(-1, tokens.shape[-1])
    nearest = most_similar(flat, rows)
    return quantiles((unit_rows(flat) * unit_rows(rows)[nearest]).sum(-1))


def describe(tokens: torch.Tensor, ratios: list[float], methods: list[str]) -> dict[str, Any]:
    """Return the report of one video's tokens (T, P, D)."""
    num_tokens = tokens.shape[0] * tokens.shape[1]
    by_ratio = []
    for ratio in ratios:
        num_retained = num_retained_tokens(num_tokens, ratio)
        by_ratio.append(
            {
                "retention_ratio": ratio,
                **component_statistics(tokens, num_retained),
                "coverage": {name: coverage(tokens, name, num_retained) for name in methods},
            }
        )
    return {"shape": list(tokens.shape), "cosines": cosine_quantiles(tokens), "ratios": by_ratio}


# --- report ---------------------------------------------------------------------------------------


def print_report(videos: list[dict[str, Any]], ratios: list[float], methods: list[str]) -> None:
    """Print medians over videos."""
    shapes = sorted({tuple(video["shape"]) for video in videos})
    print(f"\n{len(videos)} videos, (frames, tokens, width) {shapes}; medians over videos\n")
    print(f"{'cosine, quantile':26}" + "".join(f"{q:>8g}" for q in QUANTILES))
    for kind in videos[0]["cosines"]:
        values = [video["cosines"][kind] for video in videos if kind in video["cosines"]]
        row = [statistics.median(column) for column in zip(*values, strict=True)]
        print(f"{kind:26}" + "".join(f"{value:8.3f}" for value in row))
    columns = {
        "threshold": ("threshold", "{:.4f}"),
        "spatial": ("num_spatial", "{:.0f}"),
        "kept": ("num_retained", "{:.0f}"),
        "largest": ("largest_share", "{:.1%}"),
        "single rows": ("singleton_share", "{:.1%}"),
        "effective": ("effective_share", "{:.1%}"),
        "linked": ("largest_linked", "{:.1%}"),
        "mean cos": ("largest_mean_cosine", "{:.3f}"),
        "merged: largest": ("merged_largest_share", "{:.1%}"),
        "merged: effective": ("merged_effective_share", "{:.1%}"),
    }
    frames = {"rows of a frame": "rows_of_a_frame", "begun in a frame": "rows_begun_in_a_frame"}
    headings = [f"{name:>12}" for name in (*columns, *frames)]
    print("\nratio " + " ".join(headings))
    for index, ratio in enumerate(ratios):
        reports = [video["ratios"][index] for video in videos]
        cells = [
            form.format(statistics.median(report[key] for report in reports))
            for key, form in columns.values()
        ]
        for key in frames.values():
            counts = [count for report in reports for count in report[key]]
            cells.append(f"{min(counts)}/{statistics.median(counts):.0f}/{max(counts)}")
        aligned = [f"{cell:>{len(head)}}" for cell, head in zip(cells, headings, strict=True)]
        print(f"{ratio:<5g} " + " ".join(aligned))
    print("\ncosine of a token with the row nearest to it, at quantiles 0.01 / 0.05 / 0.5")
    print("ratio " + " ".join(f"{name:>22}" for name in methods))
    places = [QUANTILES.index(q) for q in (0.01, 0.05, 0.5)]
    for index, ratio in enumerate(ratios):
        cells = []
        for name in methods:
            values = [video["ratios"][index]["coverage"][name] for video in videos]
            cells.append(
                " / ".join(f"{statistics.median(v[place] for v in values):.3f}" for place in places)
            )
        print(f"{ratio:<5g} " + " ".join(f"{cell:>22}" for cell in cells))


def main(argv: list[str] | None = None) -> None:
    """Read or encode, describe, print and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--tokens", type=Path, nargs="+", help=".pt or .npz files of (T, P, D)")
    source.add_argument("--model", type=Path, help="folder of a LLaVA-OneVision checkpoint")
    parser.add_argument("--videos", type=Path, help="folder of mp4 files for --model")
    parser.add_argument("--num-frames", type=int, default=32, help="most frames of a video")
    parser.add_argument("--limit", type=int, help="videos that are looked at, the first by name")
    parser.add_argument("--ratios", type=float, nargs="+", default=list(RATIOS))
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=[
            "average-linkage",
            "scc-windows",
            "scc",
            "scc-spatial",
            "scc-temporal",
            "uniform+merge",
            "uniform",
        ],
        help="whose coverage is compared",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--save-tokens", type=Path, help="also write all tokens to this .pt file")
    parser.add_argument("--json", type=Path, help="also write each video's values to this file")
    args = parser.parse_args(argv)
    if args.model is not None:
        if args.videos is None or not (paths := sorted(args.videos.glob("*.mp4"))):
            parser.error("--model needs --videos, a folder with mp4 files")
        paths = paths[: args.limit]
        source_name, total = str(args.model), len(paths)
        tokens_of = encode_videos(args.model, paths, args.num_frames, args.device)
    else:
        source_name, total = " ".join(map(str, args.tokens)), args.limit
        tokens_of = load_tokens(args.tokens)
    described: list[dict[str, Any]] = []
    kept: dict[str, torch.Tensor] = {}
    for name, tokens in tqdm(tokens_of, total=total, unit="video", file=sys.stderr):
        if args.limit is not None and len(described) == args.limit:
            break
        on_device = tokens.to(args.device).float()
        described.append({"video": name, **describe(on_device, args.ratios, args.methods)})
        if args.save_tokens:
            kept[name] = tokens.cpu()
    print_report(described, args.ratios, args.methods)
    if args.save_tokens:
        unfinished = args.save_tokens.with_name(args.save_tokens.name + ".part")
        torch.save(kept, unfinished)
        unfinished.replace(args.save_tokens)
    if args.json:
        settings = {"source": source_name, "quantiles": QUANTILES, "methods": args.methods}
        write_json(args.json, {"environment": environment(), **settings, "videos": described})


if __name__ == "__main__":
    main()
