"""Makes the clip that the demo sends: ``python bench/demo_clip.py scissor_vllm/demo/clip.mp4``.

Four seconds of H.264, 640 x 360, 16 frames a second: a red ball crosses a meadow, then, after a
cut, a blue square falls in front of a brick wall. The background is textured and still, as in most
real footage, so that neighbouring tokens are alike but not equal.
"""

import argparse
from pathlib import Path

import av
import numpy as np

WIDTH, HEIGHT, FPS, SECONDS = 640, 360, 16, 4
CUT = FPS * SECONDS // 2


def main() -> None:
    """Write the clip."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("path", type=Path)
    path: Path = parser.parse_args().path
    temporary = path.with_suffix(".tmp.mp4")
    rng = np.random.default_rng(0)
    meadow, wall = _meadow(rng), _wall(rng)
    with av.open(str(temporary), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "30", "preset": "slow"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for index in range(FPS * SECONDS):
            picture = _ball(meadow, index) if index < CUT else _square(wall, index - CUT)
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    temporary.replace(path)
    print(f"{path}: {path.stat().st_size} bytes")


def _texture(rng: np.random.Generator, scale: int) -> np.ndarray:
    coarse = rng.normal(size=(HEIGHT // scale + 1, WIDTH // scale + 1))
    return np.kron(coarse, np.ones((scale, scale)))[:HEIGHT, :WIDTH, None]


def _meadow(rng: np.random.Generator) -> np.ndarray:
    picture = np.empty((HEIGHT, WIDTH, 3))
    picture[: HEIGHT // 2] = (140, 190, 240)
    picture[HEIGHT // 2 :] = (70, 150, 60)
    grass = _texture(rng, 4) * 12 + _texture(rng, 24) * 10
    picture[HEIGHT // 2 :] += grass[HEIGHT // 2 :]
    return picture.clip(0, 255).astype(np.uint8)


def _wall(rng: np.random.Generator) -> np.ndarray:
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    shifted = columns + (rows // 30 % 2) * 30
    mortar = (rows % 30 < 3) | (shifted % 60 < 3)
    picture = np.where(mortar[..., None], (200, 195, 185), (150, 75, 60)) + _texture(rng, 6) * 6
    return picture.clip(0, 255).astype(np.uint8)


def _ball(background: np.ndarray, index: int) -> np.ndarray:
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    center = 40 + index * 18, 200 - abs(np.sin(index / 4)) * 90
    picture = background.copy()
    picture[(columns - center[0]) ** 2 + (rows - center[1]) ** 2 < 34**2] = (220, 30, 30)
    return picture


def _square(background: np.ndarray, index: int) -> np.ndarray:
    picture = background.copy()
    top = min(10 + index * 9, HEIGHT - 90)
    picture[top : top + 80, 280:360] = (30, 60, 220)
    return picture


if __name__ == "__main__":
    main()
