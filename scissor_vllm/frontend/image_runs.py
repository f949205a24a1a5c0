"""Runs of images of one size in a message, compressed together as the frames of a video.

Clients without video support send frames as ``image_url`` parts. With ``compress_images`` a run of
them becomes one video before vLLM parses the messages. K, caches, scheduling and the worker's part
are then those of a video. Compressed as images they would need one another's embeddings, but vLLM
caches, schedules and encodes images one by one.

vLLM chooses placeholders before it fetches, and sizes are known after. So images that may be in a
run are fetched here, by vLLM's own connector and with its checks. Their parts get names in place of
URLs, and ``VideoMediaConnector`` gives out what is named.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, groupby
from typing import Any, TypeAlias

import numpy as np
from starlette.datastructures import State
from vllm import envs
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaWithBytes

from scissor_vllm.frontend.media import CONNECTOR, VideoMediaConnector
from scissor_vllm.frontend.refusal import RefusedRequestError
from scissor_vllm.frontend.request import RetentionRequest, image_url_of, is_video
from scissor_vllm.frontend.video.limits import MAX_DECODE_BYTES_VARIABLE, max_decode_bytes
from scissor_vllm.metrics import Reason
from scissor_vllm.retention import COMPRESS_IMAGES
from scissor_vllm.video_fields import IMAGES
from scissor_vllm.vllm_compat import media_budgets

MIN_IMAGES = 4
"""Fewest images of a run."""
IMAGES_A_SECOND = 1.0
"""For models that tell or encode times: a client's are not known."""
_MODE = "RGB"

Image: TypeAlias = MediaWithBytes
"""A decoded image as vLLM's connector returns it."""


def check_media_connector() -> None:
    """Raise ValueError if the operator chose a connector that gives out no loaded media."""
    if envs.VLLM_MEDIA_CONNECTOR != CONNECTOR:
        raise ValueError(
            f"--allow-compress-images needs VLLM_MEDIA_CONNECTOR {CONNECTOR!r}, got "
            f"{envs.VLLM_MEDIA_CONNECTOR!r}: unset it, or leave the option out"
        )


@dataclass(frozen=True)
class Stretch:
    """Neighbouring images of a message, of any sizes."""

    parts: list[Any]
    """All parts of the message."""
    first: int
    """Index of its first image among them."""
    urls: list[str]


@dataclass(frozen=True)
class Run:
    """Neighbouring images of a message, of one size and mode."""

    parts: list[Any]
    """All parts of the message."""
    first: int
    """Index of its first image among them."""
    images: list[Image]

    @property
    def is_compressed(self) -> bool:
        """Whether it is long enough, and of images that can be frames."""
        return len(self.images) >= MIN_IMAGES and self.images[0].media.mode == _MODE


async def compress_images(request: RetentionRequest, state: State) -> None:
    """Fetch a request's images, and put a video in the place of each run of them.

    Args:
        request: checked, with at least one image.
        state: of the app.

    Raises:
        RefusedRequestError: no run of ``MIN_IMAGES``, beyond a limit of the operator, or a URL that
            is invalid or not allowed.
        RefusedMediaError: an image cannot be fetched.
        ValueError: what vLLM raises for an image that it cannot decode.
    """
    info = state.online_renderer.renderer.mm_processor.info
    num_frames_of_image = info.get_num_frames_of_image()
    stretches = _stretches(request)
    urls = [url for stretch in stretches for url in stretch.urls]
    image_limit = info.ctx.get_mm_config().get_limit_per_prompt("image")
    _check_limit("images", image_limit, len(urls), "send fewer")
    video_limit = info.allowed_mm_limits.get("video", 0)
    num_videos = sum(is_video(part) for parts in _contents(request) for part in parts)
    _check_limit(_VIDEOS, video_limit, num_videos + 1, _FEWER_RUNS)
    images = await _fetched(urls, _connector(request, state), num_frames_of_image)
    runs = list(_runs(stretches, images))
    num_runs = sum(run.is_compressed for run in runs)
    if num_runs == 0:
        longest = max(runs, key=lambda run: len(run.images))
        media = longest.images[0].media
        size = "x".join(map(str, media.size))
        mode = "" if media.mode == _MODE else f" in mode {media.mode}, not {_MODE}"
        raise _no_run(f"at most {len(longest.images)} of {size}{mode}")
    _check_limit(_VIDEOS, video_limit, num_videos + num_runs, _FEWER_RUNS)
    request.use_loaded(await asyncio.to_thread(_put_in_place, runs, num_frames_of_image))


_VIDEOS = "videos, a run of compressed images counted as one,"
_FEWER_RUNS = f"send fewer, or leave {COMPRESS_IMAGES} out"


def _contents(request: RetentionRequest) -> Iterator[list[Any]]:
    """Yield the parts of each message that has parts, as the list that the message holds."""
    for message in request.messages:  # type: ignore[attr-defined]
        if not isinstance(message, dict):
            # An OpenAI Harmony message, which vLLM refuses later.
            continue
        content = message.get("content")
        if content is None or isinstance(content, str):
            continue
        if not isinstance(content, list):
            # Pydantic makes iterators of some.
            message["content"] = content = list(content)
        yield content


def _stretches(request: RetentionRequest) -> list[Stretch]:
    """Return the stretches of at least ``MIN_IMAGES`` images.

    Raises:
        RefusedRequestError: there is none.
    """
    stretches = [stretch for parts in _contents(request) for stretch in _stretches_of(parts)]
    if all(len(stretch.urls) < MIN_IMAGES for stretch in stretches):
        longest = max((len(stretch.urls) for stretch in stretches), default=0)
        raise _no_run(f"at most {longest}")
    return [stretch for stretch in stretches if len(stretch.urls) >= MIN_IMAGES]


