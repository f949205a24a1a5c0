"""The server's page asks, and shows what was kept; without its flag there is neither."""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import pkgutil
import re
import shutil
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI, HTTPException

from scissor_vllm import num_retained_tokens
from scissor_vllm.cli.options import add_page_options, apply_page_options
from scissor_vllm.demo.client import CLIP, QUESTION
from scissor_vllm.loadtest.process import free_port
from scissor_vllm.settings import (
    DEFAULT_RETENTION_RATIO,
    DEFAULT_VIDEO_COMPRESSION,
    RetentionPolicy,
)
from scissor_vllm.show import WORKER_EXTENSION
from scissor_vllm.show.command import look
from scissor_vllm.show.picture import Picture
from scissor_vllm.show.web import PICTURE_PATH, POLICY, attach_page, read_body, with_ratios
from scissor_vllm.show.worker import PictureWorker
from tests.browser import Page, open_page
from tests.conftest import PAGE_KEY
from tests.serving import Server, message, same_answer

KEY = PAGE_KEY
SCREENSHOT = Path(__file__).parent.parent / "build" / "web-page.png"
PAGE_FILES = Path(__file__).parent.parent / "scissor_vllm" / "show" / "page"


def get(server: Server, path: str) -> tuple[int, dict[str, str], str]:
    """Return status, headers by their name in lower case, and body."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}{path}", timeout=60) as got:
            return got.status, _headers(got), got.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, _headers(error), error.read().decode()


def _headers(answer: Any) -> dict[str, str]:
    return {name.lower(): value for name, value in answer.headers.items()}


def post_picture(server: Server, body: bytes, key: str | None = KEY) -> tuple[int, Any]:
    """Return status and content of a request for a picture."""
    headers = {"Content-Type": "application/json"}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.port}{PICTURE_PATH}", data=body, headers=headers
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def body_of(*parts: Path | str, ratio: object = 0.1) -> bytes:
    """Return a request for a picture."""
    return json.dumps(
        {"model": "demo", "messages": [message(*parts)], "retention_ratio": ratio}
    ).encode()


def rows_of(encoded: str) -> list[int]:
    return np.frombuffer(base64.b64decode(encoded), "<u2").tolist()


@pytest.fixture(scope="module")
def shown() -> Picture:
    """The clip by `scissor-vllm show`."""
    return look(CLIP, "demo", [0.25], DEFAULT_VIDEO_COMPRESSION, 32)


def test_without_the_flag_there_is_no_page_and_no_picture(server: Server) -> None:
    assert get(server, "/scissor")[0] == 404
    assert post_picture(server, body_of(CLIP, "?"))[0] == 404


def test_the_page_may_load_its_own_files_and_nothing_else(page_server: Server) -> None:
    for path in ("/scissor", "/scissor/style.css", "/scissor/picture.js", "/scissor/ask.js"):
        status, headers, _ = get(page_server, path)
        assert status == 200
        assert headers["content-security-policy"] == POLICY
        assert headers["x-content-type-options"] == "nosniff"
    assert "unsafe" not in POLICY
    assert POLICY.startswith("default-src 'none'")
    assert get(page_server, "/scissor/../worker.py")[0] == 404
    assert get(page_server, "/scissor/show.js")[0] == 404


def test_the_pages_slider_begins_at_the_servers_default_and_ends_at_its_minimum(
    page_server: Server,
) -> None:
    _, _, page = get(page_server, "/scissor")
    assert 'min="0.02" max="1"' in page
    assert f'value="{DEFAULT_RETENTION_RATIO}"' in page
    assert "{{" not in page


@pytest.mark.parametrize("policy", [RetentionPolicy(0.25, 0.05), RetentionPolicy(1.0, 0.001)])
def test_a_page_has_the_ratios_of_its_server(policy: RetentionPolicy) -> None:
    page = with_ratios((PAGE_FILES / "ask.html").read_text(), policy)
    (slider,) = re.findall(r'<input type="range" id="ratio"[^>]*>', page)
    attributes = {
        name: float(number) for name, number in re.findall(r'(min|max|value)="(.*?)"', slider)
    }
    assert attributes == {"min": policy.min_ratio, "max": 1.0, "value": policy.default_ratio}
    assert f'for="ratio">{policy.default_ratio}</output>' in page


def test_a_picture_is_what_show_draws(page_server: Server, shown: Picture) -> None:
    # At 0.1 two thresholds leave enough components, and rounding chooses between them.
    status, drawn = post_picture(page_server, body_of(CLIP, "What is this?", ratio=0.25))
    assert status == 200
    (ours,), (theirs,) = drawn["groupings"], shown.as_json()["groupings"]
    for name in ("num_retained", "method", "retention_ratio"):
        assert ours[name] == theirs[name]
    assert (drawn["rows"], drawn["columns"]) == (shown.rows, shown.columns)
    assert drawn["times"] == list(shown.times or ())
    assert len(drawn["frames"]) == len(shown.frames)
    # vLLM's tower and transformers' differ by float32's rounding.
    assert ours["similarity_threshold"] == pytest.approx(theirs["similarity_threshold"], abs=1e-3)
    pairs = zip(rows_of(ours["assignment"]), rows_of(theirs["assignment"]), strict=True)
    assert np.mean([left == right for left, right in pairs]) > 0.95


def test_at_one_every_token_is_its_own(page_server: Server) -> None:
    _, drawn = post_picture(page_server, body_of(CLIP, "?", ratio=1.0))
    (grouping,) = drawn["groupings"]
    num_tokens = len(drawn["frames"]) * drawn["rows"] * drawn["columns"]
    assert rows_of(grouping["assignment"]) == list(range(num_tokens))


def test_a_picture_after_an_answer_encodes_nothing_counts_as_no_request_and_changes_no_answer(
    page_server: Server, clips: dict[str, Path]
) -> None:
    before = page_server.ask(clips["long"], "What is this?", ratio=0.25)
    hits = page_server.counter("scissor_vllm:video_cache_hits_total", cache="features")
    requests = page_server.counter("scissor_vllm:video_requests_total")
    assert post_picture(page_server, body_of(clips["long"], "?", ratio=0.25))[0] == 200
    assert page_server.counter("scissor_vllm:video_requests_total") == requests
    assert page_server.counter("scissor_vllm:video_cache_hits_total", cache="features") == hits + 1
    after = page_server.ask(clips["long"], "What is this?", ratio=0.25)
    assert same_answer(before, after)


def test_a_picture_asks_for_the_key_of_the_api(page_server: Server) -> None:
    for key in (None, "wrong"):
        assert post_picture(page_server, body_of(CLIP, "?"), key=key)[0] == 401


@pytest.mark.parametrize(
    ("parts", "ratio", "complaint"),
    [
        ((CLIP, "?"), 0.01, "must be at least 0.02 on this server"),
        ((CLIP, "?"), 2, "retention_ratio must be a number above 0 and at most 1"),
        (("no video",), 0.1, "a picture is of one video, got 0"),
        ((CLIP, CLIP, "?"), 0.1, "a picture is of one video, got 2"),
    ],
)
def test_what_cannot_be_drawn_is_a_400_that_says_why(
    page_server: Server, parts: tuple[Path | str, ...], ratio: float, complaint: str
) -> None:
    status, text = post_picture(page_server, body_of(*parts, ratio=ratio))
    assert status == 400
    assert complaint in text


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"messages": 1}'])
def test_a_body_that_is_no_chat_is_a_400(page_server: Server, body: bytes) -> None:
    assert post_picture(page_server, body)[0] == 400


def test_a_file_that_is_no_video_is_a_400(page_server: Server, tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    status, text = post_picture(page_server, body_of(tmp_path / "text.mp4", "?"))
    assert status == 400
    assert "a video must be a whole file" in text


def test_one_picture_is_made_at_a_time_and_the_server_goes_on(page_server: Server) -> None:
    # There are two API servers: a request for a picture may come to the one that makes none.
    with socket.create_connection(("127.0.0.1", page_server.port), timeout=60) as slow:
        head = f"POST {PICTURE_PATH} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        slow.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        deadline = time.monotonic() + 30
        while (answer := post_picture(page_server, body_of(CLIP, "?")))[0] != 429:
            assert time.monotonic() < deadline
        assert "one picture is made at a time" in answer[1]
        assert get(page_server, "/health")[0] == 200
    deadline = time.monotonic() + 30
    while post_picture(page_server, body_of(CLIP, "?"))[0] == 429:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert post_picture(page_server, body_of(CLIP, "?"))[0] == 200


class SlowRequest:
    """A request whose body comes in parts."""

    def __init__(self, parts: list[bytes], seconds: float = 0) -> None:
        self.parts, self.seconds = parts, seconds

    async def stream(self) -> AsyncIterator[bytes]:
        for part in self.parts:
            await asyncio.sleep(self.seconds)
            yield part


def test_a_body_is_read_up_to_a_size_and_a_time() -> None:
    def read(request: Any, most: int = 4, seconds: float = 5) -> bytes:
        return asyncio.run(read_body(request, most, seconds))

    assert read(SlowRequest([b"ab", b"cd"])) == b"abcd"
    with pytest.raises(HTTPException, match="a body may have 4 bytes") as too_large:
        read(SlowRequest([b"ab", b"cd", b"e"]))
    assert too_large.value.status_code == 413
    with pytest.raises(HTTPException, match=r"within 0.01 s") as too_slow:
        read(SlowRequest([b"ab"], seconds=5), seconds=0.01)
    assert too_slow.value.status_code == 408


def parsed(*argv: str, extension: str = "") -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_page_options(parser)
    return parser.parse_args(argv, argparse.Namespace(worker_extension_cls=extension))


def test_the_workers_are_extended_for_the_page_alone() -> None:
    without, with_page = parsed(), parsed("--web-page")
    apply_page_options(without)
    apply_page_options(with_page)
    assert without.worker_extension_cls == ""
    assert with_page.worker_extension_cls == WORKER_EXTENSION
    assert pkgutil.resolve_name(WORKER_EXTENSION) is PictureWorker


def test_an_operators_own_extension_and_the_page_exclude_each_other() -> None:
    with pytest.raises(SystemExit, match=r"got my\.Extension: leave one of the two out"):
        apply_page_options(parsed("--web-page", extension="my.Extension"))


def test_every_field_of_the_page_has_a_label_and_nothing_comes_from_elsewhere() -> None:
    page = (PAGE_FILES / "ask.html").read_text()
    fields = re.findall(r'<(?:input|textarea)[^>]*\bid="(\w+)"', page)
    assert set(fields) == set(re.findall(r'<label for="(\w+)"', page))
    sources = re.findall(r'\b(?:src|href)="([^"]*)"', page)
    assert all(source.startswith("scissor/") for source in sources)
    for path in PAGE_FILES.iterdir():
        assert not re.search(r"https?://|@import|innerHTML|eval\(", path.read_text()), path


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """A page of a browser, nothing in it."""
    with open_page(tmp_path_factory.mktemp("browser"), width=1200, height=1400) as page:
        yield page


def ask(page: Page, ratio: str, num_rows: int) -> None:
    """Move the ratio by its script's own event, ask by the keyboard, wait for the picture."""
    page.focus("#ratio")
    page.evaluate(
        f"ratio.value = '{ratio}'; ratio.dispatchEvent(new Event('input', {{bubbles: true}}))"
    )
    page.focus("#ask")
    page.press("Enter")
    page.wait(
        f"(document.querySelectorAll('#table tr').length === {num_rows} && !running)"
        " || find('error').textContent !== ''"
    )
    assert page.text("#error") == ""


