"""A cell of the sweep and its requests."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from scissor_vllm.loadtest.clips import Clip
from scissor_vllm.retention import AUTO, RETENTION_RATIO, parse_retention_ratio

STOCK = "stock"
"""Used instead of a ratio for requests without ``retention_ratio``, as for stock vLLM."""


@dataclass(frozen=True)
class Cell:
    """One combination of ratios, concurrency and request rate."""

    retention_ratios: tuple[float | str, ...]
    """What each request draws its ratio from, ``auto`` among them; none: requests carry no ratio.
    """
    max_concurrency: int | None
    """Most requests in flight; None: no limit."""
    request_rate: float | None
    """Requests per second with Poisson arrivals; None: each is sent as soon as the limit allows."""

    @property
    def ratio_name(self) -> str:
        """The ratios as the command line takes them."""
        return ratio_name(self.retention_ratios)

    @property
    def name(self) -> str:
        """A short description."""
        parts = [f"ratio {self.ratio_name}"]
        if self.max_concurrency is not None:
            parts.append(f"concurrency {self.max_concurrency}")
        if self.request_rate is not None:
            parts.append(f"{self.request_rate:g} requests/s")
        return ", ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """Return the values by their names in a result file."""
        return {
            "retention_ratios": list(self.retention_ratios),
            "max_concurrency": self.max_concurrency,
            "request_rate_per_second": self.request_rate,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Cell:
        """Return the cell of `as_dict`."""
        return cls(
            tuple(values["retention_ratios"]),
            values["max_concurrency"],
            values["request_rate_per_second"],
        )


def ratio_name(ratios: Sequence[float | str]) -> str:
    """Return ``stock``, a ratio, or ratios with commas."""
    return ",".join(map(str, ratios)) or STOCK


def parse_ratios(text: str) -> tuple[float | str, ...]:
    """Return the ratios of one cell: ``stock``, ``auto``, ``0.25``, or ``1.0,0.5,0.1`` for a mix.

    Raises:
        ValueError: a part is not a ratio.
    """
    if text == STOCK:
        return ()
    return tuple(AUTO if part == AUTO else parse_retention_ratio(part) for part in text.split(","))


def cells(
    ratios: Sequence[tuple[float | str, ...]],
    concurrencies: Sequence[int | None],
    request_rates: Sequence[float | None],
) -> list[Cell]:
    """Return all combinations, ratios running fastest, each once."""
    combinations = product(request_rates, concurrencies, ratios)
    return list(dict.fromkeys(Cell(ratio, n, rate) for rate, n, ratio in combinations))


def draw_ratios(cell: Cell, num_requests: int, seed: int) -> list[float | str | None]:
    """Return the ratio of each request: the same for the same cell and seed."""
    if not cell.retention_ratios:
        return [None] * num_requests
    rng = random.Random(f"{seed} {cell.name}")
    return [rng.choice(cell.retention_ratios) for _ in range(num_requests)]


@dataclass(frozen=True)
class VideoRequest:
    """One request to send."""

    clip: Clip
    retention_ratio: float | str | None

    def messages(self, question: str) -> list[dict[str, Any]]:
        """Return the chat: the video, then the question."""
        content = [
            {"type": "video_url", "video_url": {"url": self.clip.data_url()}},
            {"type": "text", "text": question},
        ]
        return [{"role": "user", "content": content}]

    def body(self) -> dict[str, Any]:
        """Return the fields of the body that differ by request."""
        return {} if self.retention_ratio is None else {RETENTION_RATIO: self.retention_ratio}


def build_requests(
    clips: Sequence[Clip], cell: Cell, *, num_prompts: int, num_warmups: int, seed: int
) -> tuple[list[VideoRequest], list[VideoRequest]]:
    """Return the warm-up requests and the measured requests.

    Every cell sends the same clips in the same order. Warm-ups have other clips if there are
    enough.
    """
    ratios = draw_ratios(cell, num_prompts + num_warmups, seed)
    chosen = [clips[number % len(clips)] for number in range(len(ratios))]
    requests = [VideoRequest(*pair) for pair in zip(chosen, ratios, strict=True)]
    return requests[num_prompts:], requests[:num_prompts]
