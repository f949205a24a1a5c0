"""Our routes among vLLM's own, with its handlers replaced: what is asked, refused and answered."""

from __future__ import annotations

import asyncio
import json
import time
import weakref
from argparse import Namespace
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from http import HTTPStatus
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI, Request
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from pydantic import BaseModel
from vllm.config import ParallelConfig
from vllm.entrypoints.openai.chat_completion.protocol import (
    BatchChatCompletionRequest,
    ChatCompletionRequest,
    ChatCompletionResponse,
)
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelList
from vllm.entrypoints.serve.tokenize.protocol import TokenizeChatRequest
from vllm.multimodal.parse import VideoProcessorItems

from scissor_vllm.cpus import num_own_cpus
from scissor_vllm.frontend import chat
from scissor_vllm.frontend.endpoint import RetentionEndpoint
from scissor_vllm.frontend.estimate import EstimateReport, EstimateRequest, estimate
from scissor_vllm.frontend.guard import misspelt_field
from scissor_vllm.frontend.processor import RetentionProcessor
from scissor_vllm.frontend.request import RetentionChatCompletionRequest
from scissor_vllm.models import IMAGE_RUN_MODELS
from scissor_vllm.retention import RetentionReport
from scissor_vllm.settings import DEFAULT_VIDEO_COMPRESSION

CHAT, TOKENIZE = "/v1/chat/completions", "/tokenize"
ESTIMATE = "/v1/scissor/estimate"
TEXT = [{"role": "user", "content": "Hello"}]
URL = {"url": "data:video/mp4;base64,AAAA"}
VIDEO = [{"role": "user", "content": [{"type": "video_url", "video_url": URL}]}]
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
IMAGES = [{"role": "user", "content": [IMAGE] * 5}]
UNTYPED = [{"role": "user", "content": [{"video_url": URL}]}]

ANSWER = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": 'a {"b": "}"} é'},
            "finish_reason": "stop",
        }
    ],
    "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
}
CHUNKS = (
    'data: {"id":"1","choices":[{"index":0,"delta":{"content":"\\"choices\\":[]"}}]}\n\n',
    'data: {"id":"1","choices":[],"usage":{"prompt_tokens":1,"total_tokens":2}}\n\n',
    "data: [DONE]\n\n",
)
COMPRESSED = {"retention_ratio": 0.1, "num_video_tokens": 100, "num_retained_video_tokens": 10}


class Handler:
    """In place of vLLM's: keeps what it is asked and fills the report as a processor does."""

    def __init__(self) -> None:
        self.requests: list[Any] = []

    async def create_chat_completion(self, request: Any, raw_request: Any) -> Any:
        self.requests.append(request)
        self._process(request)
        if not request.stream:
            return ChatCompletionResponse(**ANSWER)
        return self._stream()

    async def create_tokenize(self, request: Any, raw_request: Any) -> Any:
        self.requests.append(request)
        if isinstance(request, EstimateRequest):
            return create_error_response("no such model", "NotFoundError", HTTPStatus.NOT_FOUND)
        raise ValueError("handled")

    async def show_available_models(self) -> ModelList:
        return ModelList(data=[ModelCard(id="m"), ModelCard(id="adapter", parent="m")])

    async def _stream(self) -> AsyncIterator[str]:
        for chunk in CHUNKS:
            yield chunk

    @staticmethod
    def _process(request: Any) -> None:
        kwargs = request.build_chat_params(None, "auto").media_io_kwargs or {}
        report = kwargs.get("retention", {}).get("retention_report")
        if isinstance(report, RetentionReport):
            report.add(0.1, 100, 10)


def build(monkeypatch: pytest.MonkeyPatch) -> FastAPI:
    """Return vLLM's app of a server that generates, with our plugin."""
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    monkeypatch.setenv("VLLM_PLUGINS", "scissor_vllm")
    args = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    app = build_app(args, ("generate",), None)
    app.state.enable_server_load_tracking = False
    return app


def init(
    app: FastAPI,
    engine: Any = None,
    *,
    compresses: bool = True,
    num_api_servers: int = 1,
    **settings: object,
) -> Handler:
    """Give the app the state of a server with these settings, and return its handler."""
    state = app.state
    state.vllm_config = Namespace(
        model_config=Namespace(multimodal_config=Namespace(mm_processor_kwargs=settings)),
        parallel_config=ParallelConfig(_api_process_count=num_api_servers),
        observability_config=Namespace(otlp_traces_endpoint=None),
    )
    kind: Any = RetentionProcessor
    processor = kind.__new__(kind) if compresses else None
    state.online_renderer = Namespace(renderer=Namespace(mm_processor=processor))
    state.openai_serving_chat = handler = Handler()
    state.serving_tokenization = state.openai_serving_models = handler
    if engine is not None:
        engine.shutdown = lambda timeout=None: None
    asyncio.run(RetentionEndpoint().init_state(engine, state, state.args))
    return handler


