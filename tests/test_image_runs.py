"""Runs of images that become videos: which do, what of K, and what is refused."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image
from vllm import envs
from vllm.config import ModelConfig
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import VLLMUnprocessableEntityError, VLLMValidationError
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY
from vllm.multimodal.processing import TimingContext
from vllm.multimodal.processing.inputs import ProcessorInputs

from scissor_vllm.demo.model import demo_model_path
from scissor_vllm.frontend import image_runs
from scissor_vllm.frontend.image_runs import compress_images
from scissor_vllm.frontend.request import RetentionChatCompletionRequest
from scissor_vllm.plugin import register
from scissor_vllm.retention import (
    LOADED_MEDIA,
    RETENTION,
    RETENTION_REPORT,
    RatioTooSmallError,
    RetentionReport,
    count_retained,
    least_ratio,
    num_retained_tokens,
)
from scissor_vllm.settings import RetentionPolicy
from scissor_vllm.video_fields import KEEPS_EVERY_FRAME, NUM_RETAINED, NUM_VIDEO_TOKENS
from tests.conftest import TOKENS_PER_FRAME
from tests.families import build_qwen2_5_vl, build_qwen3_vl
from tests.serving import Server, same_answer

WIDE, TALL = (96, 64), (64, 96)
TEXT = {"type": "text", "text": "?"}
BUILDERS: dict[str, Callable[[Path], Any] | None] = {
    "llava-onevision": None,
    "qwen2.5-vl": build_qwen2_5_vl,
    "qwen3-vl": build_qwen3_vl,
}


def png(number: int, size: tuple[int, int] = WIDE, mode: str = "RGB") -> bytes:
    """Return a picture that its number tells from others."""
    pixels = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, "PNG")
    return file.getvalue()


def url(number: int, *args: Any) -> str:
    return f"data:image/png;base64,{base64.b64encode(png(number, *args)).decode()}"


def image(number: int, *args: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url(number, *args)}}


def images(count: int, *args: Any) -> list[dict[str, Any]]:
    return [image(number, *args) for number in range(count)]


class Frontend:
    """What an API server's state has, for one model."""

    def __init__(self, model: Path, limits: dict[str, int] | None = None, **settings: Any) -> None:
        config = ModelConfig(
            model=str(model),
            dtype="float32",
            limit_mm_per_prompt=limits or {},
            mm_processor_kwargs={"allow_compress_images": True, **settings},
        )
        self.processor = MULTIMODAL_REGISTRY.create_processor(config)
        renderer = Namespace(mm_processor=self.processor)
        self.state: Any = Namespace(
            online_renderer=Namespace(
                renderer=renderer, model_config=config, trust_request_mm_kwargs=False
            )
        )

    def compress(self, *contents: Any, **fields: Any) -> Any:
        """Return a request whose messages have these contents, its runs of images compressed."""
        request = RetentionChatCompletionRequest.model_validate(
            {
                "model": "m",
                "compress_images": True,
                "messages": [{"role": "user", "content": content} for content in contents],
                **fields,
            }
        )
        assert request.compresses_images
        asyncio.run(compress_images(request, self.state))
        assert request.has_video
        assert not request.compresses_images
        return request

    def refusal(self, *contents: Any) -> str:
        with pytest.raises(VLLMValidationError) as refused:
            self.compress(*contents)
        return str(refused.value)

    def run(
        self, videos: Sequence[Any], **over_http: object
    ) -> tuple[list[Any], RetentionReport, list[str], int]:
        """Return the videos' items, the report, their identities and the prompt's length."""
        text = self.processor.dummy_inputs.get_dummy_text({"video": len(videos)})
        report = RetentionReport()
        inputs = ProcessorInputs(
            self.processor.info.get_tokenizer().encode(text),
            self.processor.info.parse_mm_data({"video": list(videos)}),
            media_io_kwargs={RETENTION: {RETENTION_REPORT: report, **over_http}},
        )
        result = self.processor.apply(inputs, TimingContext(enabled=False))
        hashes = result["mm_hashes"]["video"]
        return result["mm_kwargs"]["video"], report, hashes, len(result["prompt_token_ids"])


