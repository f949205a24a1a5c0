"""LiteLLM's gateway as ``deploy/litellm`` sets it up, in front of a real server.

It needs LiteLLM's command on the path, or its path in ``LITELLM``, of an environment with
``deploy/litellm/requirements.txt``: its packages are not those of vLLM.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
import yaml  # type: ignore[import-untyped]

from bench.clients import by_openai, messages_of
from scissor_vllm import num_retained_tokens
from scissor_vllm.loadtest.process import running_server
from tests.conftest import DEMO_CLIP_TOKENS
from tests.proxies import DEPLOY, ROOT, free_port
from tests.serving import SCISSOR, OneServer, message

FOLDER = DEPLOY / "litellm"
LITELLM = os.environ.get("LITELLM") or shutil.which("litellm")
CLIP = ROOT / "scissor_vllm" / "demo" / "clip.mp4"
KEYS = {"APP_KEY": "sk-of-the-app", "BATCH_KEY": "sk-of-the-batch"}
APP, BATCH = KEYS.values()
START_SECONDS = 180
RATIO, BUDGET = "retention_ratio", "max_retained_video_tokens"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(LITELLM is None, reason="LiteLLM's command is not installed"),
]


@pytest.fixture(scope="module")
def gateway(servers: OneServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a gateway in front of the demo model's server."""
    server = servers.get(*SCISSOR, "demo")
    port = free_port()
    environment = {
        **KEYS,
        # Of another environment.
        "PYTHONPATH": "",
        "SCISSOR_URL": f"http://127.0.0.1:{server.port}/v1",
        "SCISSOR_API_KEY": "x",
        "SCISSOR_MODEL": "hosted_vllm/demo",
        "LITELLM_MASTER_KEY": f"sk-{os.urandom(32).hex()}",
    }
    assert LITELLM is not None
    with running_server(
        "the gateway",
        [LITELLM, "--config", "config.yaml"],
        folder=FOLDER,
        port=port,
        log=tmp_path_factory.mktemp("gateway") / "log",
        timeout_seconds=START_SECONDS,
        environment=environment,
        health_path="/health/liveliness",
    ) as url:
        yield url


