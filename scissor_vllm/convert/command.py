"""``scissor-vllm convert SOURCE OUT``: converts an original checkpoint for vLLM."""

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scissor_vllm.convert.config import (
    ConversionError,
    check_served,
    converted_config,
    newlines_of,
    read_json,
    reading,
    text_config,
    tower_config,
)

REPORT = "conversion.json"
"""Report beside the weights: origins, checksums and omitted weights."""

DEFAULT_SHARD_GB = 4.0


@dataclass(frozen=True)
class _Weight:
    """A weight in a file of the checkpoint or of the vision tower's repository."""

    path: Path
    stored_name: str
    name: str
    """Name in the original checkpoint."""
    shape: tuple[int, ...]
    num_bytes: int


def main(argv: list[str]) -> int:
    """Convert a checkpoint and return the exit status."""
    args = _parser().parse_args(argv)
    try:
        report = convert(
            args.source,
            args.out,
            vision_tower=args.vision_tower,
            video_newline=args.video_newline,
            max_shard_bytes=int(args.max_shard_gb * 2**30),
        )
    except ConversionError as error:
        print(f"scissor-vllm convert: {error}", file=sys.stderr)
        return 1
    print(
        f"{args.out}: {len(report['weights'])} weights, {report['num_bytes'] / 1e9:.2f} GB, "
        f"SHA-256 {report['sha256'][:16]}; {len(report['left_out'])} left out, see {REPORT}"
    )
    if not report["video_newline"]:
        stock = "adds one" if "image_newline" in report["weights"] else "does not load it"
        print(f"Its videos end without a newline: serve it with scissor-vllm, stock vLLM {stock}.")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scissor-vllm convert",
        description="Write an original-format LLaVA-OneVision checkpoint (LlavaQwenForCausalLM), "
        "such as LLaVA-Scissor's, in the form that vLLM loads.",
    )
    parser.add_argument("source", type=Path, help="folder of the original checkpoint")
    parser.add_argument("out", type=Path, help="folder to make; it must not exist")
    parser.add_argument(
        "--vision-tower",
        type=Path,
        help="folder of the SigLIP repository that mm_vision_tower names: gives the tower's "
        "weights where the checkpoint has none, and its shapes where the name is not known",
    )
    parser.add_argument(
        "--no-video-newline",
        dest="video_newline",
        action="store_false",
        help="serve videos without the newline vector that the checkpoint has",
    )
    parser.add_argument(
        "--max-shard-gb",
        type=float,
        default=DEFAULT_SHARD_GB,
        help="most GiB of a file that is written (default %(default)g)",
    )
    return parser


