"""Sends resized uint8 frames to the worker instead of normalized float32 pixels. All models use it.

A Hugging Face video processor resizes uint8 frames and then normalizes them to float32,
(value - mean) / std for each channel. Here it only resizes. The uint8 frames travel with the mean
and the standard deviation, and the model normalizes them on its device. This sends a quarter of the
bytes and saves most of the processor's time. The tower's input is bitwise equal: the model does the
same two operations in float32 and rounds to its dtype once, as vLLM does.

Stock vLLM's path is taken wherever equality is not certain: frames that are not uint8 RGB in host
memory, a processor that rescales or normalizes differently, or an option that could change pixels.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import torch
from vllm.config.multimodal import MMHasherAlgorithm
from vllm.multimodal.hasher import MultiModalHasher
from vllm.multimodal.processing import InputProcessingContext

from scissor_vllm.cpus import take_cpus, threads_per_video
from scissor_vllm.normalization import normalized

Item = TypeVar("Item")
Result = TypeVar("Result")

_NUM_CHANNELS = 3
_NUM_VALUES = 256
_IDENTITY_BYTES = 32

_OPTIONS_BEFORE_NORMALIZATION = {
    "crop_size",
    "default_to_square",
    "do_center_crop",
    "do_convert_rgb",
    "do_resize",
    "do_sample_frames",
    "fps",
    "num_frames",
    "resample",
    "size",
    "truncation",
}
"""Processor options that change no pixel after the resize. Any other takes the stock path."""

_SAMPLING_OPTIONS = {"do_sample_frames", "fps", "num_frames"}

_FRAMES_PER_THREAD = 8
"""Fewest frames for a thread."""

_INTEGER_RESIZE = ("AVX2", "AVX512")
"""Whether torch resizes uint8 in integer arithmetic, which does not depend on the memory format.
Channels-last, a decoder's format, is twice as fast."""


def resized_frames(
    context: InputProcessingContext, hf_processor: Any, video: Any, options: Mapping[str, object]
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return a video's ``VIDEO_FRAMES`` and ``PIXEL_NORMALIZATION``, None for the stock path.

    Args:
        context: vLLM's processing context.
        hf_processor: a Hugging Face processor, its ``video_processor`` as it was loaded.
        video: sampled frames in any form that vLLM takes; only uint8 (T, H, W, 3) is resized here.
        options: the request's options for the processor.

    Raises:
        ValueError: the processor fails on these frames, as in stock vLLM.
    """
    pixels = _rgb_frames(video)
    given = context.get_merged_mm_kwargs(options).keys()
    if pixels is None or given - _OPTIONS_BEFORE_NORMALIZATION:
        return None
    normalization = get_normalization(getattr(hf_processor, "video_processor", None))
    if normalization is None:
        return None
    pixels = _channels_first(pixels)
    # Named for videos alone: of an image in the same call nothing changes. Without a text the
    # processor makes and tokenizes none; vLLM writes the placeholders itself.
    only_resize = {
        "do_rescale": False,
        "do_normalize": False,
        "input_data_format": "channels_first",
    }
    processor_options = {**options, "videos_kwargs": only_resize}

    def resize(frames: torch.Tensor) -> torch.Tensor:
        output = context.call_hf_processor(hf_processor, {"videos": frames}, processor_options)
        resized: torch.Tensor = output["pixel_values_videos"][0]
        return resized.permute(0, 2, 3, 1)

    # With frame removal the output of a frame depends on the others.
    samples = given & _SAMPLING_OPTIONS or getattr(
        hf_processor.video_processor, "do_sample_frames", False
    )
    resized = resize(pixels) if samples else in_threads(resize, pixels)
    if resized.dtype != torch.uint8:
        return None
    return resized.contiguous(), normalization


def in_threads(
    resize: Callable[[torch.Tensor], torch.Tensor], frames: torch.Tensor
) -> torch.Tensor:
    """Return the output of a function on frames, computed in several threads.

    vLLM prepares one request at a time, in one thread. Torch's resize uses one thread and releases
    the interpreter lock.

    Args:
        resize: maps frames to as many frames, (t, H, W, C), each independent of the others.
        frames: (T, ...).
    """
    most = min(threads_per_video(), len(frames) // _FRAMES_PER_THREAD)
    # A new thread is outside of inference mode, which a worker uses while it profiles.
    infers = torch.is_inference_mode_enabled()

    def resize_part(part: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode(infers):
            return resize(part)

    def copy_part(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
        into, part = pair
        with torch.inference_mode(infers):
            into.copy_(part)

    with take_cpus(most) as num_threads:
        if num_threads == 1:
            return resize(frames)
        num_frames = -(-len(frames) // num_threads)
        parts = _map(resize_part, frames.split(num_frames), num_threads)
        resized = torch.empty(len(frames), *parts[0].shape[1:], dtype=parts[0].dtype)
        pairs = list(zip(resized.split(num_frames), parts, strict=True))
        _map(copy_part, pairs, num_threads)
    return resized


def map_in_threads(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Return a function's results for items, in order, computed in several threads.

    Args:
        function: releases the interpreter lock for most of its time.
        items: what it is called with.
    """
    with take_cpus(min(threads_per_video(), len(items))) as num_threads:
        return _map(function, items, num_threads)


def _map(
    function: Callable[[Item], Result], items: Sequence[Item], num_threads: int
) -> list[Result]:
    """Return a function's results for items, in order, computed in so many threads."""
    if num_threads == 1:
        return list(map(function, items))
    results: dict[int, Result] = {}

    def run_part(first: int) -> None:
        for number in range(first, len(items), num_threads):
            results[number] = function(items[number])

    for _ in _resize_pool().map(run_part, range(num_threads)):
        pass
    return [results[number] for number in range(len(items))]


@cache
def _resize_pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads_per_video(), "resize")


