"""Video loader of vLLM that decodes with decord: bytes in, sampled RGB frames out.

decord is the distribution decord2: it bundles FFmpeg 8, decodes AV1 and has wheels for Linux
(x86-64, Arm) and macOS, where decord 0.6.0 bundles FFmpeg 4, fails on AV1 and has no wheel for
Arm. Both are equally fast, release the GIL, give the same frames, and have the same three flaws
that are avoided here: reading bytes beyond their end, copies in place of broken frames, and seeks
that miss where a key frame is not shown in the order in which it is stored.

So the packets are looked at first. If every key frame starts a closed group of pictures, only the
groups that hold a sampled frame are decoded; if not, decord reads on from the start. What decord
cannot give exactly (frames hidden by an edit list or without times, damage) is left to OpenCV,
whose colours differ by a few levels of 255.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from tempfile import NamedTemporaryFile
from typing import IO, Any, ClassVar

import cv2
import decord
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
    check_frame_pixel_limit,
    resolve_video_backend_kwargs,
)
from vllm.multimodal.video_decoders.opencv import OpenCVVideoBackendMixin

from scissor_vllm.cpus import num_cpus
from scissor_vllm.frontend.frame_cache import FRAMES
from scissor_vllm.frontend.refusal import RefusedVideoError
from scissor_vllm.metrics import CLOCK, Reason

logger = logging.getLogger(__name__)

BACKEND = "decord"
MAX_DECODE_BYTES_VARIABLE = "SCISSOR_MAX_VIDEO_DECODE_BYTES"
DEFAULT_MAX_DECODE_BYTES = 4 * 1024**3

# Each decoder thread holds a frame of its own, so that after a seek as many frames are decoded in
# vain as there are threads: more than they save where a seek is for fewer frames than this.
_FRAMES_PER_SEEK_WORTH_THREADS = 32
# What a thread decodes in some 50 ms: with less for each, handing frames over costs what it saves.
_PIXELS_WORTH_A_THREAD = 64 * 640 * 360
_MAX_DECODER_THREADS = 16
# Of two at once, a short video does not wait for a long one.
_LEAST_AT_ONCE, _CPUS_PER_VIDEO = 2, 4

_CONTAINER = re.compile(
    rb"....(?:ftyp|moov|mdat|free|skip|wide)"  # MP4, MOV
    rb"|\x1a\x45\xdf\xa3"  # WebM, Matroska
    rb"|RIFF....AVI "
    rb"|FLV\x01"
    rb"|OggS\x00\x02"
    rb"|\x30\x26\xb2\x75\x8e\x66\xcf\x11"  # ASF (WMV)
    rb"|\x00\x00\x01\xba"  # MPEG program stream
    rb"|GIF8[79]a",
    re.DOTALL,
)
# Session and presentation descriptions, which FFmpeg recognizes behind another beginning too.
_DESCRIPTIONS = (b"\rc=in ip", b"\nc=in ip", b"<mpd")
_FFMPEG_PROBE_BYTES = 1024**2

# decord's time of a frame without one is about -9e18 of the stream's units.
_NO_TIME = -1e9

_DECORD_ERRORS = (
    decord.DECORDError,
    decord.DECORDLimitReachedError,
    AssertionError,
    IndexError,
    RuntimeError,
    StopIteration,
)


def register_video_loader() -> None:
    """Make "decord" a video loader of vLLM; calling it again changes nothing.

    For some video processors vLLM takes a loader of their own, whatever the operator named: where
    that is "decord", they get their sampling with this decoder.
    """
    max_decode_bytes()
    # Broken input makes FFmpeg print a line per packet to stderr; what matters reaches the client
    # as an error. OpenCV reads its variable once, when it first opens a video.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", str(decord.logging.QUIET))
    decord.logging.set_level(decord.logging.QUIET)
    VIDEO_LOADER_REGISTRY.register(BACKEND)(DecordVideoBackend)
    if envs.VLLM_VIDEO_LOADER_BACKEND == BACKEND:
        for loader, processor in _OF_PROCESSORS.items():
            register = VIDEO_LOADER_REGISTRY.register(loader.__name__, video_processor=processor)
            register(loader)


def max_decode_bytes() -> int:
    """Most bytes that the decoded frames of one video may take."""
    text = os.environ.get(MAX_DECODE_BYTES_VARIABLE, str(DEFAULT_MAX_DECODE_BYTES))
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise ValueError(
            f"{MAX_DECODE_BYTES_VARIABLE} must be a positive integer (bytes), got {text!r}; "
            f"unset it for the default of {DEFAULT_MAX_DECODE_BYTES}"
        )
    return int(text)


class DecordVideoBackend(VideoBackend):
    """Loader "decord": vLLM's uniform sampling, decoded by decord.

    The sampling of another vLLM loader comes with `class New(DecordVideoBackend, ThatLoader)`
    and its own `default_fps`.
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

        The metadata's `frames_indices` name the frames, and its `video_backend` what decoded them.
        Frames that are kept for another request (see `scissor_vllm.frontend.frame_cache`) are
        read-only.

        Args:
            data: the bytes of a video file.
            num_frames: frames to sample, evenly spaced; -1 for all.
            fps: frames to sample per second of video, where that gives fewer; -1 for all.
            max_duration: seconds; only samplings that ask for it heed it, as in vLLM.
            frame_recovery: show the next good frame for a broken one; OpenCV decodes then.
            backend: "decord", or one of vLLM's own decoders ("opencv", "torchcodec", ...).
            kwargs: options of the sampling, or of a decoder of vLLM's own.

        Raises:
            ValueError: an argument is no number, the bytes are no video, no sampled frame can be
                decoded, a frame is larger than VLLM_MAX_IMAGE_PIXELS allows, or all sampled
                frames together are larger than SCISSOR_MAX_VIDEO_DECODE_BYTES allows.
        """
        fps = cls.default_fps if fps is None else fps
        _check_number("num_frames", num_frames, int)
        _check_number("fps", fps, int, float)
        _check_number("max_duration", max_duration, int, float)

        _check_container(data)

        def decode() -> tuple[DecodedFrames, dict[str, Any]]:
            with _DECODING, CLOCK.stage("decode"):
                return cls._decode(
                    data, num_frames, fps, max_duration, frame_recovery, backend=backend, **kwargs
                )

        if not FRAMES.is_on:
            return decode()
        settings = (num_frames, fps, max_duration, frame_recovery, backend, sorted(kwargs.items()))
        loader = f"{cls.__module__}.{cls.__qualname__}"
        return FRAMES.get((hashlib.sha256(data).digest(), loader, repr(settings)), decode)

    @classmethod
    def _decode(
        cls,
        data: bytes,
        num_frames: int,
        fps: float,
        max_duration: float,
        frame_recovery: bool,
        *,
        backend: str,
        **kwargs: Any,
    ) -> tuple[DecodedFrames, dict[str, Any]]:
        """What `load_bytes` returns, of checked arguments."""
        try:
            if backend == BACKEND and not frame_recovery:
                target = VideoTargetMetadata(num_frames, fps, max_duration)
                loaded = cls._load_exact(data, target, kwargs)
                if loaded is not None:
                    return loaded
            return super().load_bytes(
                data,
                num_frames=num_frames,
                fps=fps,
                max_duration=max_duration,
                frame_recovery=frame_recovery,
                backend="opencv" if backend == BACKEND else backend,
                **kwargs,
            )
        except cv2.error as error:
            raise RefusedVideoError(_not_a_video(data)) from error

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
            ValueError: no frame can be decoded, or all together would be too large.
        """
        height = int(cap.get(cv2.CAP_PROP_FRAME_HEIGHT))
        width = int(cap.get(cv2.CAP_PROP_FRAME_WIDTH))
        _check_decode_bytes(len(frame_idx), height, width)
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

    @classmethod
    def _load_exact(
        cls, data: bytes, target: VideoTargetMetadata, kwargs: dict[str, Any]
    ) -> tuple[npt.NDArray[np.uint8], dict[str, Any]] | None:
        """What `load_bytes` returns, or None for a file of which some frames cannot be found."""
        # decord takes what OpenCV takes: options of the sampling, and none of its own.
        sampling_kwargs, _ = resolve_video_backend_kwargs("opencv", kwargs)
        stream = _Stream.read(data)
        check_frame_pixel_limit(stream.width, stream.height)

        def sample(num_frames: int) -> tuple[VideoSourceMetadata, list[int]]:
            duration = num_frames / stream.fps if stream.fps > 0 else 0
            source = cls._prepare_source(VideoSourceMetadata(num_frames, stream.fps, duration))
            indices = cls.compute_frames_index_to_sample(source, target, **sampling_kwargs)
            _check_decode_bytes(len(indices), stream.height, stream.width)
            return source, indices

        if stream.num_frames == 0:
            return None
        source, indices = sample(stream.num_frames)
        stops, num_threads = stream.route(indices)
        times = np.empty(0)
        try:
            with _file_of(data) as path:
                num_threads = max(1, min(num_threads, num_cpus() // max(1, _DECODING.number)))
                # Without a tolerance decord hands out a copy of another frame for a broken one.
                reader = decord.VideoReader(path, num_threads=num_threads, fault_tol=1e-9)
                times = reader.get_frame_timestamp(range(len(reader)))[:, 0]
                if len(times) == stream.num_frames and times[0] >= 0:
                    frames = _read_frames(reader, stops, indices)
                    return frames, cls.create_hf_metadata(source, indices, BACKEND)
        except _DECORD_ERRORS as error:
            logger.debug("decord cannot decode all of this video's frames: %s", error)
        if len(times) != stream.num_frames < stream.num_claimed:
            return None
        # An edit list hides the frames before time 0: OpenCV leaves them out, decord does not.
        num_hidden = int(np.sum((times > _NO_TIME) & (times < 0)))
        if num_hidden > 0:
            source, indices = sample(max(1, stream.num_frames - num_hidden))
        capture = OpenCVVideoBackendMixin.open_video_capture(data)
        frames, valid = cls.read_frames(capture, indices, source.total_frames_num)
        return frames, cls.create_hf_metadata(source, valid, "opencv")


class Qwen2VLDecord(DecordVideoBackend, Qwen2VLVideoBackend):
    """The sampling of Qwen2-VL and Qwen2.5-VL."""

    default_fps = 2


class Qwen3VLDecord(DecordVideoBackend, Qwen3VLVideoBackend):
    """The sampling of Qwen3-VL."""

    default_fps = 2


_OF_PROCESSORS = {
    Qwen2VLDecord: "Qwen2VLVideoProcessor",
    Qwen3VLDecord: "Qwen3VLVideoProcessor",
}


def loader_for(video_processor: str) -> type[DecordVideoBackend]:
    """Return the loader that samples as a server does for a video processor of this class name."""
    found = (loader for loader, name in _OF_PROCESSORS.items() if name == video_processor)
    return next(found, DecordVideoBackend)


@dataclass(frozen=True)
class _Stream:
    """What a file's packets say of its first video stream, up to one that is damaged."""

    width: int
    height: int
    fps: float
    num_claimed: int
    """Frames that the file's header claims, in some containers an estimate."""
    times: npt.NDArray[np.float64]
    """Presentation time of each frame, in the order of decoding."""
    key_frames: npt.NDArray[np.int64]
    """Positions of the key frames in the order of decoding."""

    @classmethod
    def read(cls, data: bytes) -> _Stream:
        """The stream in a file's bytes; ValueError if they hold none."""
        # A format of -1 makes OpenCV hand out packets, undecoded: no threads to decode are needed.
        options = [cv2.CAP_PROP_FORMAT, -1, cv2.CAP_PROP_N_THREADS, 1]
        source: Any = BytesIO(data)
        try:
            backend = OpenCVVideoBackendMixin.get_cv2_video_api()
            capture = cv2.VideoCapture(source, backend, options)
        except cv2.error as error:
            raise RefusedVideoError(_not_a_video(data)) from error
        if not capture.isOpened():
            raise RefusedVideoError(_not_a_video(data))
        times: list[float] = []
        key_frames: list[int] = []
        while capture.grab():
            if capture.get(cv2.CAP_PROP_LRF_HAS_KEY_FRAME):
                key_frames.append(len(times))
            times.append(capture.get(cv2.CAP_PROP_PTS))
        return cls(
            width=int(capture.get(cv2.CAP_PROP_FRAME_WIDTH)),
            height=int(capture.get(cv2.CAP_PROP_FRAME_HEIGHT)),
            fps=capture.get(cv2.CAP_PROP_FPS),
            num_claimed=int(capture.get(cv2.CAP_PROP_FRAME_COUNT)),
            times=np.array(times),
            key_frames=np.array(key_frames, dtype=np.int64),
        )

    @property
    def num_frames(self) -> int:
        return len(self.times)

    def has_closed_groups(self) -> bool:
        """Whether each key frame is shown after all earlier frames and before all later ones.

        decord takes a key frame's position among the packets for its frame index, and is off by
        the number of frames that are stored after the key frame and shown before it.
        """
        keys = self.key_frames
        if len(keys) == 0 or keys[0] != 0:
            return False
        first_from_here = np.minimum.accumulate(self.times[::-1])[::-1]
        last_until_here = np.maximum.accumulate(self.times)
        return bool(np.all(first_from_here[keys] == last_until_here[keys]))

    def route(self, indices: list[int]) -> tuple[list[int], int]:
        """Frames to read so that decord reaches these exactly, and how many threads are worth it.

        From one frame to the next decord seeks if a key frame lies between, else it reads on.
        """
        keys = self.key_frames
        if not self.has_closed_groups():
            # A seek would miss: stop before each key frame, so that none ever lies between.
            ends = keys[(keys > 0) & (keys <= max(indices))] - 1
            return sorted({*indices, *ends.tolist()}), self._threads_worth(max(indices) + 1)
        wanted = np.array(indices)
        following = np.concatenate([[0], wanted[:-1] + 1])
        key_of_wanted, key_of_following = (
            keys[np.searchsorted(keys, frames, side="right") - 1] for frames in (wanted, following)
        )
        seeks = key_of_wanted != key_of_following
        num_decoded = np.sum(wanted - np.where(seeks, key_of_wanted, following) + 1)
        worth_threads = num_decoded >= _FRAMES_PER_SEEK_WORTH_THREADS * seeks.sum()
        return indices, self._threads_worth(int(num_decoded)) if worth_threads else 1

    def _threads_worth(self, num_decoded: int) -> int:
        """Decoder threads for so many frames, if there are CPUs for them."""
        worth = num_decoded * self.width * self.height // _PIXELS_WORTH_A_THREAD
        return max(1, min(worth, _MAX_DECODER_THREADS))


class _Decoding:
    """Lets few videos be decoded at once, in the order in which they came.

    Where many come together, all would be ready late: each takes as long as all, and what prepares
    the first for the engine waits for CPUs and interpreter among those that decode the others.
    """

    def __init__(self) -> None:
        self._turns = threading.Condition()
        self._num_came = 0
        self._num_done = 0
        self.number = 0
        """Videos that are decoded at this moment, by all threads."""

    def __enter__(self) -> None:
        at_once = max(_LEAST_AT_ONCE, num_cpus() // _CPUS_PER_VIDEO)
        with self._turns:
            before = self._num_came
            self._num_came += 1
            self._turns.wait_for(lambda: before - self._num_done < at_once)
            self.number += 1

    def __exit__(self, *raised: object) -> None:
        with self._turns:
            self.number -= 1
            self._num_done += 1
            self._turns.notify_all()


_DECODING = _Decoding()


@contextmanager
def _file_of(data: bytes) -> Iterator[str]:
    """Path of a file with these bytes, in memory where the system can.

    decord's own reader of bytes reads beyond their end where a damaged file points there, and the
    process dies of it.
    """
    if hasattr(os, "memfd_create"):
        file: IO[bytes] = os.fdopen(os.memfd_create("video"), "wb")
        path = f"/proc/self/fd/{file.fileno()}"
    else:
        file = NamedTemporaryFile()  # noqa: SIM115
        path = file.name
    with file:
        file.write(data)
        file.flush()
        yield path


def _read_frames(
    reader: decord.VideoReader, stops: list[int], indices: list[int]
) -> npt.NDArray[np.uint8]:
    """Frames of these indices, RGB (num_frames, height, width, 3), read on the way of the stops.

    Other threads of a server wait for what Python does here: little for each frame.
    """
    places: dict[int, list[int]] = {}
    for place, index in enumerate(indices):
        places.setdefault(index, []).append(place)
    frames = np.empty((0, 0, 0, 3), dtype=np.uint8)
    for stop in stops:
        frame = reader[stop]
        if stop in places:
            padded = frame.asnumpy()
            height, width, _ = padded.shape
            if len(frames) == 0:
                # A picture may be larger than its file's header says.
                check_frame_pixel_limit(width, height)
                _check_decode_bytes(len(indices), height, width)
                frames = np.empty((len(indices), height, width, 3), dtype=np.uint8)
            if frames.shape[1:3] != (height, width):
                raise RefusedVideoError(
                    f"all frames of a video must have one size, got {width}x{height} after "
                    f"{frames.shape[2]}x{frames.shape[1]}: encode it anew"
                )
            # At some small widths decord takes the padding of a row for more channels.
            picture = padded.reshape(height, -1)[:, : width * 3].reshape(height, width, 3)
            for place in places[stop]:
                # Numpy lets other threads run while it copies to one place, not to some of many.
                frames[place] = picture
    return frames


def _check_number(name: str, value: object, *types: type) -> None:
    if not isinstance(value, types) or not math.isfinite(value):  # type: ignore[arg-type]
        kind = "an integer" if float not in types else "a finite number"
        raise ValueError(f"{name} must be {kind}, got {value!r}: leave it out for the default")


def _check_decode_bytes(num_frames: int, height: int, width: int) -> None:
    """ValueError unless frames of this number and size are within `max_decode_bytes`."""
    num_bytes, limit = num_frames * height * width * 3, max_decode_bytes()
    if num_bytes > limit:
        raise RefusedVideoError(
            f"the sampled frames of a video may take {limit} bytes, got {num_frames} frames of "
            f"{width}x{height}, which take {num_bytes}: ask for fewer frames (num_frames, fps), or "
            f"have the operator raise {MAX_DECODE_BYTES_VARIABLE}",
            reason=Reason.VIDEO_TOO_LARGE,
        )


def _check_container(data: bytes) -> None:
    """ValueError unless the bytes are a video file of their own.

    FFmpeg also takes play lists and session descriptions, and opens what they name: files of this
    server, or a socket on which it waits.
    """
    # A regular expression takes far longer to look for these, and no other thread runs meanwhile.
    probed = data[:_FFMPEG_PROBE_BYTES].lower()
    described = any(mark in probed for mark in _DESCRIPTIONS)
    if described or not _CONTAINER.match(data):
        raise RefusedVideoError(_not_a_video(data))


def _not_a_video(data: bytes) -> str:
    return (
        f"a video must be a whole file of MP4, MOV, WebM, Matroska, AVI, FLV, Ogg, ASF, MPEG-PS or "
        f"GIF, with a video stream that FFmpeg can open; got {len(data)} bytes that begin with "
        f"{data[:12]!r}: send H.264 in MP4, for example"
    )
