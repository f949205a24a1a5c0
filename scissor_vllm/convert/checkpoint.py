"""Reads a checkpoint's weight files lazily, and writes those of a new one."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch

from scissor_vllm.convert.config import ConversionError, read_json, reading

OpenShard: TypeAlias = Mapping[str, Callable[[], torch.Tensor]]
"""Functions by tensor name that return a file's tensors, mapped lazily."""

_FORMATS = (
    ("model.safetensors.index.json", "model*.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model*.bin"),
)
"""Index and file pattern of each format, the preferred one first."""


def shards_of(folder: Path) -> list[Path]:
    """Return a checkpoint's weight files.

    Raises:
        ConversionError: there are none, or a file of the index is missing.
    """
    for index, pattern in _FORMATS:
        if (folder / index).is_file():
            listed = read_json(folder / index)
            with reading(folder / index):
                paths = sorted({folder / name for name in listed["weight_map"].values()})
            missing = [path.name for path in paths if not path.is_file()]
            if missing:
                raise ConversionError(
                    f"{folder / index} names files that are not there: {', '.join(missing)}: "
                    "download the checkpoint again"
                )
            return paths
        if paths := sorted(folder.glob(pattern)):
            return paths
    raise ConversionError(
        f"{folder} has no weights: neither {' nor '.join(pattern for _, pattern in _FORMATS)}"
    )


@contextmanager
def opened(path: Path) -> Iterator[OpenShard]:
    """Yield a file's tensors, memory-mapped for the duration of the context.

    Args:
        path: a .safetensors file, or a .bin file of a dict of tensors.

    Raises:
        ConversionError: the file is damaged.
    """
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with reading(path):
            opened_file = safe_open(path, framework="pt")
        with opened_file as file:
            yield {name: partial(file.get_tensor, name) for name in file.keys()}  # noqa: SIM118
    else:
        with reading(path):
            loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            tensors = {name: tensor.contiguous for name, tensor in loaded.items()}
        yield tensors


def checksum(tensor: torch.Tensor) -> str:
    """Return the SHA-256 of a contiguous tensor's bytes, in hexadecimal."""
    return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().data).hexdigest()


class ShardWriter:
    """Writes ``model-0000i-of-0000n.safetensors`` and their index into a folder."""

    def __init__(self, folder: Path, num_shards: int) -> None:
        self._folder = folder
        self._num_shards = num_shards
        self._num_bytes = 0
        self._weight_map: dict[str, str] = {}
        self._num_written = 0

    def write(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write the next file."""
        from safetensors.torch import save_file

        self._num_written += 1
        name = f"model-{self._num_written:05d}-of-{self._num_shards:05d}.safetensors"
        save_file(dict(tensors), self._folder / name, metadata={"format": "pt"})
        self._weight_map.update(dict.fromkeys(tensors, name))
        self._num_bytes += sum(tensor.nbytes for tensor in tensors.values())

    def finish(self) -> None:
        """Write the index."""
        index = {"metadata": {"total_size": self._num_bytes}, "weight_map": self._weight_map}
        path = self._folder / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