@pytest.fixture(scope="module")
def app() -> Iterator[FastAPI]:
    """The app, built once."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(RetentionProcessor, "__abstractmethods__", frozenset())
        yield build(monkeypatch)


@pytest.fixture
def handler(app: FastAPI) -> Handler:
    return init(app)


@pytest.fixture
def client(app: FastAPI, handler: Handler) -> TestClient:
    return TestClient(app, raise_server_exceptions=False)


def ask(client: TestClient, messages: Any, path: str = CHAT, **fields: Any) -> Any:
    return client.post(path, json={"model": "m", "messages": messages, **fields})


def error_of(response: Any) -> str:
    assert response.status_code == 400, response.text
    message: str = response.json()["error"]["message"]
    assert "\n" not in message
    assert "validation error" not in message
    return message


# Who asks nothing.


def test_a_chat_with_neither_video_nor_ratio_goes_to_vllm_as_it_is(
    client: TestClient, handler: Handler, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("check_request", "_answer_video", "tell_compression"):
        monkeypatch.setattr(chat, name, None)
    response = ask(client, TEXT)
    assert response.json() == ChatCompletionResponse(**ANSWER).model_dump()
    assert handler.requests[0].build_chat_params(None, "auto").media_io_kwargs is None
    streamed = ask(client, TEXT, stream=True)
    assert streamed.text == "".join(CHUNKS)


def test_a_ratio_without_a_video_is_checked_and_goes_no_further(
    client: TestClient, handler: Handler
) -> None:
    assert ask(client, TEXT, retention_ratio=0.5).status_code == 200
    assert handler.requests[0].build_chat_params(None, "auto").media_io_kwargs is None
    assert "above 0" in error_of(ask(client, TEXT, retention_ratio=0))


# What a video's answer has.


@pytest.mark.parametrize("messages", [VIDEO, UNTYPED])
@pytest.mark.parametrize("ratio", [None, 0.1])
def test_an_answer_about_a_video_tells_what_was_kept(
    client: TestClient, messages: Any, ratio: float | None
) -> None:
    expected = {**ChatCompletionResponse(**ANSWER).model_dump(), "video_compression": COMPRESSED}
    assert ask(client, messages, retention_ratio=ratio).json() == expected


def test_a_streams_last_chunk_with_usage_tells_what_was_kept(client: TestClient) -> None:
    events = ask(client, VIDEO, stream=True).text.split("\n\n")
    assert [event + "\n\n" for event in events[:1]] == [CHUNKS[0]]
    last = json.loads(events[1].removeprefix("data: "))
    assert last == {**json.loads(CHUNKS[1].removeprefix("data: ")), "video_compression": COMPRESSED}
    assert events[2:] == ["data: [DONE]", ""]


HEADERS = {
    "x-video-retention-ratio": "0.1",
    "x-video-tokens": "100",
    "x-retained-video-tokens": "10",
}


@pytest.mark.parametrize("stream", [False, True])
def test_headers_of_an_answer_about_a_video_tell_what_was_kept(
    client: TestClient, stream: bool
) -> None:
    told = ask(client, VIDEO, stream=stream).headers
    assert {name: told[name] for name in HEADERS} == HEADERS
    assert told["access-control-expose-headers"].split(", ") == list(HEADERS)
    wrong: dict[str, Any] = {"retention_ratio": 2}
    for messages, fields in ((TEXT, {}), (VIDEO, wrong)):
        told = ask(client, messages, stream=stream, **fields).headers
        assert not HEADERS.keys() & told.keys()


def test_openapi_describes_what_an_answer_about_a_video_has(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    answered = document["paths"][CHAT]["post"]["responses"]["200"]
    assert answered["headers"].keys() == HEADERS.keys()
    assert answered["content"].keys() == {"application/json", "text/event-stream"}
    name = answered["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
    schemas = document["components"]["schemas"]
    assert "VideoCompressionReport" in str(schemas[name]["properties"]["video_compression"])
    assert schemas["VideoCompressionReport"]["properties"].keys() >= COMPRESSED.keys()


# What is refused.

WRONG: list[Any] = [0, -1, 1.01, 2, "half", "0.5", True, [0.5], {"a": 1}, 10**40, "x" * 9999]


@pytest.mark.parametrize("ratio", WRONG, ids=lambda value: str(value)[:8])
@pytest.mark.parametrize("path", [CHAT, TOKENIZE, ESTIMATE])
@pytest.mark.parametrize("messages", [TEXT, VIDEO], ids=["text", "video"])
def test_a_ratio_that_is_none_is_refused_in_one_short_sentence(
    client: TestClient, handler: Handler, path: str, messages: Any, ratio: Any
) -> None:
    message = error_of(ask(client, messages, path, retention_ratio=ratio))
    assert message.startswith("retention_ratio must be ")
    assert "got " in message
    assert len(message) < 300
    assert not handler.requests


@pytest.mark.parametrize(
    "budget",
    [0, -1, 1.5, 2.0, "9", True, [9], {}, -(10**40), 10**40],
    ids=lambda value: str(value)[:8],
)
@pytest.mark.parametrize("path", [CHAT, TOKENIZE, ESTIMATE])
@pytest.mark.parametrize("messages", [TEXT, VIDEO], ids=["text", "video"])
def test_a_budget_that_is_none_is_refused_in_one_short_sentence(
    client: TestClient, handler: Handler, path: str, messages: Any, budget: Any
) -> None:
    message = error_of(ask(client, messages, path, max_retained_video_tokens=budget))
    assert message.startswith("max_retained_video_tokens must be ")
    assert "got " in message
    assert len(message) < 300
    assert not handler.requests


@pytest.mark.parametrize(
    "value", [0, 1, "true", "yes", [], [True], {"images": True}], ids=lambda value: str(value)[:8]
)
@pytest.mark.parametrize("path", [CHAT, TOKENIZE, ESTIMATE])
def test_compress_images_is_true_or_false(
    app: FastAPI, client: TestClient, path: str, value: Any
) -> None:
    handler = init(app, allow_compress_images=True)
    for messages in (TEXT, IMAGES):
        message = error_of(ask(client, messages, path, compress_images=value))
        assert message.startswith("compress_images must be true or false, got ")
    assert not handler.requests


@pytest.mark.parametrize("path", [CHAT, TOKENIZE, ESTIMATE])
def test_compress_images_is_refused_where_the_operator_does_not_allow_it(
    app: FastAPI, client: TestClient, path: str
) -> None:
    handler = init(app)
    app.state.online_renderer.renderer.mm_processor.info = Namespace(
        get_num_frames_of_image=lambda: 1
    )
    for messages in (TEXT, IMAGES, VIDEO):
        message = error_of(ask(client, messages, path, compress_images=True))
        assert message.startswith("compress_images must be false or absent on this server")
        assert "have the operator set --allow-compress-images" in message
    assert not handler.requests


@pytest.mark.parametrize("compresses", [True, False])
@pytest.mark.parametrize("path", [CHAT, TOKENIZE, ESTIMATE])
def test_compress_images_is_refused_for_a_model_whose_images_are_no_frames(
    app: FastAPI, client: TestClient, path: str, compresses: bool
) -> None:
    init(app, compresses=compresses)
    if compresses:
        app.state.online_renderer.renderer.mm_processor.info = Namespace(
            get_num_frames_of_image=lambda: 0
        )
    message = error_of(ask(client, IMAGES, path, compress_images=True))
    assert message.startswith("compress_images must be false or absent for this model")
    for model in IMAGE_RUN_MODELS:
        assert model in message
    assert "send the frames as a video" in message


@pytest.mark.parametrize("value", [None, False, True])
def test_without_images_and_without_true_a_chat_goes_to_vllm_as_it_is(
    app: FastAPI, client: TestClient, value: Any
) -> None:
    handler = init(app, allow_compress_images=True)
    messages = TEXT if value is True else IMAGES
    response = ask(client, messages, compress_images=value)
    assert response.json() == ChatCompletionResponse(**ANSWER).model_dump()
    (request,) = handler.requests
    assert request.messages == messages
    assert request.build_chat_params(None, "auto").media_io_kwargs is None


def test_a_chat_whose_images_are_compressed_tells_what_was_kept(
    app: FastAPI, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def compress_images(request: Any, state: Any) -> None:
        request.use_loaded({"name": "a video"})

    init(app, allow_compress_images=True)
    monkeypatch.setattr(chat, "compress_images", compress_images)
    answer = ask(client, IMAGES, compress_images=True)
    assert answer.json()["video_compression"] == COMPRESSED
    assert {name: answer.headers[name] for name in HEADERS} == HEADERS


def assert_ends_with_its_client(
    app: FastAPI, call: Callable[[Any, Any], Coroutine[Any, Any, None]]
) -> None:
    """Assert that a route's work is cancelled when its client hangs up.

    Args:
        app: with the routes.
        call: calls the route; takes work without end, and the request of a client that has hung up.
    """

    async def run() -> None:
        ended = asyncio.Event()

        async def work(request: Any, state: Any) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()

        async def receive() -> dict[str, str]:
            return {"type": "http.disconnect"}

        raw_request = Request({"type": "http", "app": app, "headers": []}, receive)
        await asyncio.wait_for(call(work, raw_request), 5)
        await asyncio.wait_for(ended.wait(), 5)

    asyncio.run(run())


@pytest.mark.parametrize("stream", [False, True])
def test_images_are_fetched_no_longer_than_their_client_waits(
    app: FastAPI, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    async def call(compress_images: Any, raw_request: Any) -> None:
        monkeypatch.setattr(chat, "compress_images", compress_images)
        body = {"model": "m", "messages": IMAGES, "compress_images": True, "stream": stream}
        request = RetentionChatCompletionRequest.model_validate(body)
        assert await chat.create_chat_completion(request, raw_request) is None

    handler = init(app, allow_compress_images=True)
    assert_ends_with_its_client(app, call)
    assert not handler.requests


@pytest.mark.parametrize("path", [CHAT, TOKENIZE, ESTIMATE])
def test_auto_is_refused_with_the_options_that_offer_it(client: TestClient, path: str) -> None:
    message = error_of(ask(client, VIDEO, path, retention_ratio="auto"))
    assert "--auto-retention-ratio and --target-ttft-ms" in message


class Statistics:
    """In place of an engine's client: what an API server knows of its engine."""

    def __init__(self) -> None:
        self.output_processor = Namespace(request_states={})
        self.logger_manager: Any = Namespace(stat_loggers=[])