def test_in_a_browser_a_question_gets_an_answer_its_tokens_and_the_picture(
    browser: Page, page_server: Server, shown: Picture, tmp_path: Path
) -> None:
    browser.goto(f"http://127.0.0.1:{page_server.port}/scissor")
    browser.wait("!document.getElementById('key-field').hidden")
    assert "API key" in browser.text("#state")
    browser.focus("#key")
    browser.type(KEY)
    browser.focus("#ask")
    browser.press("Enter")
    assert browser.text("#error") == "Choose a video first."
    browser.choose_file("#video", CLIP)
    assert CLIP.name in browser.text("#video-help")
    browser.wait("document.getElementById('preview').readyState >= 1")
    browser.focus("#question")
    browser.evaluate("find('question').select()")
    browser.type(QUESTION)
    ask(browser, "0.25", 1)
    ask(browser, "0.1", 2)
    rows = browser.evaluate(
        "[...document.querySelectorAll('#table tr')].map(r => [...r.cells].map(c => c.innerText))"
    )
    num_tokens = shown.num_tokens
    for row, ratio in zip(rows, (0.1, 0.25), strict=True):
        assert float(row[0]) == ratio
        assert row[1] == f"{num_tokens} → {num_retained_tokens(num_tokens, ratio)}"
        assert int(row[2]) > num_retained_tokens(num_tokens, ratio)
        assert all(re.fullmatch(r"\d+ ms|\W", time) for time in row[3:5])
        assert row[5] == QUESTION
        assert row[6]
    about = browser.text("#picture [role=status]")
    assert f"K = {num_retained_tokens(num_tokens, 0.1)} kept" in about
    assert browser.evaluate("document.querySelectorAll('#picture canvas').length") == (
        len(shown.frames) + 1
    )
    # A refusal of the key is no fault of the page; nothing else may be complained about.
    assert [complaint for complaint in browser.complaints if "401" not in complaint] == []
    SCREENSHOT.parent.mkdir(exist_ok=True)
    browser.screenshot(SCREENSHOT)
    # What was asked about one video is not shown beside another.
    browser.choose_file("#video", Path(shutil.copy(CLIP, tmp_path / "another.mp4")))
    browser.wait("find('answers').hidden && find('what-was-kept').hidden")
    assert browser.evaluate("document.querySelectorAll('#table tr, #picture canvas').length") == 0