def client_of(gateway: str, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{gateway}/v1", api_key=key, max_retries=0, timeout=120)


def ask(gateway: str, key: str, alias: str, max_tokens: int = 4, **fields: Any) -> Any:
    messages = [message(CLIP, "what digit does the sign show ?")]
    options = {"messages": messages, "max_tokens": max_tokens}
    chat: Any = client_of(gateway, key).chat.completions.create
    return chat(model=alias, extra_body=fields, **options)


@pytest.mark.parametrize(
    ("key", "alias", "sent", "in_force"),
    [
        # An alias's default, and a request's own ratio.
        (BATCH, "video-fast", None, 0.1),
        (BATCH, "video-fast", 0.02, 0.02),
        # A key's default, and ratios from its floor on.
        (APP, "video", None, 0.35),
        (APP, "video-fast", None, 0.35),
        (APP, "video", 0.25, 0.25),
        (APP, "video", 1.0, 1.0),
        # The alias's floor is higher.
        (APP, "video-exact", None, 0.5),
        (APP, "video-exact", 0.6, 0.6),
    ],
)
def test_defaults_are_those_of_the_key_and_of_the_alias(
    gateway: str, key: str, alias: str, sent: float | None, in_force: float
) -> None:
    fields: dict[str, Any] = {} if sent is None else {RATIO: sent}
    answer = ask(gateway, key, alias, **fields)
    assert answer.video_compression == {
        RATIO: in_force,
        "num_video_tokens": DEMO_CLIP_TOKENS,
        "num_retained_video_tokens": num_retained_tokens(DEMO_CLIP_TOKENS, in_force),
    }


@pytest.mark.parametrize(
    ("key", "alias", "fields", "told"),
    [
        (APP, "video", {RATIO: 0.2}, "at least 0.25 for this key and model, got 0.2"),
        (APP, "video-exact", {RATIO: 0.3}, "at least 0.5 for this key and model, got 0.3"),
        (APP, "video", {RATIO: "auto"}, "must be a number of at least 0.25"),
        (APP, "video", {RATIO: True}, "must be a number of at least 0.25"),
        (APP, "video", {BUDGET: 5}, "must be absent for this key and model"),
        (APP, "video", {"extra_body": {RATIO: 0.01}}, "send retention_ratio beside messages"),
        # What the server refuses reaches the client.
        (BATCH, "video-fast", {RATIO: 0.001}, "must be at least 0.01"),
        (BATCH, "video-fast", {"compress_images": True, RATIO: 2}, "at most 1"),
    ],
)
def test_below_the_floor_of_key_or_alias_a_request_is_refused(
    gateway: str, key: str, alias: str, fields: dict[str, Any], told: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=told):
        ask(gateway, key, alias, **fields)


def test_a_key_has_its_models_alone(gateway: str) -> None:
    fallback: dict[str, Any] = {"fallbacks": ["video"]}
    with pytest.raises(openai.PermissionDeniedError, match="not available for this API key"):
        ask(gateway, BATCH, "video")
    with pytest.raises(openai.PermissionDeniedError, match="not available for this API key"):
        ask(gateway, BATCH, "video-fast", **fallback)
    with pytest.raises(openai.AuthenticationError):
        ask(gateway, "sk-of-nobody", "video")
    assert [model.id for model in client_of(gateway, BATCH).models.list()] == ["video-fast"]
    assert len(list(client_of(gateway, APP).models.list())) == 3


def test_a_key_has_so_many_requests_in_flight_without_a_database(gateway: str) -> None:
    (entry,) = (e for e in yaml.safe_load((FOLDER / "keys.yaml").read_text()) if "models" in e)
    limit = entry["max_parallel_requests"]

    def status(number: int) -> int:
        try:
            ask(gateway, BATCH, "video-fast", 400 + number, ignore_eos=True)
        except openai.APIStatusError as error:
            return error.status_code
        return 200

    with ThreadPoolExecutor(2 * limit) as pool:
        statuses = list(pool.map(status, range(2 * limit)))
    assert sorted(statuses) == [200] * limit + [429] * limit
    assert status(0) == 200


def test_a_stream_passes_event_by_event_and_ends_with_the_counts(gateway: str) -> None:
    chat: Any = client_of(gateway, APP).chat.completions.with_raw_response.create
    raw = chat(
        model="video",
        messages=[message(CLIP, "go on")],
        max_tokens=300,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    chunks = [(time.monotonic(), chunk) for chunk in raw.parse()]
    assert len(chunks) > 100
    (first, _), (end, last) = chunks[0], chunks[-1]
    # Buffered, they would all come at the end.
    assert end - first > 0.3
    assert last.usage.completion_tokens == 300
    assert raw.headers["x-video-retention-ratio"] == "0.35"


def test_what_clients_read_through_the_gateway_is_what_the_docs_say(gateway: str) -> None:
    rows = by_openai(f"{gateway}/v1", APP, "video-fast", messages_of(CLIP), "the gateway")
    page = (ROOT / "docs" / "operating.md").read_text()
    documented = re.findall(
        r"^\| openai for Python through litellm's gateway, (\w+) \| (\w+) \| (.*?) \|$", page, re.M
    )
    own_names = {"`x-retained-video-tokens`": "yes, under their own names"}
    assert documented == [
        (
            row["client"].rpartition(" ")[2],
            row["field in the answer"],
            own_names.get(row["header"], row["header"]),
        )
        for row in rows
    ]
    assert all(row["ratio arrived"] == "true" for row in rows)


def test_the_pinned_version_is_the_one_of_the_docs() -> None:
    (version,) = re.findall(r"litellm\[proxy\]==(\S+)", (FOLDER / "requirements.txt").read_text())
    assert f"litellm {version}" in (ROOT / "docs" / "operating.md").read_text()
