"""Video loader of vLLM: bytes in, sampled RGB frames out.

PyAV decodes from memory. It bundles FFmpeg 8, returns pictures in separate buffers and can restrict
FFmpeg's demuxers. Colors and rotation are those of the ffmpeg command.
"""

from __future__ import annotations

import hashlib
import math
import os
from typing import Any, ClassVar

import av
import cv2
import numpy as np
import numpy.typing as npt
from vllm import envs
from vllm.multimodal.video import (
    VIDEO_LOADER_REGISTRY,
    DecodedFrames,
    Qwen2VLVideoBackend,
    Qwen3VLVideoBackend,
    VideoBackend,
)
from vllm.multimodal.video_decoders import (
    VideoSourceMetadata,
    VideoTargetMetadata,
    resolve_video_backend_kwargs,
)

from scissor_vllm.cpus import num_cpus
from scissor_vllm.frontend.frame_cache import FRAMES
from scissor_vllm.frontend.refusal import RefusedVideoError
from scissor_vllm.frontend.video.container import VideoFile, open_video
from scissor_vllm.frontend.video.decoder import max_threads, read_frames
from scissor_vllm.frontend.video.limits import (
    SLOTS,
    DecodingBudget,
    check_decode_bytes,
    check_pixels,
    max_decode_bytes,
    num_bytes_to_decode,
)
from scissor_vllm.frontend.video.picture import is_converted_as_named
from scissor_vllm.metrics import CLOCK
from scissor_vllm.settings import FORMER_VIDEO_LOADER, VIDEO_LOADER

BACKEND, FORMER_BACKEND = VIDEO_LOADER, FORMER_VIDEO_LOADER

_QUIET = "-8"  # AV_LOG_QUIET

BUDGET = DecodingBudget()


def register_video_loader() -> None:
    """Make "pyav" a video loader of vLLM; calling it again changes nothing.

    vLLM chooses its own loader for some video processors, even if the operator named another. If
    the operator named "pyav", these processors get their sampling with this decoder.

    Raises:
        ValueError: `SCISSOR_MAX_VIDEO_DECODE_BYTES` is no positive integer.
    """
    max_decode_bytes()
    # Damaged input makes FFmpeg print a line per packet to stderr. Errors reach the client anyway.
    # OpenCV reads its variable once, when it first opens a video.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", _QUIET)
    av.logging.set_level(None)
    for name in (BACKEND, FORMER_BACKEND):
        VIDEO_LOADER_REGISTRY.register(name)(PyAVVideoBackend)
    if envs.VLLM_VIDEO_LOADER_BACKEND in (BACKEND, FORMER_BACKEND):
        for loader, processor in _LOADERS_OF_PROCESSORS.items():
            register = VIDEO_LOADER_REGISTRY.register(loader.__name__, video_processor=processor)
            register(loader)


