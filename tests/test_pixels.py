"""uint8 frames travel between processes, and the tower gets stock vLLM's pixels bit for bit."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from transformers import AutoConfig
from vllm.config import ModelConfig
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.models import llava_onevision as stock
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import InputProcessingContext, TimingContext
from vllm.multimodal.processing.inputs import ProcessorInputs
from vllm.multimodal.utils import group_and_batch_mm_items

from scissor_vllm import num_retained_tokens
from scissor_vllm.demo.model import demo_model_path
from scissor_vllm.frontend import frame_transport as pixels_module
from scissor_vllm.frontend.frame_cache import FRAMES
from scissor_vllm.frontend.frame_transport import get_normalization, map_in_threads
from scissor_vllm.normalization import normalized
from scissor_vllm.plugin import register
from scissor_vllm.video_fields import (
    FRAME_OF,
    NUM_ENCODED_TOKENS,
    NUM_RETAINED,
    NUM_VIDEO_TOKENS,
    PIXEL_NORMALIZATION,
    VIDEO_FRAMES,
    VIDEO_IDENTITY,
)
from scissor_vllm.worker.video_pixels import VideoPixels, batched_pixels, take_video_pixels
from tests.conftest import TOKENS_PER_FRAME

SIDE: int = AutoConfig.from_pretrained(demo_model_path()).vision_config.image_size
STOCK_FIELD = "pixel_values_videos"

CLIP = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
SIGLIP = ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
BICUBIC, BILINEAR, NEAREST = 3, 2, 0


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    register()
    yield
    # A processor sets the size for its process.
    FRAMES.resize(0)


class Processors:
    """Ours and stock's processor for one checkpoint."""

    def __init__(self, model: Path, dtype: str = "float32", **config: Any) -> None:
        model_config = ModelConfig(model=str(model), dtype=dtype, **config)
        self.ours = MULTIMODAL_REGISTRY.create_processor(model_config)
        info = stock.LlavaOnevisionProcessingInfo(self.ours.info.ctx)
        self.stock = stock.LlavaOnevisionMultiModalProcessor(
            info, stock.LlavaOnevisionDummyInputsBuilder(info)
        )
        self.dtype = model_config.dtype

    def run(self, which: Any, data: dict[str, Any], **options: object) -> Any:
        """Return the items that go to the engine."""
        counts = {name: len(items) for name, items in data.items()}
        tokenizer = which.info.get_tokenizer()
        prompt = tokenizer.encode(which.dummy_inputs.get_dummy_text(counts))
        items = which.info.parse_mm_data(data)
        inputs = ProcessorInputs(prompt, items, hf_processor_mm_kwargs=options)
        return which.apply(inputs, TimingContext(enabled=False))["mm_kwargs"]

    def tower_pixels(self, video: Any, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the tower gets from us and in stock vLLM, (T, 3, H, W) each."""
        (item,) = self.run(self.ours, {"video": [video]}, **options)["video"]
        fields = {name: elem.data[None] for name, elem in item.items()}
        (pixels,) = take_video_pixels(fields, self.dtype)
        (expected,) = self.run(self.stock, {"video": [video]}, **options)["video"]
        return pixels.whole(), expected[STOCK_FIELD].data


def checkpoint(folder: Path, **settings: Any) -> Path:
    """The demo model with other settings of its video processor."""
    shutil.copytree(demo_model_path(), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    path = folder / "processor_config.json"
    config = json.loads(path.read_text())
    config["video_processor"].update(settings)
    path.write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def demo() -> Processors:
    return Processors(demo_model_path())


def frames(num_frames: int, height: int, width: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    shape = (num_frames, height, width, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def assert_same(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    ours, expected = pair
    assert ours.dtype == expected.dtype
    assert ours.is_contiguous()
    assert torch.equal(ours, expected)


# The same to the bit.

SIZES = [(360, 640), (240, 320), (SIDE - 1, SIDE + 1), (SIDE, SIDE), (SIDE, 300), (41, 55), (5, 7),
         (2, 2), (2, 900), (1080, 1920), (331, SIDE), (720, 4)]  # fmt: skip


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_size_gives_the_tower_stocks_pixels(demo: Processors, size: tuple[int, int]) -> None:
    assert_same(demo.tower_pixels(frames(3, *size)))


def test_pictures_are_frames(demo: Processors) -> None:
    assert_same(demo.tower_pixels([Image.fromarray(frame) for frame in frames(2, 50, 60)]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("statistics", [CLIP, SIGLIP, IMAGENET], ids=["clip", "siglip", "imagenet"])
def test_every_model_gets_stocks_pixels_in_its_dtype(
    tmp_path: Path, dtype: str, statistics: tuple[list[float], list[float]]
) -> None:
    mean, std = statistics
    model = checkpoint(tmp_path / "model", image_mean=mean, image_std=std)
    # More frames than are held in float32 at a time, and every value of uint8.
    video = frames(37, 120, 161)
    ours, expected = Processors(model, dtype).tower_pixels(video)
    assert_same((ours, expected))
    assert ours.dtype == getattr(torch, dtype)


@pytest.mark.parametrize(
    "settings",
    [
        {"resample": BILINEAR},
        {"resample": NEAREST},
        {"do_resize": False, "do_center_crop": True, "crop_size": {"height": SIDE, "width": SIDE}},
        {"rescale_factor": 1 / 127.5},
    ],
    ids=["bilinear", "nearest", "crop", "factor"],
)
def test_other_settings_of_a_checkpoint_are_followed(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    processors = Processors(checkpoint(tmp_path / "model", **settings))
    assert_same(processors.tower_pixels(frames(3, 90, 130)))


def test_a_requests_resampling_is_followed(demo: Processors) -> None:
    video = frames(2, 90, 130)
    assert_same(demo.tower_pixels(video, resample=BILINEAR))
    assert not torch.equal(
        demo.tower_pixels(video, resample=BILINEAR)[0], demo.tower_pixels(video)[0]
    )


def test_read_only_frames_are_accepted(demo: Processors) -> None:
    video = frames(3, 100, 120)
    video.flags.writeable = False
    before = video.copy()
    assert_same(demo.tower_pixels(video))
    np.testing.assert_array_equal(video, before)


def use_threads(
    monkeypatch: pytest.MonkeyPatch, num_threads: int, num_free: int | None = None
) -> None:
    monkeypatch.setattr(pixels_module, "threads_per_video", lambda: num_threads)
    monkeypatch.setattr(
        pixels_module,
        "take_cpus",
        lambda wanted: nullcontext(max(1, min(wanted, num_free or wanted))),
    )


@pytest.mark.parametrize("num_frames", [3, 16, 29, 64])
def test_frames_that_are_resized_in_threads_are_stocks_in_their_order(
    demo: Processors, num_frames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_threads(monkeypatch, 3)
    calls: list[tuple[str, int]] = []
    call = InputProcessingContext.call_hf_processor

    def watched(self: Any, processor: Any, data: Any, kwargs: Any) -> Any:
        if data["videos"] is not None and "text" not in data:
            calls.append((threading.current_thread().name, len(data["videos"])))
        return call(self, processor, data, kwargs)

    pixels_module._resize_pool.cache_clear()
    monkeypatch.setattr(InputProcessingContext, "call_hf_processor", watched)
    video = frames(num_frames, 50, 70)
    (item,) = demo.run(demo.ours, {"video": [video]})["video"]
    assert sum(count for _, count in calls) == num_frames
    assert len(calls) == {3: 1, 16: 2, 29: 3, 64: 3}[num_frames]
    assert all(name.startswith("resize") for name, _ in calls) == (num_frames > 8)
    monkeypatch.undo()
    _, expected = demo.tower_pixels(video)
    fields = {name: elem.data[None] for name, elem in item.items()}
    (threaded,) = take_video_pixels(fields, demo.dtype)
    assert_same((threaded.whole(), expected))
    pixels_module._resize_pool.cache_clear()


def test_without_free_cpus_a_video_is_prepared_in_one_thread(
    demo: Processors, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_threads(monkeypatch, 3, num_free=1)
    num_frames: list[int] = []
    call = InputProcessingContext.call_hf_processor

    def watched(self: Any, processor: Any, data: Any, kwargs: Any) -> Any:
        if data["videos"] is not None and "text" not in data:
            assert threading.current_thread() is threading.main_thread()
            num_frames.append(len(data["videos"]))
        return call(self, processor, data, kwargs)

    monkeypatch.setattr(InputProcessingContext, "call_hf_processor", watched)
    assert_same(demo.tower_pixels(frames(32, 50, 70)))
    thread_ids = map_in_threads(lambda _: threading.get_ident(), range(4))
    assert num_frames[0] == 32
    assert set(thread_ids) == {threading.get_ident()}


def test_results_of_threads_are_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    use_threads(monkeypatch, 3)
    met = threading.Barrier(3)

    def double(number: int) -> int:
        if number < 3:
            met.wait(timeout=30)
        return 2 * number

    assert map_in_threads(double, range(8)) == [2 * number for number in range(8)]
    assert map_in_threads(double, []) == []


def test_a_video_of_which_the_processor_takes_frames_is_prepared_as_one(
    demo: Processors, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_threads(monkeypatch, 3)
    video = frames(24, 50, 70)
    for options in ({"do_sample_frames": False}, {"num_frames": 5}):
        monkeypatch.setattr(pixels_module, "in_threads", None)
        assert_same(demo.tower_pixels(video, **options))


def test_where_torch_has_no_integer_resize_stocks_order_of_channels_is_kept(
    demo: Processors, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    call = type(demo.ours.info.ctx).call_hf_processor

    def recording(self: Any, processor: Any, data: Any, kwargs: Any) -> Any:
        seen.append(data["videos"].is_contiguous())
        return call(self, processor, data, kwargs)

    monkeypatch.setattr(type(demo.ours.info.ctx), "call_hf_processor", recording)
    for capability in ("AVX512", "DEFAULT"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda c=capability: c)
        demo.run(demo.ours, {"video": [frames(2, 50, 60)]})
    assert seen == [False, True]


# What travels.


def test_frames_travel_as_bytes(demo: Processors) -> None:
    (item,) = demo.run(demo.ours, {"video": [frames(5, 50, 60)]})["video"]
    counts = {NUM_RETAINED, NUM_VIDEO_TOKENS, NUM_ENCODED_TOKENS}
    # An uncompressed video is not cached, so nothing is hashed.
    assert set(item) == {VIDEO_FRAMES, PIXEL_NORMALIZATION, *counts}
    sent = item[VIDEO_FRAMES].data
    assert (sent.dtype, tuple(sent.shape)) == (torch.uint8, (5, SIDE, SIDE, 3))
    assert sent.is_contiguous()
    (expected,) = demo.run(demo.stock, {"video": [frames(5, 50, 60)]})["video"]
    assert 4 * sent.nbytes == expected[STOCK_FIELD].data.nbytes


def test_a_picture_beside_a_video_is_stocks(demo: Processors) -> None:
    picture = Image.fromarray(frames(1, 60, 90)[0])
    data = {"image": [picture], "video": [frames(2, 50, 60), frames(3, 70, 60)]}
    ours, expected = demo.run(demo.ours, data), demo.run(demo.stock, data)
    (image,), (stock_image,) = ours["image"], expected["image"]
    assert set(image) == set(stock_image)
    for name in image:
        assert torch.equal(image[name].data, stock_image[name].data)
    assert [len(item[VIDEO_FRAMES].data) for item in ours["video"]] == [2, 3]


def test_memory_is_profiled_with_frames_as_they_will_travel(demo: Processors) -> None:
    items = demo.ours.get_dummy_mm_inputs({"video": 1})["mm_kwargs"]["video"]
    assert VIDEO_FRAMES in items[0]


def test_frames_and_stocks_pixels_never_share_a_batch(demo: Processors) -> None:
    video = frames(2, 50, 60)
    items = [
        demo.run(demo.ours, {"video": [item]})["video"][0]
        for item in (video, video, video.astype(np.float32), video)
    ]
    batches = list(group_and_batch_mm_items(items))
    assert [count for count, _ in batches] == [2, 1, 1]
    pixels = [take_video_pixels(fields, torch.float32) for _, fields in batches]
    assert list(map(len, pixels)) == [2, 0, 1]
    assert torch.equal(batched_pixels(pixels[0])[1], pixels[2][0].whole())


# Keys of the feature cache.


def identity(processors: Processors, video: Any, **options: object) -> bytes:
    options.setdefault("retention_ratio", 0.5)
    (item,) = processors.run(processors.ours, {"video": [video]}, **options)["video"]
    (pixels,) = take_video_pixels(
        {name: elem.data[None] for name, elem in item.items()}, torch.float32
    )
    assert pixels.identity is not None
    assert len(pixels.identity) == 32
    return pixels.identity


def test_a_video_is_recognized_by_its_pixels_alone(demo: Processors, tmp_path: Path) -> None:
    video = frames(3, 120, 100)
    key = identity(demo, video)
    # The ratio is no part of it, nor is a container: only what the tower sees.
    for same in (identity(demo, video.copy(), retention_ratio=0.1), identity(demo, [*video])):
        assert same == key
    changed = video.copy()
    changed[1, 40:50, 40:50] ^= 1
    mean, std = SIGLIP
    model = checkpoint(tmp_path / "model", image_mean=mean, image_std=std)
    others = [
        identity(demo, changed),
        identity(demo, video[::-1].copy()),
        identity(demo, video[:2]),
        identity(demo, video, resample=BILINEAR),
        identity(Processors(model), video),
    ]
    assert len({key, *others}) == 6


def test_frames_that_repeat_travel_once_where_the_video_is_compressed(demo: Processors) -> None:
    different = frames(3, 120, 100)
    # The same again later is not found: each is compared with the one before it.
    video = different[[0, 0, 0, 1, 2, 2, 0]]
    (item,) = demo.run(demo.ours, {"video": [video]}, retention_ratio=0.5)["video"]
    assert item[FRAME_OF].data.tolist() == [0, 0, 0, 1, 2, 2, 3]
    assert len(item[VIDEO_FRAMES].data) == 4
    assert int(item[NUM_RETAINED].data) == num_retained_tokens(7 * TOKENS_PER_FRAME, 0.5)
    fields = {name: elem.data[None] for name, elem in item.items()}
    (pixels,) = take_video_pixels(fields, demo.dtype)
    (expected,) = demo.run(demo.stock, {"video": [video]})["video"]
    assert len(pixels) == 7
    assert torch.equal(pixels.whole(), expected[STOCK_FIELD].data)
    encoded = torch.cat([frames for (frames,) in pixels.split(2)])
    assert len(encoded) == 4
    assert torch.equal(pixels.repeated(encoded), pixels.whole())

    for ratio, sent in ((1.0, video), (0.5, different)):
        (item,) = demo.run(demo.ours, {"video": [sent]}, retention_ratio=ratio)["video"]
        assert FRAME_OF not in item
        assert len(item[VIDEO_FRAMES].data) == len(sent)

    both = demo.run(demo.ours, {"video": [video, different]}, retention_ratio=0.5)["video"]
    assert [item[FRAME_OF].data.tolist() for item in both] == [[0, 0, 0, 1, 2, 2, 3], [0, 1, 2]]


def test_repeats_are_part_of_what_a_video_is_recognized_by(demo: Processors) -> None:
    different = frames(2, 120, 100)
    videos = [different[order] for order in ([0, 1], [0, 0, 1], [0, 1, 1])]
    assert len({identity(demo, video, retention_ratio=0.5) for video in videos}) == 3


@pytest.mark.parametrize("algorithm", ["blake3", "sha256", "sha512"])
def test_every_hash_that_vllm_offers_tells_videos_apart(algorithm: str) -> None:
    processors = Processors(demo_model_path(), mm_hasher_algorithm=algorithm)
    assert identity(processors, frames(2, 9, 9)) != identity(processors, frames(2, 9, 9, seed=1))


@pytest.mark.parametrize(
    "config", [{"mm_processor_cache_gb": 0}, {"mm_processor_kwargs": {"video_feature_cache_gb": 0}}]
)
def test_without_a_feature_cache_nothing_is_hashed(config: dict[str, Any]) -> None:
    processors = Processors(demo_model_path(), **config)
    data = {"video": [frames(2, 9, 9)]}
    (item,) = processors.run(processors.ours, data, retention_ratio=0.5)["video"]
    assert VIDEO_IDENTITY not in item


# Processed by vLLM.


def channels_first(video: npt.NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(video).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    "video",
    [
        frames(2, 50, 60).astype(np.float32),
        frames(2, 50, 60)[..., :1],
        channels_first(frames(2, 50, 60)),
        # Three rows look like three channels.
        frames(2, 3, 60),
    ],
    ids=["float", "grey", "channels first", "three rows"],
)
def test_other_kinds_of_frames_are_processed_by_vllm(demo: Processors, video: Any) -> None:
    assert_stocks_way(demo, video)


def assert_stocks_way(processors: Processors, video: Any, **options: object) -> None:
    results = []
    for which in (processors.ours, processors.stock):
        try:
            (item,) = processors.run(which, {"video": [video]}, **options)["video"]
        except ValueError as error:
            results.append(str(error).split(" on data=")[0])
        else:
            assert VIDEO_FRAMES not in item
            results.append(item[STOCK_FIELD].data)
    ours, expected = results
    assert ours == expected if isinstance(expected, str) else torch.equal(ours, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"do_rescale": False},
        {"do_normalize": False},
        {"image_mean": [0.1, 0.2, 0.3]},
        {"image_std": [0.1, 0.2, 0.3]},
        {"rescale_factor": 0.5},
        {"input_data_format": "channels_last"},
        {"videos_kwargs": {"do_rescale": False}},
        {"an_option_to_come": 1},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_beyond_the_resize_are_processed_by_vllm(
    demo: Processors, options: dict[str, object]
) -> None:
    assert_stocks_way(demo, frames(2, 50, 60), **options)


def test_the_operators_options_count_as_well(tmp_path: Path) -> None:
    options = {"do_normalize": False}
    processors = Processors(demo_model_path(), mm_processor_kwargs=options)
    assert_stocks_way(processors, frames(2, 50, 60))


@pytest.mark.parametrize("setting", ["do_rescale", "do_normalize"])
def test_a_checkpoint_without_a_step_is_processed_by_vllm(tmp_path: Path, setting: str) -> None:
    assert_stocks_way(
        Processors(checkpoint(tmp_path / "model", **{setting: False})), frames(2, 50, 60)
    )


def test_a_processor_with_other_arithmetic_is_processed_by_vllm(demo: Processors) -> None:
    class Other(type(demo.ours.info.get_hf_processor().video_processor)):  # type: ignore[misc]
        def rescale_and_normalize(self, images: torch.Tensor, *settings: Any) -> torch.Tensor:
            same = super().rescale_and_normalize(images, *settings)
            # One step of float32, at one value of one channel.
            same[images == 200] = torch.nextafter(same[images == 200], torch.tensor(9.0))
            return same

    mean, std = CLIP
    assert get_normalization(Other(image_mean=mean, image_std=std)) is None
    assert get_normalization(Other.__mro__[1](image_mean=mean, image_std=std)) is not None
    assert get_normalization(None) is None
    assert get_normalization(Other.__mro__[1](image_mean=mean, image_std=[0.1, 0.2])) is None


def test_a_size_that_the_tower_cannot_take_is_refused(demo: Processors) -> None:
    for video in (frames(2, 50, 60), frames(2, 50, 60).astype(np.float32)):
        with pytest.raises(
            VLLMValidationError, match=rf"frames of {SIDE}x{SIDE}, but video 0.*40x30"
        ):
            demo.run(demo.ours, {"video": [video]}, size={"height": 30, "width": 40})


# In the model.


def test_pixels_are_made_for_one_call_of_the_tower_at_a_time() -> None:
    video = torch.from_numpy(frames(7, 4, 4))
    normalization = torch.tensor([[120.0, 110.0, 100.0], [60.0, 61.0, 62.0]])
    pixels = VideoPixels(video, normalization, torch.float32)
    parts = [frames for (frames,) in pixels.split(3)]
    assert list(map(len, parts)) == [3, 3, 1]
    assert torch.equal(torch.cat(parts), pixels.whole())
    assert len(pixels) == 7


def test_normalizing_is_two_operations_in_float32() -> None:
    video = torch.from_numpy(frames(2, 3, 5))
    normalization = torch.tensor([[120.3, 110.2, 100.1], [60.7, 61.9, 62.3]])
    out = normalized(video, normalization, torch.float64)
    for channel in range(3):
        mean, std = normalization[:, channel]
        expected = (video[..., channel].float() - mean) / std
        assert torch.equal(out[:, channel], expected.double())
