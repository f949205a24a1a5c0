"""``scissor-vllm show``: draws a compressed video as PNG and as a page."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scissor_vllm.retention import num_retained_tokens, parse_retention_ratio

if TYPE_CHECKING:
    from scissor_vllm.show.picture import Picture

DEFAULT_NUM_FRAMES = 32
"""A server's default for LLaVA models."""
MAX_VIDEO_BYTES = 2 * 1024**3


def main(argv: list[str]) -> int:
    """Draw a video and return the exit status."""
    args = _parse(argv)
    if find_spec("PIL") is None:
        print(
            "scissor-vllm show: Pillow is not installed: pip install 'scissor-vllm[show]'",
            file=sys.stderr,
        )
        return 1
    from scissor_vllm.show.encoder import EncoderError

    try:
        check_output(args.output)
        picture = look(args.video, args.model, args.retention_ratio, args.method, args.num_frames)
        written = save(picture, args.output)
    except (EncoderError, ImportError, OSError, ValueError) as error:
        print(f"scissor-vllm show: {error}", file=sys.stderr)
        return 1
    from scissor_vllm.show.text import caption

    for grouping in picture.groupings:
        print("\n".join(caption(picture, grouping)[:2]))
    for path in written:
        print(f"written: {path}")
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    from scissor_vllm.compression import METHODS
    from scissor_vllm.settings import DEFAULT_VIDEO_COMPRESSION

    parser = argparse.ArgumentParser(prog="scissor-vllm show", description=__doc__)
    parser.add_argument("video", type=Path, help="a video file")
    parser.add_argument(
        "--retention-ratio", type=_ratio, nargs="+", default=[0.1], help="one or more (default 0.1)"
    )
    parser.add_argument(
        "--model",
        default="demo",
        help="whose tower makes the tokens: a folder, a name on the hub, or 'demo' (default)",
    )
    parser.add_argument(
        "--video-compression",
        dest="method",
        choices=sorted(METHODS),
        default=DEFAULT_VIDEO_COMPRESSION,
        help=f"the method (default {DEFAULT_VIDEO_COMPRESSION})",
    )
    parser.add_argument(
        "--num-frames",
        type=int,
        default=DEFAULT_NUM_FRAMES,
        help=f"frames to sample at most (default {DEFAULT_NUM_FRAMES}, as the server)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("show"),
        help="a folder, for a page and a PNG a ratio (default: show), or a file: .html for the "
        "page, .png for one ratio's picture",
    )
    args = parser.parse_args(argv)
    if not args.video.is_file():
        parser.error(f"VIDEO must be a file, got {args.video}: check the path")
    if _form(args.output) == ".png" and len(set(args.retention_ratio)) > 1:
        parser.error(
            f"a PNG shows one ratio, got {len(set(args.retention_ratio))} for {args.output}: give "
            "one, or name a folder or an .html file"
        )
    if args.num_frames < 1:
        parser.error(f"--num-frames must be at least 1, got {args.num_frames}")
    return args


def _ratio(text: str) -> float:
    try:
        return parse_retention_ratio(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def look(video: Path, model: str, ratios: Sequence[float], method: str, num_frames: int) -> Picture:
    """Return the picture of a video, its ratios ascending.

    Raises:
        EncoderError: the model cannot be loaded or is not supported.
        ValueError: the file is not a video, or is too long to be drawn.
        ImportError: vLLM, whose loaders decode videos, is not installed.
    """
    from scissor_vllm.compression import get_compressor
    from scissor_vllm.show.encoder import Encoder
    from scissor_vllm.show.picture import (
        Picture,
        all_kept,
        check_size,
        drawn_frames,
        grouping_of,
        times_of,
    )

    check_size(num_frames, num_tokens=0)
    compress = get_compressor(method)
    encoder = Encoder(_model_path(model))
    frames, metadata = _decode(video, num_frames, encoder.video_processor)
    encoded = encoder.encode(frames)
    num_positions, per_position, _ = encoded.tokens.shape
    num_tokens = num_positions * per_position
    check_size(num_positions, num_tokens)
    groupings = []
    for ratio in sorted(set(ratios)):
        num_retained = num_retained_tokens(num_tokens, ratio)
        if num_retained == num_tokens:
            groupings.append(all_kept(method, num_tokens))
        else:
            compressed = compress(encoded.tokens, num_retained)
            groupings.append(grouping_of(ratio, method, encoded.tokens, compressed))
    return Picture(
        name=video.name,
        frames=drawn_frames(frames, num_positions),
        rows=encoded.rows,
        columns=encoded.columns,
        groupings=tuple(groupings),
        times=times_of(metadata, num_positions),
    )


def _decode(video: Path, num_frames: int, video_processor: str) -> tuple[Any, dict[str, Any]]:
    """Return frames as a server samples them for a video processor, and their metadata."""
    size = video.stat().st_size
    if size > MAX_VIDEO_BYTES:
        raise ValueError(
            f"a video file may have {MAX_VIDEO_BYTES} bytes, got {size} of {video}: cut it"
        )
    try:
        from scissor_vllm.frontend.video.loader import loader_for
    except ImportError as error:
        raise ImportError(
            f"videos are decoded by vLLM's loaders, which cannot be imported ({error}): install "
            "'scissor-vllm[cpu]' or 'scissor-vllm[gpu]'"
        ) from error
    frames, metadata = loader_for(video_processor).load_bytes(
        video.read_bytes(), num_frames=num_frames
    )
    return frames, metadata


def _model_path(model: str) -> str:
    from scissor_vllm.demo.model import DEMO_MODEL, demo_model_path

    return str(demo_model_path()) if model == DEMO_MODEL else model


def check_output(output: Path) -> None:
    """Raise OSError if the output cannot be written. Nothing is created."""
    is_folder = _form(output) is None
    if output.exists() and output.is_dir() != is_folder:
        wanted, actual = ("folder", "file") if is_folder else ("file", "folder")
        raise OSError(f"--output must be a {wanted}, got the {actual} {output}: name another")
    folder = output if is_folder else output.parent
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise OSError(
            f"--output must be where files can be written, got {output}: {existing} is no folder "
            "that you may write to; name another"
        )


def _form(output: Path) -> str | None:
    """Return ".html" or ".png" if the output is one file, None if it is a folder."""
    suffix = output.suffix.lower()
    return suffix if suffix in (".html", ".png") else None


def save(picture: Picture, output: Path) -> list[Path]:
    """Write the files that the output's name implies, and return them.

    Raises:
        OSError: it cannot be written.
    """
    try:
        return _save(picture, output)
    except OSError as error:
        raise OSError(
            f"--output must be where files can be written, got {output}: {error}; name another"
        ) from error


def _save(picture: Picture, output: Path) -> list[Path]:
    from scissor_vllm.show.html import save_html
    from scissor_vllm.show.png import save_png

    form = _form(output)
    if form is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        if form == ".html":
            save_html(picture, output)
        else:
            save_png(picture, picture.groupings[0], output)
        return [output]
    output.mkdir(parents=True, exist_ok=True)
    page = output / "show.html"
    save_html(picture, page)
    written = [page]
    for grouping in picture.groupings:
        written.append(output / f"show-{grouping.retention_ratio:g}.png")
        save_png(picture, grouping, written[-1])
    return written