def loaded(request: Any) -> dict[str, Any]:
    request.begin_report()
    kwargs = request.build_chat_params(None, "auto").media_io_kwargs
    media: dict[str, Any] = kwargs[RETENTION][LOADED_MEDIA]
    return media


def frames_of(video: Any) -> Any:
    return video.media[0]


def kinds(parts: Sequence[Any]) -> list[str]:
    return [part["type"].removesuffix("_url") for part in parts]


@pytest.fixture(scope="module")
def demo() -> Frontend:
    register()
    return Frontend(demo_model_path())


@pytest.fixture(scope="module", params=BUILDERS)
def frontend(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Frontend:
    register()
    build = BUILDERS[request.param]
    if build is None:
        return Frontend(demo_model_path())
    folder = tmp_path_factory.mktemp(request.param) / "model"
    build(folder)
    return Frontend(folder)


# Which images become videos.


def test_a_run_becomes_one_video_of_its_images_in_order(demo: Frontend) -> None:
    request = demo.compress([TEXT, *images(5), TEXT])
    (message,) = request.messages
    assert kinds(message["content"]) == ["text", "video", "text"]
    (video,) = loaded(request).values()
    assert frames_of(video).shape == (5, 64, 96, 3)
    for number, frame in enumerate(frames_of(video)):
        assert np.array_equal(frame, np.asarray(Image.open(io.BytesIO(png(number)))))


def test_what_is_in_no_run_stays_an_image(demo: Frontend) -> None:
    first = [*images(4, WIDE), *images(3, TALL), *images(6, WIDE), TEXT, *images(3, WIDE)]
    second = [image(7, TALL), *images(4, TALL), *images(4, TALL)]
    request = demo.compress(first, "text alone", second)
    parts = [message["content"] for message in request.messages]
    assert kinds(parts[0]) == ["video", *["image"] * 3, "video", "text", *["image"] * 3]
    assert parts[1] == "text alone"
    assert kinds(parts[2]) == ["video"]
    media = loaded(request)
    named = [part["video_url"]["url"] for part in (parts[0][0], parts[0][4], parts[2][0])]
    assert [len(frames_of(media[name])) for name in named] == [4, 6, 9]
    # Fetched already, they are not fetched again, and are what vLLM would have fetched.
    for number, part in enumerate(parts[0][1:4]):
        kept = media[part["image_url"]["url"]]
        assert kept.original_bytes == png(number, TALL)
    assert parts[0][6:] == images(3, WIDE)


def test_images_in_each_form_that_vllm_takes_are_in_a_run(demo: Frontend) -> None:
    forms = [
        image(0),
        {"image_url": url(1)},
        {"image_url": {"url": url(2)}},
        {**image(3), "uuid": "a"},
        {"type": "input_image", "image_url": url(4), "detail": "auto"},
    ]
    (video,) = loaded(demo.compress(forms)).values()
    assert len(frames_of(video)) == 5


def test_an_image_named_by_its_uuid_alone_ends_a_run(demo: Frontend) -> None:
    named = {"type": "image_url", "image_url": None, "uuid": "a"}
    request = demo.compress([*images(4), named, *images(3)])
    assert kinds(request.messages[0]["content"]) == ["video", *["image"] * 4]


def test_a_fields_beside_an_images_url_stay(demo: Frontend) -> None:
    odd = {**image(0, TALL), "uuid": "a", "note": 1}
    request = demo.compress([*images(4), odd])
    part = request.messages[0]["content"][1]
    assert (part["uuid"], part["note"]) == ("a", 1)


def test_the_connector_gives_each_out_once(demo: Frontend) -> None:
    request = demo.compress([*images(4), image(0, TALL)])
    media = loaded(request)
    video_part, image_part = request.messages[0]["content"]
    connector: Any = MEDIA_CONNECTOR_REGISTRY.load(
        envs.VLLM_MEDIA_CONNECTOR, media_io_kwargs={RETENTION: {LOADED_MEDIA: media}}
    )
    name = video_part["video_url"]["url"]
    video = media[name]
    assert asyncio.run(connector.fetch_video_async(name, video_processor="x")) is video
    kept = connector.fetch_image(image_part["image_url"]["url"])
    assert kept.original_bytes == png(0, TALL)
    # Their memory is free once they are processed.
    assert media == {}
    with pytest.raises(VLLMValidationError, match="must be an http, https or data URL"):
        connector.fetch_video(name)


# K.


@pytest.mark.parametrize("ratio", [1.0, 0.5, 0.35])
def test_k_is_exact_and_every_image_keeps_a_token(frontend: Frontend, ratio: float) -> None:
    request = frontend.compress(images(6))
    (video,) = loaded(request).values()
    (item,), report, _, length = frontend.run([video], retention_ratio=ratio)
    _, _, _, whole = frontend.run([video])
    num_tokens = report.num_tokens[0]
    assert num_tokens % 6 == 0
    expected = num_retained_tokens(num_tokens, ratio)
    assert (int(item[NUM_VIDEO_TOKENS].data), int(item[NUM_RETAINED].data)) == (
        num_tokens,
        expected,
    )
    assert whole - length == num_tokens - expected
    assert (KEEPS_EVERY_FRAME in item) == (ratio < 1)
    described = report.as_response()
    assert described is not None
    assert described["num_compressed_images"] == 6
    assert described["num_retained_video_tokens"] == expected


def test_an_images_tokens_are_its_own_and_images_are_a_second_apart(frontend: Frontend) -> None:
    (video,) = loaded(frontend.compress(images(6))).values()
    (item,), _, _, _ = frontend.run([video])
    num_frames = frontend.processor.info.get_num_frames_of_image()
    frames = frames_of(video)
    assert len(frames) == 6 * num_frames
    for number in range(6):
        for frame in frames[number * num_frames : (number + 1) * num_frames]:
            assert np.array_equal(frame, frames[number * num_frames])
    if "video_grid_thw" in item:
        assert int(item["video_grid_thw"].data[0]) == 6
    if "second_per_grid_ts" in item:
        assert float(item["second_per_grid_ts"].data) == 1.0
    if "timestamps" in item:
        assert item["timestamps"].data == [0, 1, 2, 3, 4, 5]


def test_below_a_token_an_image_the_least_ratio_is_named_and_works(frontend: Frontend) -> None:
    (video,) = loaded(frontend.compress(images(6))).values()
    num_tokens = frontend.run([video])[1].num_tokens[0]
    least = least_ratio(num_tokens, 6)
    below = round(least - 1e-4, 4)
    policy = frontend.processor.info.retention_policy
    with pytest.raises(VLLMValidationError) as refused:
        frontend.run([video], retention_ratio=max(below, policy.min_ratio / 2))
    if below >= policy.min_ratio:
        assert f"must be at least {least} for 6 images" in str(refused.value)
        assert frontend.run([video], retention_ratio=least)[1].num_retained == [6]
    lowest = max(6, num_retained_tokens(num_tokens, policy.min_ratio))
    with pytest.raises(VLLMValidationError, match=f"must be at least {lowest} for a video of"):
        frontend.run([video], max_retained_video_tokens=5)


@pytest.mark.parametrize("num_tokens", [4, 36, 6273, 10**6 + 3])
@pytest.mark.parametrize("num_images", [4, 33, 999])
def test_the_least_ratio_of_four_decimals_keeps_a_token_of_each(
    num_tokens: int, num_images: int
) -> None:
    if num_images > num_tokens:
        return
    least = least_ratio(num_tokens, num_images)
    assert num_retained_tokens(num_tokens, least) >= num_images
    below = round(least - 1e-4, 4)
    assert below <= 0 or num_retained_tokens(num_tokens, below) < num_images


def test_the_share_of_a_budget_keeps_a_token_of_each_image() -> None:
    counts = count_retained([40, 4000], 1.0, 50, 0.0, [20, 0])
    assert counts.num_retained == (20, 30)
    assert counts.at([0]).num_images == (20,)
    with pytest.raises(RatioTooSmallError, match=r"at least 0\.4751 for 20 images of 40"):
        count_retained([40, 4000], 0.1, None, 0.01, [20, 0])


def test_a_ratio_that_the_server_chooses_keeps_a_token_of_each_image(demo: Frontend) -> None:
    auto = Frontend(demo_model_path(), auto_retention_ratio="0.01:1.0", target_ttft_ms=1)
    (video,) = loaded(demo.compress(images(6))).values()
    asked: list[float] = []

    def choose(num_tokens: list[int], least: float, most: float) -> float:
        assert most == 1.0
        asked.append(least)
        return ratio

    over_http: dict[str, Any] = {"retention_ratio": "auto", "auto": choose}
    for ratio in (0.5, least_ratio(6 * TOKENS_PER_FRAME, 6)):
        _, report, _, _ = auto.run([video], **over_http)
        assert report.retention_ratio == ratio
    assert report.num_retained == [6]
    assert asked == [least_ratio(6 * TOKENS_PER_FRAME, 6)] * 2
    # The highest that the operator allows is not enough.
    ratio = 0.001
    with pytest.raises(VLLMValidationError, match=f"must be at least {asked[0]} for 6 images"):
        auto.run([video], **over_http)


def test_a_run_and_a_video_share_no_cache_entry(demo: Frontend) -> None:
    (run,) = loaded(demo.compress(images(6))).values()
    (again,) = loaded(demo.compress(images(6))).values()
    (other,) = loaded(demo.compress(images(6)[::-1])).values()
    assert demo.run([again], retention_ratio=0.5)[2] == demo.run([run], retention_ratio=0.5)[2]
    frames, metadata = run.media
    video = type(run)((frames, {**metadata, "video_backend": "pyav"}), run.original_bytes)
    for differs in (other, video):
        assert (
            demo.run([differs], retention_ratio=0.5)[2] != demo.run([run], retention_ratio=0.5)[2]
        )
    assert demo.run([run], retention_ratio=0.5)[2] != demo.run([run], retention_ratio=0.4)[2]


# What is refused.


def test_fewer_than_four_images_next_to_each_other_are_refused(demo: Frontend) -> None:
    for contents in (images(3), [*images(3), TEXT, *images(3)]):
        message = demo.refusal(contents)
        assert "needs 4 or more images of one size next to each other" in message
        assert "got at most 3: send them at one size" in message
    # Not across messages.
    assert "got at most 2" in demo.refusal(images(2), images(2))


def test_images_of_several_sizes_are_refused_if_no_run_is_left(demo: Frontend) -> None:
    mixed = [*images(3, TALL), *images(2, WIDE), *images(3, TALL)]
    assert "got at most 3 of 64x96" in demo.refusal(mixed)


def test_images_of_another_mode_than_frames_stay_images(demo: Frontend) -> None:
    config = demo.state.online_renderer.model_config.get_multimodal_config()
    config.media_io_kwargs = {"image": {"image_mode": None}}
    try:
        assert "got at most 4 of 96x64 in mode L, not RGB" in demo.refusal(images(4, WIDE, "L"))
        request = demo.compress([*images(4), *images(4, WIDE, "L")])
    finally:
        config.media_io_kwargs = {}
    assert kinds(request.messages[0]["content"]) == ["video", *["image"] * 4]


def test_a_requests_own_options_of_images_hold_where_clients_are_trusted(demo: Frontend) -> None:
    options = {"image": {"image_mode": "L"}}
    of_others = demo.compress(images(4), media_io_kwargs=options)
    assert kinds(of_others.messages[0]["content"]) == ["video"]
    demo.state.online_renderer.trust_request_mm_kwargs = True
    try:
        with pytest.raises(VLLMValidationError, match="in mode L"):
            demo.compress(images(4), media_io_kwargs=options)
    finally:
        demo.state.online_renderer.trust_request_mm_kwargs = False


def test_images_and_runs_count_for_the_operators_limits(demo: Frontend) -> None:
    few = Frontend(demo_model_path(), {"image": 5, "video": 1})
    few.compress(images(5))
    message = few.refusal(images(6))
    assert "may have 5 images on this server, got 6" in message
    assert "--limit-mm-per-prompt" in message
    message = few.refusal([*images(4), {"type": "video_url", "video_url": {"url": "data:"}}])
    assert "may have 1 videos, a run of compressed images counted as one," in message
    none = Frontend(demo_model_path(), {"video": 0})
    assert "may have 0 videos" in none.refusal(images(4))


def test_images_that_take_too_many_bytes_are_refused(
    demo: Frontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCISSOR_MAX_VIDEO_DECODE_BYTES", str(5 * 96 * 64 * 3))
    demo.compress(images(5))
    message = demo.refusal(images(6))
    assert f"may take {5 * 96 * 64 * 3} bytes as frames, got 6 images" in message
    assert "SCISSOR_MAX_VIDEO_DECODE_BYTES" in message


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ("data:image/png;base64,AAAA", "cannot identify image file"),
        ("data:image/png;base64,@", "an image's data must be in base64"),
        ("x", "an image's URL must be an http, https or data URL, got 'x'"),
        ("http://127.0.0.1:9/x.png", "fetching the image from 127.0.0.1 failed"),
    ],
)
def test_one_bad_image_of_a_run_is_told(demo: Frontend, bad: str, told: str) -> None:
    part = {"type": "image_url", "image_url": {"url": bad}}
    refusals = (ValueError, VLLMValidationError, VLLMUnprocessableEntityError)
    with pytest.raises(refusals, match=told) as raised:
        demo.compress([*images(4), part])
    assert create_error_response(raised.value).error.code in (400, 422)


