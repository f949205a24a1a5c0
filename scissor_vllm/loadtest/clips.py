"""Videos of the load test: generated clips with motion, or files of the user.

Generated clips show shapes that cross a textured background, still or panned, with one cut.
Neighboring tokens are similar but not equal, as in footage. No two clips share a frame.
"""

from __future__ import annotations

import base64
import mimetypes
import os
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from scissor_vllm.cpus import num_cpus

VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".mov", ".avi")
CAMERAS = ("any", "fixed", "moving")
"""How the camera of a made clip moves: some pan and some do not, with one cut; none does, before a
background with a sensor's noise; or all pan and zoom, with two cuts."""

_FORMAT = 1
"""Version of the drawing; it separates older clips."""


class ClipError(Exception):
    """No clips are available; the message names the remedy."""


@dataclass(frozen=True)
class ClipShape:
    """Shape of generated clips: pixels, frames and frames per second."""

    width: int = 640
    height: int = 360
    num_frames: int = 64
    fps: int = 16
    seed: int = 0
    camera: str = "any"
    """One of CAMERAS."""

    @property
    def folder_name(self) -> str:
        """A name that is unique for the shape."""
        size = f"{self.width}x{self.height}-{self.num_frames}-frames-{self.fps}-fps"
        camera = "" if self.camera == "any" else f"-{self.camera}-camera"
        return f"{size}-seed-{self.seed}{camera}-v{_FORMAT}"

    def as_dict(self) -> dict[str, int | str]:
        """Return the values by name, the camera where it is not any."""
        values = asdict(self)
        if self.camera == "any":
            del values["camera"]
        return values


@dataclass(frozen=True)
class Clip:
    """A video file."""

    path: Path
    seconds: float | None
    """Duration, None if the file does not state it."""

    def data_url(self) -> str:
        """Return the file as a data URL."""
        return _data_url(self.path)


@cache
def _data_url(path: Path) -> str:
    media_type = mimetypes.guess_type(path.name)[0] or "video/mp4"
    return f"data:{media_type};base64,{base64.b64encode(path.read_bytes()).decode()}"


def default_folder() -> Path:
    """Return the folder of clips, under ``$XDG_CACHE_HOME/scissor_vllm`` (``~/.cache``)."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "scissor_vllm" / "bench-clips"


def load_clips(folder: Path) -> list[Clip]:
    """Return the videos of a folder, by name.

    Raises:
        ClipError: there is none.
    """
    paths = sorted(p for p in folder.glob("*") if p.suffix.lower() in VIDEO_SUFFIXES)
    if not paths:
        raise ClipError(
            f"--videos must name a folder with {', '.join(VIDEO_SUFFIXES)} files, got {folder}: "
            "check the path, or make clips with `scissor-vllm bench clips FOLDER`"
        )
    return [Clip(path, _seconds(path)) for path in paths]


def _seconds(path: Path) -> float | None:
    import cv2

    video = cv2.VideoCapture(str(path))
    try:
        num_frames = video.get(cv2.CAP_PROP_FRAME_COUNT)
        fps = video.get(cv2.CAP_PROP_FPS)
    finally:
        video.release()
    return num_frames / fps if num_frames > 0 and fps > 0 else None


def make_clips(folder: Path, num_clips: int, shape: ClipShape) -> list[Clip]:
    """Return the first `num_clips` clips of this shape and seed, and generate missing ones.

    They are mp4 files with H.264, under a folder of their shape.

    Raises:
        ClipError: the shape cannot be made, or PyAV, which makes clips, is not installed.
    """
    from tqdm import tqdm

    if shape.width % 2 or shape.height % 2 or min(shape.width, shape.height) < 64:
        raise ClipError(
            "--width and --height must be even and at least 64 (H.264 halves its colours), got "
            f"{shape.width} x {shape.height}"
        )
    folder = folder / shape.folder_name
    paths = [folder / f"clip-{number:04}.mp4" for number in range(num_clips)]
    missing = [(number, path) for number, path in enumerate(paths) if not path.exists()]
    if missing:
        try:
            import av  # noqa: F401
        except ImportError as error:
            raise ClipError(
                f"making clips needs PyAV ({len(missing)} of {num_clips} are missing in {folder}): "
                "pip install av, or copy clips made elsewhere by `scissor-vllm bench clips` and "
                "name their folder with --videos"
            ) from error
        folder.mkdir(parents=True, exist_ok=True)
        # Drawing holds the interpreter lock. A fork would copy threads' locks.
        pool = ProcessPoolExecutor(
            min(num_cpus(), len(missing)), get_context("spawn"), initializer=_leave_interrupts
        )
        try:
            with tqdm(total=len(missing), desc="making clips", unit="clip") as progress:
                made = [pool.submit(_make_clip, path, number, shape) for number, path in missing]
                for future in as_completed(made):
                    future.result()
                    progress.update()
        finally:
            pool.shutdown(cancel_futures=True)
    return [Clip(path, shape.num_frames / shape.fps) for path in paths]


def _leave_interrupts() -> None:
    """Leave Ctrl-C to the process that started this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _make_clip(path: Path, number: int, shape: ClipShape) -> None:
    import av
    import numpy as np

    rng = np.random.default_rng([shape.seed, number])
    scene_at = _SCENES[shape.camera](rng, shape)
    unfinished = path.with_name(f"{path.stem}.{os.getpid()}.part.mp4")
    with av.open(str(unfinished), "w") as container:
        options = {"crf": "26", "preset": "veryfast"}
        stream: Any = container.add_stream("libx264", rate=shape.fps, options=options)
        stream.width, stream.height, stream.pix_fmt = shape.width, shape.height, "yuv420p"
        for index in range(shape.num_frames):
            picture = scene_at(index).draw(index)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())
    unfinished.replace(path)


