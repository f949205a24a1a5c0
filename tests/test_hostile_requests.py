"""The load of hostile requests notices every wrong answer, and memory that grows."""

from __future__ import annotations

import asyncio
import itertools
import json
import mmap
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from bench.hostile_requests.command import MAX_FILES_PER_HOUR, is_within
from bench.hostile_requests.load import MAX_WRONG, Load
from bench.hostile_requests.memory import MemorySampler, growth, sample
from bench.hostile_requests.traffic import (
    ANSWERED,
    ESTIMATE,
    GONE,
    KNOWN_EVERY,
    REFUSED,
    TOKENIZE,
    Offer,
    Request,
    Traffic,
)

NUM_REQUESTS = 200
SEED = 3
OFFER = Offer(has_auto=True, compresses_images=True)
Fault = Callable[[Request, int], httpx.Response | None]


def answer(request: Request, text: str = "nine") -> httpx.Response:
    """Return what a server that is right sends."""
    if request.outcome == REFUSED:
        return httpx.Response(400, json={"error": {"message": "refused"}})
    if request.path in (TOKENIZE, ESTIMATE):
        return httpx.Response(200, json={"count": 7})
    report = {"num_video_tokens": 10}
    if request.is_stream:
        chunks = [
            {"choices": [{"delta": {"content": text}}]},
            {"choices": [], "usage": {}, "video_compression": report},
        ]
        events = [*map(json.dumps, chunks), "[DONE]"]
        return httpx.Response(200, text="".join(f"data: {event}\n\n" for event in events))
    body = {"choices": [{"message": {"content": text}}], "video_compression": report}
    return httpx.Response(200, json=body)


def wrong_answers(
    folder: Path,
    fault: Fault = lambda request, number: None,
    *,
    health: int = 200,
    num_at_once: int = 0,
) -> list[str]:
    """Return what a load has against a server with a fault.

    Args:
        folder: for clips.
        fault: returns a response in place of the right one; takes the request, and how many such
            requests came before.
        health: status of ``/health``.
        num_at_once: requests of a burst.
    """
    drawn = Traffic(SEED, folder, OFFER)
    at_once = itertools.islice(drawn.draw_answerable(), num_at_once)
    load_of = itertools.islice(drawn.draw(), NUM_REQUESTS)
    requests = {(r.path, r.body): r for r in (*drawn.known, *at_once, *load_of)}
    counts = dict.fromkeys(requests, 0)

    def respond(sent: httpx.Request) -> httpx.Response:
        if sent.url.path == "/health":
            return httpx.Response(health)
        place = (sent.url.path, sent.content)
        counts[place] += 1
        return fault(requests[place], counts[place] - 1) or answer(requests[place])

    traffic = Traffic(SEED, folder, OFFER)
    load = Load("http://server", traffic, SEED, httpx.MockTransport(respond))
    asyncio.run(load.run(NUM_REQUESTS, 4, 0, num_at_once))
    num_sent = sum(sum(statuses.values()) for statuses in load.statuses.values())
    assert num_sent == NUM_REQUESTS or len(load.wrong) >= MAX_WRONG
    assert bool(load.burst) == bool(num_at_once)
    return load.wrong


def test_right_answers_are_not_wrong(tmp_path: Path) -> None:
    assert wrong_answers(tmp_path) == []
    assert wrong_answers(tmp_path, num_at_once=30) == []


def test_a_5xx_is_wrong_whatever_was_sent(tmp_path: Path) -> None:
    def fail(request: Request, number: int) -> httpx.Response | None:
        is_asked = request.outcome != GONE and (request.outcome == REFUSED or number > 0)
        return httpx.Response(500, text="oh") if is_asked else None

    kinds = {message.partition(":")[0] for message in wrong_answers(tmp_path, fail)}
    assert kinds >= {"ratio", "budget", "url", "body", "right"}


def test_an_answer_to_what_must_be_refused_is_wrong(tmp_path: Path) -> None:
    def take(request: Request, number: int) -> httpx.Response | None:
        is_taken = request.kind == "ratio"
        return answer(Request("", b"", ANSWERED)) if is_taken else None

    wrong = wrong_answers(tmp_path, take)
    assert wrong
    assert all(message.startswith("ratio: 200") for message in wrong)


@pytest.mark.parametrize("kind", ["right", "stream", "text", "run of images"])
def test_another_answer_than_that_of_the_quiet_server_is_wrong(tmp_path: Path, kind: str) -> None:
    def change(request: Request, number: int) -> httpx.Response | None:
        return answer(request, "eight") if request.kind == kind and number > 0 else None

    wrong = wrong_answers(tmp_path, change)
    assert wrong
    assert all(message.startswith(f"{kind}: ") for message in wrong)
    assert any("at the end" in message for message in wrong)