@pytest.fixture(scope="module")
def page_url() -> Iterator[str]:
    """The page's own routes without an engine, of a server with other ratios than the defaults."""
    app = FastAPI()
    app.state.retention_policy = RetentionPolicy(default_ratio=0.25, min_ratio=0.015)
    attach_page(app, lambda request, state: None)
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}/scissor"
    server.should_exit = True
    thread.join(timeout=30)


def test_in_a_browser_the_slider_gives_the_servers_ratios_and_short_ones_between(
    browser: Page, page_url: str
) -> None:
    browser.goto(page_url)
    assert browser.evaluate("chosenRatio()") == 0.25
    assert browser.text("#ratio-text") == "0.25"
    browser.focus("#ratio")
    browser.press("Home")
    assert browser.evaluate("chosenRatio()") == 0.015
    chosen = [0.015]
    for _ in range(20):
        browser.press("ArrowRight")
        assert len(browser.text("#ratio-text")) <= len("0.025")
        chosen.append(browser.evaluate("chosenRatio()"))
    assert chosen == sorted(set(chosen))
    browser.press("End")
    assert browser.evaluate("chosenRatio()") == 1


def test_in_a_browser_a_narrow_page_scrolls_down_only(browser: Page, page_url: str) -> None:
    browser.goto(page_url)
    browser.evaluate(
        "for (const hidden of document.querySelectorAll('[hidden]')) hidden.hidden = false;"
        "find('video-help').textContent = 'name'.repeat(50);"
        "find('answer').textContent = 'answer'.repeat(50);"
        "addRow('question'.repeat(50), {compression: null, usage: null, first: 1, whole: 2,"
        " text: 'answer'.repeat(50)})"
    )
    browser.set_width(320)
    assert browser.evaluate("document.documentElement.scrollWidth") <= 320
    browser.set_width(1200, 1400)