AUTO: dict[str, Any] = {"auto_retention_ratio": "0.1:0.8", "target_ttft_ms": 500}


def test_auto_has_the_processor_ask_the_server(app: FastAPI, client: TestClient) -> None:
    engine = Statistics()
    cases: list[tuple[dict[str, Any], Any]] = [({"retention_ratio": "auto"}, 1.0), ({}, "auto")]
    for fields, default in cases:
        handler = init(app, engine, retention_ratio=default, **AUTO)
        assert ask(client, VIDEO, **fields).status_code == 200
        kwargs = handler.requests[0].build_chat_params(None, "auto").media_io_kwargs
        assert kwargs["retention"]["auto"]([100], 0.0, 1.0) == 0.8
        assert kwargs["retention"]["auto"]([100], 0.0, 0.4) == 0.35
    (_, first_tokens) = engine.logger_manager.stat_loggers
    waiting = [Namespace(prompt_len=1000, is_prefilling=True) for _ in range(500)]
    done = Namespace(prompt_len=10**9, is_prefilling=False)
    engine.output_processor.request_states.update(enumerate([*waiting, done]))
    stats = Namespace(time_to_first_tokens_iter=[3.0, 3.0], num_prompt_tokens=2000)
    for _ in range(5):
        first_tokens.record(None, stats)
        time.sleep(0.01)
    assert kwargs["retention"]["auto"]([100], 0.0, 1.0) == 0.1