class PyAVVideoBackend(VideoBackend):
    """Loader "pyav": vLLM's uniform sampling, decoded by PyAV.

    The sampling of another vLLM loader comes with `class New(PyAVVideoBackend, ThatLoader)` and
    its own `default_fps`.
    """

    default_fps: ClassVar[float] = -1

    @classmethod
    def load_bytes(
        cls,
        data: bytes,
        num_frames: int = -1,
        fps: float | None = None,
        max_duration: float = 300,
        frame_recovery: bool = False,
        *,
        backend: str = BACKEND,
        **kwargs: Any,
    ) -> tuple[DecodedFrames, dict[str, Any]]:
        """Sampled frames, uint8 RGB (num_sampled, height, width, 3), and their metadata.

        The metadata's `frames_indices` name the frames: frame n is the n-th that
        `ffmpeg -fps_mode passthrough` shows. Its `video_backend` names what decoded them.
        Frames that are kept for another request (see `scissor_vllm.frontend.frame_cache`) are
        read-only.

        Args:
            data: the bytes of a video file.
            num_frames: frames to sample, evenly spaced; -1 for all.
            fps: frames to sample per second of video, where that gives fewer; -1 for all.
            max_duration: seconds; only samplings that ask for it heed it, as in vLLM.
            frame_recovery: show the next good frame for a broken one. PyAV's frames need none:
                broken ones have no number.
            backend: "pyav", or one of vLLM's own decoders ("opencv", "torchcodec", ...).
            kwargs: options of the sampling, or of a decoder of vLLM's own.

        Raises:
            RefusedVideoError: the bytes are no video, no frame can be decoded, a frame is larger
                than VLLM_MAX_IMAGE_PIXELS allows, all sampled frames together are larger than
                SCISSOR_MAX_VIDEO_DECODE_BYTES allows, or the sampling cannot sample this video.
            ValueError: an argument is no number, or no option of the decoder.
        """
        fps = cls.default_fps if fps is None else fps
        _check_number("num_frames", num_frames, int)
        _check_number("fps", fps, int, float)
        _check_number("max_duration", max_duration, int, float)
        if backend == FORMER_BACKEND:
            backend = BACKEND
        target = VideoTargetMetadata(num_frames, fps, max_duration)

        def decode() -> tuple[DecodedFrames, dict[str, Any]]:
            with SLOTS.taken(), CLOCK.stage("decode"), open_video(data) as file:
                check_pixels(file.width, file.height)
                if backend == BACKEND:
                    return cls._decode(file, target, kwargs)
                return cls._decode_by_vllm(file, data, target, frame_recovery, backend, kwargs)

        if not FRAMES.is_on:
            return decode()
        settings = (num_frames, fps, max_duration, frame_recovery, backend, sorted(kwargs.items()))
        loader = f"{cls.__module__}.{cls.__qualname__}"
        return FRAMES.get((hashlib.sha256(data).digest(), loader, repr(settings)), decode)

    @classmethod
    def _decode(
        cls, file: VideoFile, target: VideoTargetMetadata, kwargs: dict[str, Any]
    ) -> tuple[npt.NDArray[np.uint8], dict[str, Any]]:
        # PyAV has no options of its own, like OpenCV: only sampling options.
        sampling_kwargs, _ = resolve_video_backend_kwargs("opencv", kwargs)
        height, width, fps = file.height, file.width, file.fps

        def source_of(num_frames: int) -> VideoSourceMetadata:
            duration = num_frames / fps if fps > 0 else 0
            return cls._prepare_source(VideoSourceMetadata(num_frames, fps, duration))

        def sample(num_frames: int) -> list[int]:
            indices = _sampled(cls, source_of(num_frames), target, sampling_kwargs)
            check_decode_bytes(len(indices), height, width)
            return indices

        num_sampled = len(sample(max(1, file.packets.num_shown)))
        num_bytes = num_bytes_to_decode(
            num_sampled, height, width, max_threads(file), file.packets.num_bytes
        )
        with BUDGET.reserve(num_bytes):
            frames, indices, num_frames = read_frames(file, sample)
        return frames, cls.create_hf_metadata(source_of(num_frames), indices, BACKEND)

    @classmethod
    def _decode_by_vllm(
        cls,
        file: VideoFile,
        data: bytes,
        target: VideoTargetMetadata,
        frame_recovery: bool,
        backend: str,
        kwargs: dict[str, Any],
    ) -> tuple[DecodedFrames, dict[str, Any]]:
        """Decode by a decoder of vLLM that the operator named.

        OpenCV hands out memory that it has not written where FFmpeg refuses to convert a picture,
        an interlaced one or one of colors that it does not know: files that are so from their
        start are refused. One that becomes so later is not noticed.
        """
        if backend == "opencv":
            _check_for_opencv(file)
        try:
            return super().load_bytes(
                data,
                num_frames=target.num_frames,
                fps=target.fps,
                max_duration=target.max_duration,
                frame_recovery=frame_recovery,
                backend=backend,
                **kwargs,
            )
        except cv2.error as error:
            raise RefusedVideoError(
                f"a video for the backend 'opencv' must be one that OpenCV opens, got {len(data)} "
                f"bytes that it does not: leave out the backend"
            ) from error

    @classmethod
    def read_frames(
        cls,
        cap: cv2.VideoCapture,
        frame_idx: list[int],
        total_frames_num: int,
        *,
        frame_recovery: bool = False,
    ) -> tuple[npt.NDArray[np.uint8], list[int]]:
        """Frames that OpenCV can decode, RGB (num_valid, height, width, 3), and their indices.

        Raises:
            RefusedVideoError: no frame can be decoded, or all together would be too large.
        """
        height = int(cap.get(cv2.CAP_PROP_FRAME_HEIGHT))
        width = int(cap.get(cv2.CAP_PROP_FRAME_WIDTH))
        check_decode_bytes(len(frame_idx), height, width)
        with BUDGET.reserve(num_bytes_to_decode(len(frame_idx), height, width, num_cpus(), 0)):
            frames, valid = super().read_frames(
                cap, frame_idx, total_frames_num, frame_recovery=frame_recovery
            )
        if not valid:
            raise RefusedVideoError(
                f"at least one sampled frame of a video must be decodable, but none of the "
                f"{len(frame_idx)} sampled ones of {total_frames_num} is: the file is damaged or "
                f"its codec is not supported; send it whole, or encoded as H.264"
            )
        return frames, valid