def test_in_a_browser_an_answer_and_its_picture_can_be_stopped(
    browser: Page, page_server: Server
) -> None:
    browser.goto(f"http://127.0.0.1:{page_server.port}/scissor")
    browser.wait("!document.getElementById('key-field').hidden")
    browser.focus("#key")
    browser.type(KEY)
    browser.choose_file("#video", CLIP)
    for shown, told in (("find('state')", "#error"), ("find('picture-state')", "#picture-state")):
        # Stopped as soon as it is shown, so that nothing can have come.
        browser.evaluate(
            "(async () => { const stop = new MutationObserver(() => find('stop').click());"
            f"stop.observe({shown}, {{childList: true}}); form.requestSubmit();"
            "while (running) await new Promise((resolve) => setTimeout(resolve, 10));"
            "stop.disconnect(); })()"
        )
        assert "topped." in browser.text(told)


def test_in_a_browser_the_servers_own_words_tell_what_is_wrong(
    browser: Page, page_server: Server, tmp_path: Path
) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    browser.goto(f"http://127.0.0.1:{page_server.port}/scissor")
    browser.wait("!document.getElementById('key-field').hidden")
    browser.focus("#key")
    browser.type(KEY)
    browser.choose_file("#video", tmp_path / "text.mp4")
    browser.focus("#ask")
    browser.press("Enter")
    browser.wait("find('error').textContent !== ''")
    assert "a video must be a whole file of MP4" in browser.text("#error")


def test_in_a_browser_every_control_is_reached_by_the_tab_key(
    browser: Page, page_server: Server
) -> None:
    browser.goto(f"http://127.0.0.1:{page_server.port}/scissor")
    browser.wait("!document.getElementById('key-field').hidden")
    browser.focus("#video")
    reached = []
    for _ in range(6):
        browser.press("Tab")
        reached.append(browser.evaluate("document.activeElement.id"))
    assert reached == ["question", "ratio", "budget", "most", "key", "ask"]


def test_a_picture_of_a_video_of_patches_is_what_show_draws(
    qwen: Server, qwen_folder: Path
) -> None:
    status, drawn = post_picture(qwen, body_of(CLIP, "?"))
    assert status == 200
    shown = json.loads(
        json.dumps(look(CLIP, str(qwen_folder), [0.1], DEFAULT_VIDEO_COMPRESSION, 32).as_json())
    )
    (ours,), (theirs,) = drawn["groupings"], shown["groupings"]
    for name in ("rows", "columns", "times", "width", "height"):
        assert drawn[name] == shown[name]
    assert len(drawn["frames"]) == len(shown["frames"])
    assert ours["num_retained"] == theirs["num_retained"]
    pairs = zip(rows_of(ours["assignment"]), rows_of(theirs["assignment"]), strict=True)
    assert np.mean([left == right for left, right in pairs]) > 0.95
