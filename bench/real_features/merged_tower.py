"""Prints what merging inside the tower changes in DINOv2's tokens of real videos.

    python -m bench.real_features.merged_tower [FOLDER] [--split validation] [--num-merged 2]
        [--fp8] [--json FILE]

Anchors and computed patches are those of ``scissor_vllm``; the twelve blocks of DINOv2 ViT-S/14 run
in torch in place of the tower's layers. Each frame's class token is always computed. With
``--num-merged 2`` the four patches of a token are computed or left out together, as in Qwen-VL's
towers; there a token has two frames too, and layers of Qwen2.5-VL have windows. ``--fp8`` rounds
MLPs as ``scissor_vllm.worker.fp8_mlp`` does, also where nothing is merged. "share" is that of
the patches that are computed. FVU is the tokens' squared error over their variance. "added" is what
merging adds to the FVU after compression to a tenth.
"""

from __future__ import annotations

import argparse
import math
import site
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import cv2
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray

from bench.real_features import features
from scissor_vllm import patch_merging
from scissor_vllm.compression import CompressedTokens, get_compressor
from scissor_vllm.frontend import patch_anchors as frontend
from scissor_vllm.loadtest.record import environment, write_json
from scissor_vllm.patch_merging import computed_patches
from scissor_vllm.settings import DEFAULT_TOWER_MERGING_THRESHOLD, DEFAULT_VIDEO_COMPRESSION
from scissor_vllm.worker.fp8_mlp import quantized
from scissor_vllm.worker.merged_grid import Layout, MergedTokens, Parts
from scissor_vllm.worker.merged_patches import MergedPatches, Placement, placed

PATCH_SIZE = 14
NUM_LAYERS, NUM_HEADS, EPS = 12, 6, 1e-6
RATIO = 0.1
FIXED = ("street", "street-first", "face", "box", "box-last", "cup")
"""Sequences of a camera that stands still."""

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_EMBEDDINGS = "/backbone/embeddings/Add_output_0"
_FRAMES_AT_ONCE = 4

