"""Requests of a load, drawn from a seed: hostile ones, and ones whose answers are known."""

from __future__ import annotations

import base64
import io
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av

from bench.numbered_clips import make_clip

CLIP = Path(__file__).resolve().parents[2] / "scissor_vllm" / "demo" / "clip.mp4"
QUESTION = "what digit does the sign show ?"
RATIOS = (1.0, 0.5, 0.25, 0.1)
KNOWN_EVERY = 10
"""Every so manieth request has a known answer."""
NUM_IMAGES = 6

CHAT = "/v1/chat/completions"
TOKENIZE = "/tokenize"
ESTIMATE = "/v1/scissor/estimate"

REFUSED, ANSWERED, EITHER, GONE = "refused", "answered", "either", "gone"
"""Outcomes: a 4xx, a 200, one of both, or a client that hangs up."""

BAD_RATIOS: tuple[Any, ...] = (
    *(0, -1, 1.0001, 2, 1e308, -0.0, 1e-9),
    *("much", "0.1", "", [], {}, [0.1], True),
)
BAD_BUDGETS: tuple[Any, ...] = (0, -5, 1.5, "x", [], {}, True, 0.0)
BAD_URLS = (
    "http://169.254.169.254/latest/meta-data",
    "file:///etc/passwd",
    "ftp://example.com/a.mp4",
    "gopher://x",
    "http://[::1",
    "data:video/mp4;base64,@@@@",
    "data:video/mp4;base64",
    "data:video/mp4;base64,",
    "data:text/plain;base64,aGVsbG8=",
    "",
    "scissor-vllm:0",
)
BAD_BODIES: tuple[bytes, ...] = (
    b"",
    b"{",
    b"[]",
    b"null",
    b'{"model": "demo"}',
    b'{"model": "demo", "messages": 3}',
    b'{"model": "demo", "messages": [{"role": "user", "content": [{"type": "video_url"}]}]}',
    b'{"model": "no such model", "messages": [{"role": "user", "content": "hello"}]}',
    b"\xff\xfe\x00",
    b"[" * 5000,
)


@dataclass(frozen=True)
class Request:
    """A request, and what must come back."""

    kind: str
    body: bytes
    outcome: str
    path: str = CHAT
    is_stream: bool = False


@dataclass(frozen=True)
class Offer:
    """What a server offers beside ratios and budgets."""

    has_auto: bool
    compresses_images: bool


def part(kind: str, url: str) -> dict[str, Any]:
    """Return a part of a message: a ``video_url`` or an ``image_url``."""
    return {"type": kind, kind: {"url": url}}


def chat(*media: dict[str, Any], **fields: Any) -> bytes:
    """Return the body of a chat about media, or of one without."""
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": [*media, {"type": "text", "text": QUESTION}]}],
        "max_completion_tokens": 8,
        "temperature": 0,
        **fields,
    }
    return json.dumps(body).encode()


def video(data: bytes) -> dict[str, Any]:
    """Return a file as a video of a message."""
    return part("video_url", f"data:video/mp4;base64,{base64.b64encode(data).decode()}")


def images_of(clip: Path, num_images: int) -> list[dict[str, Any]]:
    """Return the first frames of a clip as images of a message."""
    images = []
    with av.open(str(clip)) as file:
        for frame, _ in zip(file.decode(video=0), range(num_images), strict=False):
            picture = io.BytesIO()
            frame.to_image().save(picture, "PNG")
            data = base64.b64encode(picture.getvalue()).decode()
            images.append(part("image_url", f"data:image/png;base64,{data}"))
    return images


def known_requests(offer: Offer) -> list[Request]:
    """Return requests to all routes that answer alike each time."""
    clip = video(CLIP.read_bytes())
    images = images_of(CLIP, NUM_IMAGES)
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    requests = [
        *(Request("right", chat(clip, retention_ratio=ratio), ANSWERED) for ratio in RATIOS),
        Request("budget in force", chat(clip, max_retained_video_tokens=99), ANSWERED),
        Request("stream", chat(clip, retention_ratio=0.25, **streamed), ANSWERED, is_stream=True),
        Request("text", chat(), ANSWERED),
        Request("image", chat(images[0]), ANSWERED),
        Request("tokenize", chat(clip, retention_ratio=0.25), ANSWERED, TOKENIZE),
        Request("estimate", chat(clip, retention_ratio=0.1), ANSWERED, ESTIMATE),
    ]
    if offer.compresses_images:
        run = chat(*images, retention_ratio=0.5, compress_images=True)
        requests.append(Request("run of images", run, ANSWERED))
    return requests