def rgb_view(video: Any) -> torch.Tensor | None:
    """Return frames that are uint8 (T, H, W, 3) in host memory as (T, 3, H, W), None for others."""
    frames = _rgb_frames(video)
    return None if frames is None else _channels_first(frames)


def _channels_first(frames: torch.Tensor) -> torch.Tensor:
    frames = frames.permute(0, 3, 1, 2)
    is_fast = torch.backends.cpu.get_cpu_capability() in _INTEGER_RESIZE
    return frames if is_fast else frames.contiguous()


def _rgb_frames(video: Any) -> torch.Tensor | None:
    """Return frames that are uint8 (T, H, W, 3) in host memory as a tensor, None for others."""
    if isinstance(video, np.ndarray) and video.dtype == np.uint8:
        with warnings.catch_warnings():
            # The frames may be read-only; nothing here writes to them.
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            video = torch.from_numpy(video)
    if not isinstance(video, torch.Tensor) or video.dtype != torch.uint8 or not video.is_cpu:
        return None
    # A height of 1 or 3 makes the processor guess where the channels are.
    if video.ndim != 4 or video.shape[3] != _NUM_CHANNELS or video.shape[1] in (1, _NUM_CHANNELS):
        return None
    return video


def get_normalization(video_processor: Any) -> torch.Tensor | None:
    """Return mean and standard deviation, float32 (2, 3), as the processor applies them to uint8.

    None if the processor does anything else. Its output for all 256 values of each channel is
    compared with the model's.
    """
    if not getattr(video_processor, "do_rescale", None) or not getattr(
        video_processor, "do_normalize", None
    ):
        return None
    factor = video_processor.rescale_factor
    mean, std = video_processor.image_mean, video_processor.image_std
    try:
        scaled = [
            torch.tensor(tuple(channel_values), dtype=torch.float32) * (1.0 / factor)
            for channel_values in (mean, std)
        ]
        normalization = torch.stack(
            [channel_values.expand(_NUM_CHANNELS) for channel_values in scaled]
        )
        every = torch.arange(_NUM_VALUES, dtype=torch.uint8)
        every = every[:, None, None, None].repeat(1, _NUM_CHANNELS, 1, 1)
        expected = video_processor.rescale_and_normalize(
            every, True, factor, True, tuple(mean), tuple(std)
        )
    except (AttributeError, TypeError, ValueError, RuntimeError, ZeroDivisionError):
        return None
    frames = every.permute(0, 2, 3, 1).contiguous()
    ours = normalized(frames, normalization, torch.float32)
    same = expected.dtype == torch.float32 and torch.equal(ours, expected)
    return normalization if same else None


def without_repeats(frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return frames (T, ...) without repeats of the previous frame, and ``FRAME_OF``."""
    is_new = [True, *(not torch.equal(*pair) for pair in pairwise(frames))]
    first = torch.tensor(is_new)
    return (frames if all(is_new) else frames[first]), torch.cumsum(first, 0) - 1


def identity_of(algorithm: MMHasherAlgorithm, **fields: torch.Tensor) -> torch.Tensor:
    """Return ``VIDEO_IDENTITY`` of a video's other fields, in host memory, by name.

    Args:
        algorithm: one of vLLM's (``--mm-hasher-algorithm``), of 32 bytes or more.
        fields: everything that determines the tower's output.
    """
    digest = MultiModalHasher.hash_kwargs(
        algorithm, **{name: field.numpy() for name, field in fields.items()}
    )
    return torch.frombuffer(bytearray.fromhex(digest)[:_IDENTITY_BYTES], dtype=torch.int64)