Block = dict[str, tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Arrangement:
    """Which patches of T frames are computed, and how values are placed."""

    computed: torch.Tensor
    """Indices of the M computed patches, token by token."""
    patches: Placement
    """Of all patches."""
    num_queries: list[int]
    """Of each frame, without its class token."""
    tokens: Placement | None
    """Of all tokens, None where the last block's patches are placed one by one."""

    @classmethod
    def of(cls, anchors: torch.Tensor, num_merged: int) -> Arrangement:
        """Return that of anchors, int64 (T, P), for so many patches in each direction."""
        device, dtype = torch.device("cpu"), torch.float32
        if num_merged == 1:
            merged = MergedPatches.of(anchors, device, dtype)
            return cls(merged.computed, merged, merged.query_ends.diff().tolist(), None)
        side, size = features.SIDE // PATCH_SIZE // num_merged, num_merged**2
        frames = Parts.of(torch.full((len(anchors),), side**2), size, device)
        # There are no rotations: DINOv2 adds positions to its embeddings.
        none = torch.empty(0)
        layout = Layout((side, side), size, None, frames, None, (none, none), None)
        tokens = MergedTokens.of(anchors, layout, device, dtype)
        num_queries = tokens.frame_query_ends.diff().tolist()
        return cls(tokens.patch_numbers, tokens.patches, num_queries, tokens.tokens)


class Tower:
    """DINOv2's embeddings by ONNX Runtime, and its blocks in torch."""

    def __init__(self, folder: Path, num_merged: int) -> None:
        """Load the weights that ``features.load_features`` has downloaded into a folder.

        Args:
            folder: of the downloads.
            num_merged: number of patches in each direction that are left out together, 1 or 2.
        """
        self._num_merged = num_merged
        packages = folder / "packages"
        # The benchmark's alone: they come last, so that no other is replaced.
        site.addsitedir(str(packages))
        import onnx
        import onnxruntime

        model = onnx.load(str(packages / features.MODEL))
        self.blocks = [_block(model, number) for number in range(NUM_LAYERS)]
        kind = onnx.TensorProto.FLOAT
        model.graph.value_info.append(onnx.helper.make_tensor_value_info(_EMBEDDINGS, kind, None))
        part = onnx.utils.Extractor(model).extract_model(["input_image"], [_EMBEDDINGS])
        for axis in (2, 3):
            part.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = features.SIDE
        self._session = onnxruntime.InferenceSession(
            part.SerializeToString(), providers=["CPUExecutionProvider"]
        )

    def embed(self, frames: NDArray[np.uint8]) -> torch.Tensor:
        """Return the input of the first block, (T, 1 + P, C), of frames (T, H, W, 3).

        Patches are in the order of a frame, or token by token.
        """
        mean, std = (np.array(values, np.float32) for values in (_MEAN, _STD))
        pixels = ((frames.astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2)
        parts = [
            self._session.run(None, {"input_image": pixels[first : first + _FRAMES_AT_ONCE]})[0]
            for first in range(0, len(pixels), _FRAMES_AT_ONCE)
        ]
        embedded = torch.from_numpy(np.concatenate(parts))
        merged = self._num_merged
        side = features.SIDE // PATCH_SIZE // merged
        patches = embedded[:, 1:].unflatten(1, (side, merged, side, merged))
        by_token = patches.transpose(2, 3).flatten(1, 4)
        return torch.cat([embedded[:, :1], by_token], dim=1)

    def encode(
        self, embedded: torch.Tensor, anchors: torch.Tensor, *, in_fp8: bool = False
    ) -> torch.Tensor:
        """Return patch tokens of the last block, mean-pooled 2 x 2.

        Args:
            embedded: (T, 1 + P, C).
            anchors: int64 (T, P), or (T, P / 4) of tokens.
            in_fp8: whether MLPs round their input and weights.

        Returns:
            (T, P / 4, C).
        """
        merged = Arrangement.of(anchors, self._num_merged)
        num_frames, _, width = embedded.shape
        # Patches that are computed, then each frame's class token.
        patches = embedded[:, 1:].reshape(-1, width)[merged.computed]
        hidden = torch.cat([patches, embedded[:, 0]])
        product = _rounded_product if in_fp8 else torch.addmm
        for block in self.blocks:
            normed = _norm(hidden, block["norm1"])
            queries, rest = torch.addmm(block["qkv"][1], normed, block["qkv"][0]).split(
                [width, 2 * width], dim=1
            )
            attended = _attend(queries, rest, merged)
            hidden = hidden + torch.addmm(block["out"][1], attended, block["out"][0])
            normed = _norm(hidden, block["norm2"])
            widened = F.gelu(product(block["fc1"][1], normed, block["fc1"][0]))
            hidden = hidden + product(block["fc2"][1], widened, block["fc2"][0])
        if merged.tokens is not None:
            rows = hidden[:-num_frames].unflatten(0, (-1, self._num_merged**2)).mean(dim=1)
            return placed(rows, merged.tokens).view(num_frames, -1, width)
        side = features.SIDE // PATCH_SIZE // 2
        tokens = placed(hidden[:-num_frames], merged.patches)
        grid = tokens.view(num_frames, side, 2, side, 2, width)
        return grid.mean(dim=(2, 4)).flatten(1, 2)


def _norm(hidden: torch.Tensor, weights: tuple[torch.Tensor, ...]) -> torch.Tensor:
    weight, bias = weights
    return F.layer_norm(hidden, (hidden.shape[1],), weight, bias, EPS)


def _rounded_product(bias: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return ``torch.addmm`` of rows (M, C) and weights (C, D) in FP8."""

    def rounded(values: torch.Tensor) -> torch.Tensor:
        parts, scales = quantized(values)
        return (parts.float() * scales)[:, : values.shape[1]]

    return torch.addmm(bias, rounded(rows), rounded(weight.T).T)


def _block(model: Any, number: int) -> Block:
    """Return a block's weights, layer scales taken into the matrices before them."""
    from onnx import numpy_helper

    values = {
        tensor.name: tensor
        for tensor in model.graph.initializer
        if f"layer.{number}." in tensor.name or tensor.name.startswith("onnx::MatMul")
    }

    def read(name: str) -> torch.Tensor:
        return torch.from_numpy(numpy_helper.to_array(values[name]).copy())

    prefix = f"backbone.encoder.layer.{number}."
    matrices = {
        node.name.split(f"layer.{number}/")[1].removesuffix("/MatMul"): read(node.input[1])
        for node in model.graph.node
        if node.op_type == "MatMul"
        and f"encoder/layer.{number}/" in node.name
        and node.input[1] in values
    }

    def linear(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return matrices[name], read(prefix + name.replace("/", ".") + ".bias")

    def scaled(name: str, scale: str) -> tuple[torch.Tensor, ...]:
        factor = read(f"{prefix}{scale}.lambda1")
        return tuple(part * factor for part in linear(name))

    def norm(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return read(f"{prefix}{name}.weight"), read(f"{prefix}{name}.bias")

    parts = [linear(f"attention/attention/{name}") for name in ("query", "key", "value")]
    return {
        "norm1": norm("norm1"),
        "qkv": tuple(torch.cat(part, dim=-1) for part in zip(*parts, strict=True)),
        "out": scaled("attention/output/dense", "layer_scale1"),
        "norm2": norm("norm2"),
        "fc1": linear("mlp/fc1"),
        "fc2": scaled("mlp/fc2", "layer_scale2"),
    }


def _attend(queries: torch.Tensor, rest: torch.Tensor, merged: Arrangement) -> torch.Tensor:
    num_frames, width = len(merged.num_queries), queries.shape[1]
    at_places = placed(rest[:-num_frames], merged.patches).chunk(num_frames)
    of_patches = queries[:-num_frames].split(merged.num_queries)
    patches, class_tokens = [], []
    for frame in range(num_frames):
        number = len(queries) - num_frames + frame
        asked = torch.cat([of_patches[frame], queries[number][None]])
        keys, values = torch.cat([at_places[frame], rest[number][None]]).split(width, dim=1)
        attended = F.scaled_dot_product_attention(
            *(part.unflatten(1, (NUM_HEADS, -1)).transpose(0, 1) for part in (asked, keys, values))
        )
        attended = attended.transpose(0, 1).flatten(1)
        patches.append(attended[:-1])
        class_tokens.append(attended[-1:])
    return torch.cat([*patches, *class_tokens])


def frames_of(folder: Path, sequence: features.Sequence) -> NDArray[np.uint8]:
    """Return the frames of a sequence, (T, SIDE, SIDE, 3)."""
    capture = cv2.VideoCapture(str(features._find(folder, sequence.video)))
    images = []
    while (read := capture.read())[0]:
        images.append(read[1])
    capture.release()
    begin, end = sequence.begin * len(images), sequence.end * len(images)
    numbers = np.linspace(begin, end - 1, features.NUM_FRAMES + 1).round().astype(int)[:-1]
    size = (features.SIDE, features.SIDE)
    return np.stack(
        [
            cv2.cvtColor(cv2.resize(images[n], size, interpolation=cv2.INTER_AREA), 4)
            for n in numbers
        ]
    )


def measure(exact: torch.Tensor, merged: torch.Tensor, method: str) -> dict[str, float]:
    """Return figures of merged tokens against the exact ones, both (T, P, D)."""
    exact_rows, merged_rows = exact.flatten(0, 1), merged.flatten(0, 1)
    variance = (exact_rows - exact_rows.mean(dim=0)).square().sum()
    cosine = torch.cosine_similarity(exact_rows, merged_rows, dim=1)
    compress = get_compressor(method)
    num_retained = -(-len(exact_rows) // round(1 / RATIO))

    def fvu(tokens: torch.Tensor) -> float:
        rows = _replaced(compress(tokens, num_retained), tokens.flatten(0, 1))
        return float((exact_rows - rows).square().sum() / variance)

    before = fvu(exact)
    return {
        "fvu": float((exact_rows - merged_rows).square().sum() / variance),
        "cosine_mean": float(cosine.mean()),
        "cosine_5_percent": float(cosine.quantile(0.05)),
        "fvu_compressed": before,
        "added": fvu(merged) - before,
    }


def _replaced(compressed: CompressedTokens, tokens: torch.Tensor) -> torch.Tensor:
    cosine = F.normalize(tokens, dim=1) @ F.normalize(compressed.tokens, dim=1).T
    row = torch.where(compressed.assignment >= 0, compressed.assignment, cosine.argmax(dim=1))
    return compressed.tokens[row]


@contextmanager
def _settings(group: int, matching: float) -> Iterator[None]:
    with (
        patch.object(patch_merging, "GROUP_FRAMES", group),
        patch.object(frontend, "MIN_MATCHING", matching),
    ):
        yield


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("build/real-features"))
    parser.add_argument("--split", choices=("validation", "test"))
    parser.add_argument("--sequences", nargs="+")
    parser.add_argument("--method", default=DEFAULT_VIDEO_COMPRESSION)
    parser.add_argument(
        "--threshold", type=float, nargs="+", default=[DEFAULT_TOWER_MERGING_THRESHOLD]
    )
    parser.add_argument("--group", type=int, nargs="+", default=[patch_merging.GROUP_FRAMES])
    parser.add_argument("--min-matching", type=float, nargs="+", default=[frontend.MIN_MATCHING])
    parser.add_argument("--num-merged", type=int, choices=(1, 2), default=1)
    parser.add_argument("--fp8", action="store_true", help="MLPs in FP8")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    features.load_features(args.folder)
    tower = Tower(args.folder, args.num_merged)
    settings = {"method": args.method, "num_merged": args.num_merged, "fp8": args.fp8}
    record: dict[str, Any] = {"environment": environment(), **settings, "cases": []}
    for sequence in features.SEQUENCES:
        if args.split not in (None, sequence.split):
            continue
        if args.sequences and sequence.name not in args.sequences:
            continue
        with torch.inference_mode():
            record["cases"] += list(_cases(tower, sequence, args))
    if args.json:
        write_json(args.json, record)


def _cases(tower: Tower, sequence: features.Sequence, args: Any) -> Iterator[dict[str, Any]]:
    frames = frames_of(args.folder, sequence)
    embedded = tower.embed(frames)
    num_places = (embedded.shape[1] - 1) // args.num_merged**2
    unmerged = torch.arange(len(frames))[:, None].expand(-1, num_places)
    exact = tower.encode(embedded, unmerged)
    known: dict[bytes, dict[str, float]] = {}
    for threshold in args.threshold:
        for group in args.group:
            for matching in args.min_matching:
                with _settings(group, matching):
                    anchors = frontend.patch_anchors(
                        torch.from_numpy(frames), PATCH_SIZE, threshold, num_merged=args.num_merged
                    )
                anchors = unmerged if anchors is None else anchors.long()
                key = anchors.numpy().tobytes()
                if key not in known:
                    changes = args.fp8 or not torch.equal(anchors, unmerged)
                    merged = exact
                    if changes:
                        merged = tower.encode(embedded, anchors, in_fp8=args.fp8)
                    known[key] = measure(exact, merged, args.method)
                side = math.isqrt(num_places)
                share = float(computed_patches(anchors, (side, side)).float().mean())
                case = {
                    "sequence": sequence.name,
                    "split": sequence.split,
                    "camera": "fixed" if sequence.name in FIXED else "moving",
                    "threshold": threshold,
                    "group_frames": group,
                    "min_matching": matching,
                    "share": share,
                    **known[key],
                }
                print(
                    f"{sequence.name:15} {case['camera']:6} threshold {threshold:g} group {group} "
                    f"matching {matching:g} share {share:.2f} FVU {case['fvu']:.3f} cosine "
                    f"{case['cosine_mean']:.4f} 5 % {case['cosine_5_percent']:.3f} compressed "
                    f"{case['fvu_compressed']:.3f} added {case['added']:+.3f}",
                    flush=True,
                )
                yield case


if __name__ == "__main__":
    main()