def _clip(path: Path, width: int, height: int, num_frames: int) -> bytes:
    """Return a clip, made once: on some CPUs x264 encodes equal pictures differently each time."""
    if not path.exists():
        numbers = range(num_frames)
        make_clip(path, width=width, height=height, num_frames=num_frames, fps=8, shown=numbers)
    return path.read_bytes()


class Traffic:
    """Draws requests.

    Args:
        seed: of all draws.
        folder: for clips that it makes.
        offer: of the server.
    """

    def __init__(self, seed: int, folder: Path, offer: Offer) -> None:
        self.known = known_requests(offer)
        self._rng = random.Random(seed)
        self._data = CLIP.read_bytes()
        self._clip = video(self._data)
        sizes = ((64, 48, 2), (48, 64, 5), (320, 180, 12), (130, 70, 9), (256, 256, 33))
        self._others = [
            video(_clip(folder / f"{number}.mp4", width=w, height=h, num_frames=n))
            for number, (w, h, n) in enumerate(sizes)
        ]
        self._kinds: list[Callable[[], Request]] = [
            self._bad_ratio,
            self._bad_budget,
            self._damaged,
            self._bad_url,
            self._bad_body,
            self._other_size,
            self._hang_up,
        ]
        if offer.has_auto:
            self._kinds.append(self._auto)

    def draw(self) -> Iterator[Request]:
        """Yield requests without end, every ``KNOWN_EVERY``-th a known one."""
        while True:
            for _ in range(KNOWN_EVERY - 1):
                yield self._rng.choice(self._kinds)()
            yield self._rng.choice(self.known)

    def draw_answerable(self) -> Iterator[Request]:
        """Yield requests that a server with room for them answers, without end."""
        while True:
            yield self._rng.choice(self.known)
            yield self._other_size()

    def _bad_ratio(self) -> Request:
        media = self._rng.choice(((self._clip,), ()))
        body = chat(*media, retention_ratio=self._rng.choice(BAD_RATIOS))
        return Request("ratio", body, REFUSED)

    def _bad_budget(self) -> Request:
        budget = self._rng.choice(BAD_BUDGETS)
        return Request("budget", chat(self._clip, max_retained_video_tokens=budget), REFUSED)

    def _damaged(self) -> Request:
        data = bytearray(self._data)
        way = self._rng.randrange(4)
        if way == 0:
            del data[self._rng.randrange(len(data)) :]
        elif way == 1:
            for _ in range(self._rng.randrange(1, 200)):
                data[self._rng.randrange(len(data))] = self._rng.randrange(256)
        elif way == 2:
            data = bytearray(self._rng.randbytes(self._rng.randrange(1, 20000)))
        else:
            begin = self._rng.randrange(len(data))
            del data[begin : begin + self._rng.randrange(1, 2000)]
        return Request("damaged file", chat(video(bytes(data)), retention_ratio=0.25), EITHER)

    def _bad_url(self) -> Request:
        url = part("video_url", self._rng.choice(BAD_URLS))
        return Request("url", chat(url, retention_ratio=0.25), REFUSED)

    def _bad_body(self) -> Request:
        return Request("body", self._rng.choice(BAD_BODIES), REFUSED)

    def _other_size(self) -> Request:
        clip = self._rng.choice(self._others)
        return Request(
            "other size", chat(clip, retention_ratio=self._rng.uniform(0.05, 1)), ANSWERED
        )

    def _auto(self) -> Request:
        return Request("auto", chat(self._clip, retention_ratio="auto"), ANSWERED)

    def _hang_up(self) -> Request:
        stream = self._rng.random() < 0.5
        return Request("hang up", chat(self._clip, retention_ratio=0.25, stream=stream), GONE)