def _stretches_of(parts: list[Any]) -> Iterator[Stretch]:
    numbered = enumerate(map(image_url_of, parts))
    for is_image, group in groupby(numbered, key=lambda pair: pair[1] is not None):
        pairs = list(group)
        if is_image:
            yield Stretch(parts, pairs[0][0], [url for _, url in pairs if url is not None])


def _runs(stretches: list[Stretch], images: list[Image]) -> Iterator[Run]:
    """Yield the stretches cut wherever size or mode change, in order."""
    remaining = iter(images)
    for stretch in stretches:
        first = stretch.first
        of_stretch = [next(remaining) for _ in stretch.urls]
        for _, group in groupby(of_stretch, key=lambda image: (image.media.size, image.media.mode)):
            run = Run(stretch.parts, first, list(group))
            yield run
            first += len(run.images)


def _connector(request: Any, state: State) -> VideoMediaConnector:
    """Return the connector that vLLM would fetch the request's images by."""
    renderer = state.online_renderer
    config = renderer.model_config
    options = config.multimodal_config.media_io_kwargs
    if renderer.trust_request_mm_kwargs:
        # vLLM refuses a request's own from other clients.
        params = request.build_chat_params(None, "auto")
        options = params.with_defaults(default_media_io_kwargs=options).media_io_kwargs
    connector: VideoMediaConnector = MEDIA_CONNECTOR_REGISTRY.load(
        envs.VLLM_MEDIA_CONNECTOR,
        media_io_kwargs=options,
        allowed_local_media_path=config.allowed_local_media_path,
        allowed_media_domains=config.allowed_media_domains,
        **media_budgets(),
    )
    return connector


async def _fetched(
    urls: list[str], connector: VideoMediaConnector, num_frames_of_image: int
) -> list[Image]:
    """Return the images, fetched and decoded at the same time; the first failure ends all.

    Raises:
        RefusedRequestError: as frames they would take more bytes than a video may.
    """
    limit, num_bytes = max_decode_bytes(), 0

    async def fetch(url: str) -> Image:
        nonlocal num_bytes
        image: Any = await connector.fetch_frame_async(url)
        width, height = image.media.size
        num_bytes += width * height * len(_MODE) * num_frames_of_image
        if num_bytes > limit:
            raise RefusedRequestError(
                f"the images of a request with {COMPRESS_IMAGES} may take {limit} bytes as frames, "
                f"got {len(urls)} images, some of which take {num_bytes}: send fewer or smaller "
                f"ones, or have the operator raise {MAX_DECODE_BYTES_VARIABLE}",
                parameter="image_url",
                reason=Reason.VIDEO_TOO_LARGE,
            )
        return image

    tasks = [asyncio.create_task(fetch(url)) for url in urls]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def _put_in_place(runs: list[Run], num_frames_of_image: int) -> dict[str, Any]:
    """Change the messages' parts, and return what their new URLs name."""
    loaded: dict[str, Any] = {}
    names = (f"scissor-vllm:{number}" for number in count())
    # From the last, so that indices of those before stay.
    for run in reversed(runs):
        place = slice(run.first, run.first + len(run.images))
        if run.is_compressed:
            name = next(names)
            loaded[name] = _as_video(run.images, num_frames_of_image)
            run.parts[place] = [{"type": "video_url", "video_url": {"url": name}}]
            continue
        parts = []
        for part, image, name in zip(run.parts[place], run.images, names, strict=False):
            loaded[name] = image
            url = part["image_url"]
            parts.append(
                {**part, "image_url": name if isinstance(url, str) else {**url, "url": name}}
            )
        run.parts[place] = parts
    return loaded


def _as_video(images: list[Image], num_frames_of_image: int) -> MediaWithBytes[Any]:
    """Return a video of images as vLLM's connector would return it."""
    width, height = images[0].media.size
    frames = np.empty((len(images), num_frames_of_image, height, width, len(_MODE)), np.uint8)
    for place, image in zip(frames, images, strict=True):
        place[:] = np.asarray(image.media)
    indices = np.arange(len(images)).repeat(num_frames_of_image)
    metadata = {
        "total_num_frames": len(images),
        "fps": IMAGES_A_SECOND,
        "duration": len(images) / IMAGES_A_SECOND,
        "video_backend": IMAGES,
        "frames_indices": indices.tolist(),
        "do_sample_frames": False,
    }
    # It names the pixels, as a file's bytes name a video's.
    digests = (
        hashlib.sha256(image.original_bytes + repr(image.io_config).encode()).digest()
        for image in images
    )
    shape = (-1, height, width, len(_MODE))
    return MediaWithBytes((frames.reshape(shape), metadata), b"".join(digests))


def _check_limit(items: str, limit: int, num_items: int, remedy: str) -> None:
    if num_items > limit:
        raise RefusedRequestError(
            f"a request may have {limit} {items} on this server, got {num_items}: {remedy}, or "
            "have the operator raise --limit-mm-per-prompt as far as the model allows",
            parameter=COMPRESS_IMAGES,
            reason=Reason.INVALID_IMAGES,
        )


def _no_run(got: str) -> RefusedRequestError:
    return RefusedRequestError(
        f"{COMPRESS_IMAGES} needs {MIN_IMAGES} or more images of one size next to each other in a "
        f"message, got {got}: send them at one size without text between them, or leave "
        f"{COMPRESS_IMAGES} out",
        parameter=COMPRESS_IMAGES,
        reason=Reason.INVALID_IMAGES,
    )