@pytest.mark.parametrize(("size", "expected"), [(4096, 4096), (0, None), (None, None)])
def test_the_processor_is_told_what_the_engine_takes(
    app: FastAPI, client: TestClient, size: int | None, expected: int | None
) -> None:
    engine: Any = Namespace()
    if size is not None:
        engine.input_processor = Namespace(mm_encoder_cache_size=size)
    handler = init(app, engine)
    assert ask(client, VIDEO).status_code == 200
    kwargs = handler.requests[0].build_chat_params(None, "auto").media_io_kwargs
    assert kwargs["retention"]["retention_report"].max_engine_tokens == expected


def test_auto_without_the_engines_statistics_ends_the_start(app: FastAPI) -> None:
    engine = Statistics()
    engine.logger_manager = None
    with pytest.raises(ValueError, match="leave --disable-log-stats out"):
        init(app, engine, **AUTO)


@pytest.mark.parametrize("text", ["NaN", "Infinity", "1e999"])
def test_a_ratio_that_is_no_finite_number_is_refused(client: TestClient, text: str) -> None:
    body = json.dumps({"model": "m", "messages": TEXT, "retention_ratio": 7}).replace("7", text)
    headers = {"content-type": "application/json"}
    assert "above 0" in error_of(client.post(CHAT, content=body, headers=headers))