def test_hosts_that_the_operator_does_not_allow_are_refused(demo: Frontend) -> None:
    config = demo.state.online_renderer.model_config
    config.allowed_media_domains = ["videos.example.com"]
    try:
        part = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}}
        with pytest.raises(VLLMValidationError, match=r"'127\.0\.0\.1' is not allowed by --allow"):
            demo.compress([part] * 4)
    finally:
        config.allowed_media_domains = None


def test_the_first_failure_ends_all_fetches(
    demo: Frontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[int] = []

    class Connector:
        async def fetch_frame_async(self, image_url: str) -> Any:
            if image_url == "1":
                raise ValueError("broken")
            try:
                await asyncio.sleep(60)
            finally:
                ended.append(int(image_url))

    monkeypatch.setattr(image_runs, "_connector", lambda *_: Connector())
    parts = [{"type": "image_url", "image_url": {"url": str(number)}} for number in range(5)]
    with pytest.raises(ValueError, match="broken"):
        demo.compress(parts)
    assert sorted(ended) == [0, 2, 3, 4]


# What the operator sets.


def test_the_setting_must_be_true_or_false() -> None:
    assert not RetentionPolicy.from_mm_processor_kwargs({}).allows_compress_images
    with pytest.raises(TypeError, match="allow_compress_images must be true or false, got 1"):
        RetentionPolicy.from_mm_processor_kwargs({"allow_compress_images": 1})


def test_another_connector_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    image_runs.check_media_connector()
    monkeypatch.setenv("VLLM_MEDIA_CONNECTOR", "mine")
    with pytest.raises(ValueError, match="needs VLLM_MEDIA_CONNECTOR 'http', got 'mine'"):
        image_runs.check_media_connector()


# Over HTTP.


def ask(server: Server, parts: Sequence[Any], **extra_body: Any) -> Any:
    """Return the raw response for a message, whose answer tells probabilities."""
    return server.client.chat.completions.with_raw_response.create(
        model="demo",
        messages=[{"role": "user", "content": list(parts)}],
        max_completion_tokens=8,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
        extra_body={"ignore_eos": True, **extra_body},
    )


def test_images_answer_as_the_video_of_these_frames_with_exact_k(page_server: Server) -> None:
    data = ",".join(base64.b64encode(png(number)).decode() for number in range(8))
    frames = {"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{data}"}}
    tokens = {}
    for ratio in (1.0, 0.25):
        raw = ask(page_server, [*images(8), TEXT], compress_images=True, retention_ratio=ratio)
        of_images, of_video = raw.parse(), ask(page_server, [frames, TEXT], retention_ratio=ratio)
        assert same_answer(of_images, of_video.parse())
        told: Any = of_images.video_compression
        expected = num_retained_tokens(8 * TOKENS_PER_FRAME, ratio)
        assert told == {
            "retention_ratio": ratio,
            "num_video_tokens": 8 * TOKENS_PER_FRAME,
            "num_retained_video_tokens": expected,
            "num_compressed_images": 8,
        }
        assert "num_compressed_images" not in of_video.parse().video_compression
        assert raw.headers["x-retained-video-tokens"] == str(expected)
        tokens[ratio] = of_images.usage.prompt_tokens
        body = {
            "model": "demo",
            "messages": [{"role": "user", "content": [*images(8), TEXT]}],
            "compress_images": True,
            "retention_ratio": ratio,
        }
        status, counted = page_server.post("/tokenize", json.dumps(body).encode())
        assert (status, json.loads(counted)["count"]) == (200, tokens[ratio])
    assert tokens[1.0] - tokens[0.25] == 8 * TOKENS_PER_FRAME - expected