class Qwen2VLPyAV(PyAVVideoBackend, Qwen2VLVideoBackend):
    """The sampling of Qwen2-VL and Qwen2.5-VL."""

    default_fps = 2

    @classmethod
    def compute_frames_index_to_sample(
        cls, source: VideoSourceMetadata, target: VideoTargetMetadata, **kwargs: Any
    ) -> list[int]:
        """Indices to sample; a video of fewer frames than a temporal patch is taken whole.

        vLLM rounds the number of frames down to whole temporal patches, and divides by 0.
        """
        if source.total_frames_num < kwargs.get("temporal_patch_size", 2):
            return list(range(source.total_frames_num))
        return super().compute_frames_index_to_sample(source, target, **kwargs)


class Qwen3VLPyAV(PyAVVideoBackend, Qwen3VLVideoBackend):
    """The sampling of Qwen3-VL."""

    default_fps = 2


_LOADERS_OF_PROCESSORS = {
    Qwen2VLPyAV: "Qwen2VLVideoProcessor",
    Qwen3VLPyAV: "Qwen3VLVideoProcessor",
}


def loader_for(video_processor: str) -> type[PyAVVideoBackend]:
    """Return the loader that samples as a server does for a video processor of this class name."""
    loaders = (loader for loader, name in _LOADERS_OF_PROCESSORS.items() if name == video_processor)
    return next(loaders, PyAVVideoBackend)


def _sampled(
    loader: type[PyAVVideoBackend],
    source: VideoSourceMetadata,
    target: VideoTargetMetadata,
    kwargs: dict[str, Any],
) -> list[int]:
    """Indices that a loader samples, at least one.

    Raises:
        RefusedVideoError: the options leave no frame, or the sampling fails on this video.
    """
    try:
        indices = loader.compute_frames_index_to_sample(source, target, **kwargs)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        problem = f"{error}"
    else:
        if len(indices) > 0:
            return indices
        problem = "no frame is left"
    options = {"num_frames": target.num_frames, "fps": target.fps, **kwargs}
    raise RefusedVideoError(
        f"a video's sampling must leave at least one frame of it, got {options} for "
        f"{source.total_frames_num} frames of {source.original_fps:g} per second: {problem}; "
        f"raise num_frames or max_frames, or send a longer video"
    )


def _check_for_opencv(file: VideoFile) -> None:
    """Raise RefusedVideoError if OpenCV would hand out memory that it has not written."""
    picture, is_interlaced = file.first_picture()
    if is_interlaced:
        raise RefusedVideoError(
            "a video for the backend 'opencv' must not be interlaced, got one that is: leave "
            "out the backend, or encode the video progressively"
        )
    if picture is None:
        return
    check_pixels(picture.width, picture.height)
    colors = f"matrix {int(picture.colorspace)} and transfer function {int(picture.color_trc)}"
    if not is_converted_as_named(picture, file.time_base):
        raise RefusedVideoError(
            "a video for the backend 'opencv' must name colors that FFmpeg converts, got "
            f"{colors}: leave out the backend, or encode the video as BT.709"
        )


def _check_number(name: str, value: object, *types: type) -> None:
    if not isinstance(value, types) or not math.isfinite(value):  # type: ignore[arg-type]
        kind = "an integer" if float not in types else "a finite number"
        raise ValueError(f"{name} must be {kind}, got {value!r}: leave it out for the default")