@pytest.mark.parametrize(
    ("name", "right"),
    [
        *(
            (name, "retention_ratio")
            for name in (
                "retention_ration",
                "retention-ratio",
                "retentionRatio",
                "Retention_Ratio",
                "retention",
            )
        ),
        *(
            (name, "max_retained_video_tokens")
            for name in (
                "max_retained_tokens",
                "maxRetainedVideoTokens",
                "max_video_tokens",
                "retained_video_tokens",
                "max-retained-video-tokens",
            )
        ),
        *(
            (name, "compress_images")
            for name in ("compress_image", "compressImages", "compress-images")
        ),
    ],
)
def test_a_field_that_is_nearly_one_of_ours_is_refused_by_its_name(
    client: TestClient, name: str, right: str
) -> None:
    for path in (CHAT, TOKENIZE, ESTIMATE, "/v1/chat/completions/batch"):
        message = error_of(ask(client, VIDEO, path, **{name: 0.5}))
        assert message.startswith(f"{name} is not a field")
        assert f"send {right}" in message
    nested = error_of(ask(client, VIDEO, extra_body={name: 0.5, "top_k": 1}))
    assert nested.startswith("extra_body is not a field")


MODELS: list[type[BaseModel]] = [
    BatchChatCompletionRequest,
    ChatCompletionRequest,
    CompletionRequest,
    ResponsesRequest,
    TokenizeChatRequest,
]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_no_field_of_vllms_is_taken_for_one_of_ours(model: type[BaseModel]) -> None:
    fields = dict.fromkeys([*model.model_fields, "my_note", "ratio", "trace_id", "aspect_ratio"])
    assert misspelt_field(fields) is None


def test_no_long_name_of_a_client_is_remembered() -> None:
    class Name(str):
        """A string that tells when it is gone."""

    gone: list[None] = []
    long = Name("retention" * 10_000)
    weakref.finalize(long, gone.append, None)
    assert misspelt_field({long: 0.5}) is None
    del long
    assert gone


def test_no_route_ignores_a_ratio(app: FastAPI, client: TestClient) -> None:
    paths = {
        route.path
        for route in app.routes
        if isinstance(route, APIRoute) and "POST" in route.methods
    }
    expected = {"/v1/chat/completions/batch", "/v1/chat/completions/render", "/invocations"}
    assert expected | {"/v1/responses", "/v1/messages", "/v1/completions"} <= paths
    for path in paths - {CHAT, TOKENIZE, ESTIMATE}:
        for field, value in (
            ("retention_ratio", 0.5),
            ("max_retained_video_tokens", 9),
            ("compress_images", True),
        ):
            message = error_of(ask(client, VIDEO, path, **dict[str, Any]({field: value})))
            assert message.startswith(f"{field} is refused: this route"), path
            assert "send the request to /v1/chat/completions" in message
        # None is no ratio.
        response = ask(client, VIDEO, path, retention_ratio=None)
        assert "retention_ratio is refused" not in response.text, path


def test_on_a_model_whose_videos_are_not_compressed_a_ratio_is_refused(
    app: FastAPI, client: TestClient
) -> None:
    handler = init(app, compresses=False)
    for messages in (VIDEO, UNTYPED):
        message = error_of(ask(client, messages, retention_ratio=0.5))
        assert "for this model" in message
        message = error_of(ask(client, messages, max_retained_video_tokens=9))
        assert "must be absent for this model, got 9" in message
        assert ask(client, messages, retention_ratio=1.0).status_code == 200
    assert len(handler.requests) == 2


# What a client can ask before it sends a chat.