@pytest.mark.parametrize("are_alike", [True, False])
def test_a_towers_pairs_of_frames_keep_exactly_k_too(qwen: Server, are_alike: bool) -> None:
    parts = [*([image(0)] * 6 if are_alike else images(6)), TEXT]
    whole = ask(qwen, parts, compress_images=True).parse()
    num_tokens = whole.video_compression["num_video_tokens"]
    for ratio in (0.5, least_ratio(num_tokens, 6)):
        answer = ask(qwen, parts, compress_images=True, retention_ratio=ratio).parse()
        expected = num_retained_tokens(num_tokens, ratio)
        assert answer.video_compression["num_retained_video_tokens"] == expected
        removed = whole.usage.prompt_tokens - answer.usage.prompt_tokens
        assert removed == num_tokens - expected
    assert expected == 6
    with pytest.raises(openai.BadRequestError, match="must be at least"):
        ask(qwen, parts, compress_images=True, retention_ratio=round(ratio - 1e-3, 4))


def test_images_that_are_alike_keep_a_token_each(page_server: Server) -> None:
    answer = ask(page_server, [image(0)] * 9, compress_images=True, max_retained_video_tokens=30)
    assert answer.parse().video_compression["num_retained_video_tokens"] == 30


def test_an_image_beside_a_run_is_not_compressed(page_server: Server) -> None:
    alone = ask(page_server, [image(9, TALL), TEXT]).parse()
    run = ask(page_server, [*images(8), TEXT], compress_images=True, retention_ratio=0.25).parse()
    both = ask(
        page_server,
        [*images(8), image(9, TALL), TEXT],
        compress_images=True,
        retention_ratio=0.25,
    ).parse()
    assert both.video_compression == run.video_compression
    assert not hasattr(alone, "video_compression")
    text = ask(page_server, [TEXT]).parse().usage.prompt_tokens
    added = both.usage.prompt_tokens - run.usage.prompt_tokens
    assert added == alone.usage.prompt_tokens - text


@pytest.mark.parametrize(
    ("parts", "fields", "expected"),
    [
        (images(3), {"compress_images": True}, "needs 4 or more images of one size"),
        ([*images(3), *images(3, TALL)], {"compress_images": True}, "got at most 3 of 96x64"),
        (images(4), {"compress_images": "yes"}, "must be true or false, got"),
        (images(8), {"compress_images": True, "max_retained_video_tokens": 7}, "at least"),
        ([*images(4), {**image(0), "image_url": {"url": "x"}}], {"compress_images": True}, "URL"),
    ],
)
def test_a_clients_mistake_is_a_400_that_counts(
    page_server: Server, parts: Any, fields: dict[str, Any], expected: str
) -> None:
    refused = page_server.counter("scissor_vllm:video_requests_total", outcome="refused")
    with pytest.raises(openai.BadRequestError, match=expected):
        ask(page_server, parts, **fields)
    if fields["compress_images"] is True:
        now = page_server.counter("scissor_vllm:video_requests_total", outcome="refused")
        assert now == refused + 1
    assert ask(page_server, [TEXT]).parse().choices