def test_a_connection_that_breaks_is_wrong(tmp_path: Path) -> None:
    def close(request: Request, number: int) -> httpx.Response | None:
        if request.kind == "other size":
            raise httpx.RemoteProtocolError("closed")
        return None

    wrong = wrong_answers(tmp_path, close)
    assert wrong
    assert all("RemoteProtocolError" in message for message in wrong)


def test_an_unhealthy_server_at_the_end_is_wrong(tmp_path: Path) -> None:
    assert wrong_answers(tmp_path, health=503) == ["/health is 503 at the end"]


@pytest.mark.parametrize(("status", "num_wrong"), [(503, 0), (429, 0), (500, 20), (502, 20)])
def test_in_a_burst_a_server_may_be_busy_and_no_more(
    tmp_path: Path, status: int, num_wrong: int
) -> None:
    left = 20

    def refuse(request: Request, number: int) -> httpx.Response | None:
        nonlocal left
        if request.kind != "other size" or left == 0:
            return None
        left -= 1
        return httpx.Response(status)

    # Every other request of a burst is of another size.
    assert len(wrong_answers(tmp_path, refuse, num_at_once=40)) == num_wrong


def test_every_so_manieth_request_is_one_with_a_known_answer(tmp_path: Path) -> None:
    traffic = Traffic(SEED, tmp_path, OFFER)
    drawn = list(itertools.islice(traffic.draw(), NUM_REQUESTS))
    again = Traffic(SEED, tmp_path, OFFER).draw()
    assert drawn == list(itertools.islice(again, NUM_REQUESTS))
    assert all(request in traffic.known for request in drawn[KNOWN_EVERY - 1 :: KNOWN_EVERY])
    plain = Traffic(SEED, tmp_path, Offer(has_auto=False, compresses_images=False))
    kinds = {request.kind for request in itertools.islice(plain.draw(), 1000)}
    assert not kinds & {"auto", "run of images"}


# Memory.


def samples_of(mib: Callable[[float], float], num_files: float = 50) -> list[dict[str, Any]]:
    """Return samples of 10 minutes, one in 5 seconds, of two processes."""
    return [
        {
            "seconds": seconds,
            "mib": 100 + mib(seconds),
            "num_files": int(num_files),
            "processes": {"a 1": 100.0, "b 2": mib(seconds)},
        }
        for seconds in range(0, 600, 5)
    ]


def test_what_fills_at_first_is_flat_and_what_goes_on_is_told_by_process() -> None:
    filled = growth(samples_of(lambda seconds: min(seconds * 5, 900)))
    assert filled is not None
    assert filled["mib_per_hour"] == 0
    assert is_within(filled, 1.0)
    leaks = growth(samples_of(lambda seconds: 500 + seconds / 10))
    assert leaks is not None
    assert leaks["mib_per_hour"] == pytest.approx(360)
    assert leaks["processes_mib_per_hour"] == {"a 1": 0.0, "b 2": pytest.approx(360)}
    assert not is_within(leaks, 100)
    assert not is_within({**filled, "files_per_hour": MAX_FILES_PER_HOUR + 1}, 100)
    assert growth(samples_of(lambda seconds: 1)[:3]) is None


def test_shared_pages_count_once_and_pages_of_files_do_not() -> None:
    size = 1 << 26
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    touched, goes_on = multiprocessing.Event(), multiprocessing.Event()
    before = sample(os.getpid())["mib"]
    with (
        mmap.mmap(-1, size) as shared,
        library.open("rb") as file,
        mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as mapped,
    ):
        shared[:] = mapped[:]

        def touch() -> None:
            sum(shared[::4096])
            touched.set()
            goes_on.wait()

        child = multiprocessing.get_context("fork").Process(target=touch)
        child.start()
        touched.wait()
        both = sample(os.getpid())
        goes_on.set()
        child.join()
    assert len(both["processes"]) > 1
    assert 60 < both["mib"] - before < 100


def test_the_sampler_sees_the_processes_of_a_process() -> None:
    with MemorySampler(os.getpid(), 0.05) as sampler:
        held = bytearray(os.urandom(1 << 26))
        while len(sampler.samples) < 3:
            pass
    assert len(held) == 1 << 26
    assert sampler.samples[-1]["mib"] > 64
    assert sampler.samples[-1]["num_files"] > 2
    with MemorySampler(None) as none:
        pass
    assert none.samples == []