def convert(
    source: Path,
    out: Path,
    *,
    vision_tower: Path | None = None,
    video_newline: bool = True,
    max_shard_bytes: int = int(DEFAULT_SHARD_GB * 2**30),
) -> dict[str, Any]:
    """Return the report of a conversion, which is also left in ``OUT/conversion.json``.

    Weights keep their values and their dtype. One file of SOURCE is mapped into memory at a time.
    OUT is created atomically.

    Args:
        source: folder with config.json, tokenizer and weights (safetensors or .bin).
        out: folder to make.
        vision_tower: folder of a SigLIP repository, see ``--vision-tower``.
        video_newline: False leaves out the newline after a video.
        max_shard_bytes: of a file that is written.

    Raises:
        ConversionError: the checkpoint is damaged or not of the model that vLLM serves.
    """
    from scissor_vllm.convert.names import IMAGE_NEWLINE, plan
    from scissor_vllm.convert.processing import media_token_ids, media_tokenizer, save_processor

    if out.exists():
        raise ConversionError(f"{out} exists: name a folder that does not, or remove it")
    original = read_json(source / "config.json")
    with reading(source / "config.json", "correct the setting"):
        check_served(original)
        tower = tower_config(original, vision_tower)
        vocab_size = text_config(original).vocab_size
    weights = _weights(source, vision_tower, str(original.get("mm_vision_tower")))
    tokenizer = media_tokenizer(source)
    token_ids = media_token_ids(tokenizer, vocab_size)
    with reading(source / "config.json", "correct the setting"):
        newlines = newlines_of(
            original if video_newline else {**original, "mm_newline_position": "no_token"},
            has_weight=IMAGE_NEWLINE in weights,
        )
        config = converted_config(original, tower, newlines, token_ids)
    renaming = plan({name: weight.shape for name, weight in weights.items()}, config)

    _check_tied(weights, renaming.left_out)
    with _appearing(out) as folder:
        checksums = _write_weights(folder, weights, renaming.names, max_shard_bytes)
        report = {
            "source_config": original,
            "video_newline": newlines.ends_video,
            "num_bytes": sum(weights[name].num_bytes for name in renaming.names),
            "sha256": _combined(checksums),
            "weights": {
                new: {"from": old, "sha256": checksums[new]} for old, new in renaming.names.items()
            },
            "left_out": renaming.left_out,
        }
        (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n")
        config.save_pretrained(folder)
        save_processor(tokenizer, config, folder)
        if (source / "generation_config.json").is_file():
            shutil.copy(source / "generation_config.json", folder)
    return report


def _weights(source: Path, vision_tower: Path | None, tower_name: str) -> dict[str, _Weight]:
    """Return all weights by original name. A missing tower comes from its own repository."""
    from scissor_vllm.convert.names import TOWER, original_name

    weights = {weight.name: weight for weight in _stored(source)}
    if any(name.startswith(TOWER) for name in weights):
        return weights
    if vision_tower is None:
        raise ConversionError(
            f"the checkpoint has no weights of its vision tower, which was frozen: download "
            f"{tower_name} and name its folder with --vision-tower"
        )
    for weight in _stored(vision_tower):
        name = original_name(weight.stored_name)
        if name is not None:
            weights[name] = _Weight(
                weight.path, weight.stored_name, name, weight.shape, weight.num_bytes
            )
    return weights


def _stored(folder: Path) -> Iterator[_Weight]:
    """Yield the weights in a folder's files."""
    from scissor_vllm.convert.checkpoint import opened, shards_of

    for path in shards_of(folder):
        with opened(path) as shard:
            for name, get in shard.items():
                tensor = get()
                yield _Weight(path, name, name, tuple(tensor.shape), tensor.nbytes)


def _check_tied(weights: Mapping[str, _Weight], left_out: Mapping[str, str]) -> None:
    """Raise ConversionError if an omitted output embedding differs from the input embedding."""
    from scissor_vllm.convert.checkpoint import checksum, opened
    from scissor_vllm.convert.names import INPUT_EMBEDDING, OUTPUT_EMBEDDING

    if OUTPUT_EMBEDDING not in left_out:
        return
    checksums = set()
    for name in (INPUT_EMBEDDING, OUTPUT_EMBEDDING):
        with opened(weights[name].path) as shard:
            checksums.add(checksum(shard[name]()))
    if len(checksums) > 1:
        raise ConversionError(
            f"config.json says tie_word_embeddings, but {OUTPUT_EMBEDDING} differs from "
            f"{INPUT_EMBEDDING}: set tie_word_embeddings to false there"
        )


def _write_weights(
    folder: Path,
    weights: Mapping[str, _Weight],
    names: Mapping[str, str],
    max_shard_bytes: int,
) -> dict[str, str]:
    """Write the weights and return their checksums by new name."""
    from tqdm import tqdm

    from scissor_vllm.convert.checkpoint import ShardWriter, checksum, opened

    groups = list(_groups([weights[name] for name in names], max_shard_bytes))
    writer = ShardWriter(folder, len(groups))
    checksums = {}
    num_bytes = sum(weights[name].num_bytes for name in names)
    with tqdm(total=num_bytes, unit="B", unit_scale=True, desc="convert") as progress:
        for group in groups:
            with opened(group[0].path) as shard:
                tensors = {names[weight.name]: shard[weight.stored_name]() for weight in group}
                for name, tensor in tensors.items():
                    checksums[name] = checksum(tensor)
                writer.write(tensors)
                del tensors
            progress.update(sum(weight.num_bytes for weight in group))
    writer.finish()
    return checksums


def _groups(weights: Iterable[_Weight], max_bytes: int) -> Iterator[list[_Weight]]:
    """Yield groups of weights of one file that fit into ``max_bytes``, or a larger single
    weight.
    """
    group: list[_Weight] = []
    for weight in weights:
        total = sum(grouped.num_bytes for grouped in group) + weight.num_bytes
        if group and (group[0].path != weight.path or total > max_bytes):
            yield group
            group = []
        group.append(weight)
    if group:
        yield group


def _combined(checksums: Mapping[str, str]) -> str:
    """Return one SHA-256 over names and checksums, independent of the files."""
    lines = "".join(f"{name} {checksums[name]}\n" for name in sorted(checksums))
    return hashlib.sha256(lines.encode()).hexdigest()


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to ``out`` at the end, or removed on failure."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o777 & ~mask)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