@pytest.mark.parametrize("compresses", [True, False])
def test_the_list_of_models_tells_what_a_request_may_ask_of_videos(
    app: FastAPI, client: TestClient, compresses: bool
) -> None:
    chosen: dict[str, Any] = {"retention_ratio": 0.5, "min_retention_ratio": 0.1}
    chosen |= {"max_retained_video_tokens": 700}
    init(app, compresses=compresses, **(chosen if compresses else {}))
    cards = client.get("/v1/models").json()["data"]
    assert [card["id"] for card in cards] == ["m", "adapter"]
    expected = {
        "method": DEFAULT_VIDEO_COMPRESSION,
        "default_retention_ratio": 0.5,
        "min_retention_ratio": 0.1,
        "default_max_retained_video_tokens": 700,
        "max_video_tokens": 1 << 15,
        "compress_images": False,
        "auto": None,
    }
    for card in cards:
        assert card["video_compression"] == (expected if compresses else None)
    document = client.get("/openapi.json").json()
    content = document["paths"]["/v1/models"]["get"]["responses"]["200"]["content"]
    assert "RetentionModelList" in str(content["application/json"])
    fields = document["components"]["schemas"]["VideoCompressionCard"]["properties"]
    assert fields.keys() == expected.keys()


def test_an_estimate_says_what_vllm_says_is_wrong(app: FastAPI, client: TestClient) -> None:
    assert ask(client, VIDEO, ESTIMATE).status_code == 404
    init(app, compresses=False)
    assert "count this model's tokens with /tokenize" in error_of(ask(client, VIDEO, ESTIMATE))


def test_an_estimate_counts_no_frames_of_a_video_that_is_named_alone() -> None:
    report = EstimateReport()
    frames = np.zeros((3, 4, 4, 3), dtype=np.uint8)
    named: Any = None
    report.look(VideoProcessorItems([named, (frames, {"fps": 2.0}), frames]))
    assert report.num_frames == [None, 3, 3]


def test_an_estimate_ends_when_its_client_hangs_up(app: FastAPI) -> None:
    async def call(create_tokenize: Any, raw_request: Any) -> None:
        handler: Any = Namespace(create_tokenize=create_tokenize)
        app.state.serving_tokenization = handler
        request = EstimateRequest.model_validate({"model": "m", "messages": VIDEO})
        await estimate(request, raw_request)

    init(app)
    assert_ends_with_its_client(app, call)


# What the operator set.


def test_a_setting_for_a_model_whose_videos_are_not_compressed_ends_the_start(
    app: FastAPI,
) -> None:
    for name, value in (("retention_ratio", 0.5), ("video_frame_cache_gb", 1.0)):
        with pytest.raises(ValueError, match=rf"{name} cannot be set for this model.*leave it out"):
            init(app, compresses=False, **dict[str, Any]({name: value}))
    init(app, compresses=False, do_resize=True)


@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("retention_ration", "retention_ratio"),
        ("min-retention-ratio", "min_retention_ratio"),
        ("video_compresion", "video_compression"),
    ],
)
def test_a_setting_that_is_nearly_one_of_ours_ends_the_start(
    app: FastAPI, name: str, right: str
) -> None:
    with pytest.raises(ValueError, match=rf"{name} is not a setting .* write {right}"):
        init(app, **dict[str, Any]({name: 0.5}))


def test_api_servers_share_the_cpus(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scissor_vllm.cpus.num_cpus", lambda: 16)
    for num_api_servers, expected in ((4, 4), (1, 16)):
        init(app, num_api_servers=num_api_servers)
        assert num_own_cpus() == expected


def test_a_server_that_merges_compiles_before_it_is_ready(
    app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[bool] = []
    monkeypatch.setattr(
        "scissor_vllm.frontend.chat.compiled_comparison", lambda: compiled.append(True)
    )
    init(app)
    init(app, compresses=False)
    assert not compiled
    init(app, tower_merging_max_ratio=0.1)
    assert compiled


# Another vLLM.


def test_with_an_untested_vllm_a_ratio_is_refused_with_the_reason_and_the_rest_is_stock(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("vllm.version.__version__", "0.34.0")
    monkeypatch.setenv("SCISSOR_VLLM_WARNED", "")
    app = build(monkeypatch)
    state = app.state
    state.openai_serving_chat = handler = Handler()
    asyncio.run(RetentionEndpoint().init_state(None, state, state.args))
    client = TestClient(app, raise_server_exceptions=False)
    for path in (CHAT, TOKENIZE, "/v1/completions"):
        message = error_of(ask(client, VIDEO, path, retention_ratio=0.5))
        assert "tested with vLLM >=0.32,<0.34 and found 0.34.0" in message
    assert ask(client, VIDEO).json() == ChatCompletionResponse(**ANSWER).model_dump()
    assert type(handler.requests[0]) is ChatCompletionRequest