def _scenes_of_any(rng: Any, shape: ClipShape) -> Callable[[int], _Scene]:
    cut = int(shape.num_frames * rng.uniform(0.3, 0.7))
    scenes = [_Scene(rng, shape), _Scene(rng, shape)]
    return lambda index: scenes[index >= cut]


def _scenes_of_fixed(rng: Any, shape: ClipShape) -> Callable[[int], _Scene]:
    scene = _NoisyScene(rng, shape)
    return lambda _: scene


def _scenes_of_moving(rng: Any, shape: ClipShape) -> Callable[[int], _Scene]:
    first, second = (
        int(shape.num_frames * rng.uniform(*part)) for part in ((0.2, 0.45), (0.55, 0.8))
    )
    scenes = [_ZoomedScene(rng, shape) for _ in range(3)]
    return lambda index: scenes[(index >= first) + (index >= second)]


_SCENES = {"any": _scenes_of_any, "fixed": _scenes_of_fixed, "moving": _scenes_of_moving}


class _Scene:
    """A drifting background and the shapes that cross it."""

    _moves: bool | None = None
    """Whether the camera pans; None for some that do."""

    def __init__(self, rng: Any, shape: ClipShape) -> None:
        import numpy as np

        self._height, self._width = shape.height, shape.width
        self._margin = shape.height // 4
        margins = 2 * self._margin
        self._background = _texture(rng, shape.height + margins, shape.width + margins)
        # A still camera, or one that pans to and fro.
        self._pan = rng.uniform(-3, 3, 2) * (rng.uniform() < 0.6)
        if self._moves is not None:
            self._pan = rng.choice((-1, 1), 2) * rng.uniform(1, 3, 2) * self._moves
        count = int(rng.integers(2, 6))
        size = np.array([shape.height, shape.width])
        self._places = rng.uniform(0, 1, (count, 2)) * size
        self._speeds = rng.uniform(-0.02, 0.02, (count, 2)) * size
        self._radii = rng.uniform(0.04, 0.16, count) * shape.height
        self._colors = rng.integers(0, 256, (count, 3))
        self._round = rng.uniform(0, 1, count) < 0.5
        self._rows, self._columns = np.ogrid[: shape.height, : shape.width]

    def draw(self, index: int) -> Any:
        """Return the RGB picture (height, width, 3), uint8, of a frame."""
        return self._with_shapes(index, self._backdrop(index))

    def _backdrop(self, index: int) -> Any:
        """Return the background of a frame, to be written on."""
        import numpy as np

        panned = (self._margin + self._pan * index) % (4 * self._margin)
        top, left = np.minimum(panned, 4 * self._margin - panned).astype(int)
        return self._background[top : top + self._height, left : left + self._width].copy()

    def _with_shapes(self, index: int, picture: Any) -> Any:
        import numpy as np

        size = np.array([self._height, self._width])
        for place, speed, radius, color, is_round in zip(
            self._places, self._speeds, self._radii, self._colors, self._round, strict=True
        ):
            row, column = (place + speed * index) % size
            rows, columns = np.abs(self._rows - row), np.abs(self._columns - column)
            inside = rows**2 + columns**2 < radius**2 if is_round else np.maximum(rows, columns)
            picture[inside if is_round else inside < radius] = color
        return picture


class _NoisyScene(_Scene):
    """A still background, and a sensor's noise over all."""

    _moves = False

    def __init__(self, rng: Any, shape: ClipShape) -> None:
        super().__init__(rng, shape)
        self._noise = rng.normal(scale=4, size=(8, shape.height, shape.width, 1))
        self._shifts = rng.integers(0, shape.width, shape.num_frames)

    def draw(self, index: int) -> Any:
        import numpy as np

        # No two frames have the same noise, and few are drawn.
        noise = np.roll(self._noise[index % len(self._noise)], self._shifts[index], 1)
        return (super().draw(index) + noise).clip(0, 255).astype(np.uint8)


class _ZoomedScene(_Scene):
    """A background that the camera pans over and zooms into, or out of."""

    _moves = True

    def __init__(self, rng: Any, shape: ClipShape) -> None:
        super().__init__(rng, shape)
        self._zoom = float(rng.choice((-1, 1)) * rng.uniform(0.003, 0.01))
        self._num_frames = shape.num_frames

    def _backdrop(self, index: int) -> Any:
        import cv2

        picture = super()._backdrop(index)
        # From 1 on, so that the picture is large enough.
        farthest = -min(0.0, self._zoom) * self._num_frames
        scale = 1 / (1 + farthest + self._zoom * index)
        height, width = round(self._height * scale), round(self._width * scale)
        top, left = (self._height - height) // 2, (self._width - width) // 2
        crop = picture[top : top + height, left : left + width]
        return cv2.resize(crop, (self._width, self._height), interpolation=cv2.INTER_LINEAR)


def _texture(rng: Any, height: int, width: int) -> Any:
    """Return an RGB picture (height, width, 3), uint8: smooth areas with finer detail on them."""
    import cv2
    import numpy as np

    picture = np.empty((height, width, 3))
    picture[:] = rng.uniform(60, 195, 3)
    for step, strength in ((height // 4, 45), (height // 16, 14), (8, 6), (2, 3)):
        cells = rng.normal(size=(height // step + 2, width // step + 2, 1 if step <= 8 else 3))
        grown = cv2.resize(cells * strength, (width, height), interpolation=cv2.INTER_CUBIC)
        picture += grown.reshape(height, width, -1)
    return picture.clip(0, 255).astype(np.uint8)
