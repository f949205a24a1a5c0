"""Calls of the vision tower are bounded, and a video always has K rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from prometheus_client import REGISTRY

from scissor_vllm.compression import CompressedTokens, get_compressor, linkage
from scissor_vllm.compression.members import representative_members
from scissor_vllm.compression.uniform import select_evenly
from scissor_vllm.worker import video_compression as tower
from scissor_vllm.worker.video_compression import VideoCompression
from scissor_vllm.worker.video_pixels import VideoPixels

TOKENS_PER_FRAME = 4
WIDTH = 8


def make_compression(
    method: str = "scc",
    budget: int = 40,
    cache_gb: float = 0,
    lora: Any = None,
    transfer: Any = None,
    processor_cache_gb: float = 4,
    has_prefix_caching: bool = True,
) -> VideoCompression:
    settings = {
        "video_compression": method,
        "video_feature_cache_gb": cache_gb,
    }
    mm_config = SimpleNamespace(
        mm_processor_kwargs=settings, mm_processor_cache_gb=processor_cache_gb
    )
    config: Any = SimpleNamespace(
        lora_config=lora,
        model_config=SimpleNamespace(get_multimodal_config=lambda: mm_config),
        scheduler_config=SimpleNamespace(max_num_encoder_input_tokens=budget),
        ec_transfer_config=transfer,
        cache_config=SimpleNamespace(enable_prefix_caching=has_prefix_caching),
    )
    return VideoCompression(config, TOKENS_PER_FRAME)


class RecordingTower:
    """A tower that records the frames of each call."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, frames: torch.Tensor) -> torch.Tensor:
        self.calls.append(len(frames))
        weight = torch.randn(3 * 2 * 2, TOKENS_PER_FRAME * WIDTH, generator=_seeded(7))
        return (frames.flatten(1) @ weight).view(len(frames), TOKENS_PER_FRAME, WIDTH)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_videos(*lengths: int) -> list[VideoPixels]:
    """Videos that differ by their length, by which they are recognized."""
    return [
        VideoPixels(
            torch.randn(length, 3, 2, 2, generator=_seeded(length)), identity=bytes([length])
        )
        for length in lengths
    ]


def rows_of(
    compression: VideoCompression, videos: list[VideoPixels], counts: list[int], encode: Any
) -> list[torch.Tensor]:
    """Return each video's K rows."""
    pairs = zip(videos, counts, strict=True)
    return [compression.compressed(video, count, encode)[1].tokens for video, count in pairs]


def test_a_call_sees_no_more_frames_than_the_encoder_budget_covers() -> None:
    compression, tower = make_compression(budget=40), RecordingTower()
    rows_of(compression, make_videos(25, 3, 10), [2, 1, 40], tower)
    assert tower.calls == [10, 10, 5, 3, 10]


def test_a_budget_below_one_frame_still_encodes_frame_by_frame() -> None:
    compression, tower = make_compression(budget=1), RecordingTower()
    rows_of(compression, make_videos(3), [2], tower)
    assert tower.calls == [1, 1, 1]


@pytest.mark.parametrize("method", ["scc", "uniform"])
def test_mixed_lengths_and_ratios_give_each_video_its_k_rows(method: str) -> None:
    compression = make_compression(method)
    lengths, counts = (25, 1, 7, 10), [3, 4, 28, 1]
    rows = rows_of(compression, make_videos(*lengths), counts, RecordingTower())
    assert [tuple(video_rows.shape) for video_rows in rows] == [(count, WIDTH) for count in counts]


@pytest.mark.parametrize("method", ["average-linkage", "scc-windows", "uniform"])
@pytest.mark.parametrize("cache_gb", [0, 1])
def test_of_a_run_of_images_each_frame_keeps_a_row(method: str, cache_gb: int) -> None:
    compression = make_compression(method, cache_gb=cache_gb)
    still = VideoPixels(torch.randn(1, 3, 2, 2, generator=_seeded(3)).expand(8, -1, -1, -1))
    for identity in (None, b"run"):
        for num_retained in (8, 9, 14, 27):
            video = replace(still, keeps_every_frame=True, identity=identity)
            tokens, rows = compression.compressed(video, num_retained, RecordingTower())
            assert rows.tokens.shape == (num_retained, WIDTH)
            frames = representative_members(tokens, rows) // TOKENS_PER_FRAME
            assert set(frames.tolist()) == set(range(8))


def test_a_videos_rows_do_not_depend_on_its_batch() -> None:
    compression = make_compression()
    together = rows_of(compression, make_videos(12, 9, 30), [5, 7, 9], RecordingTower())
    for length, count, rows in zip((12, 9, 30), (5, 7, 9), together, strict=True):
        (alone,) = rows_of(compression, make_videos(length), [count], RecordingTower())
        assert torch.equal(alone, rows)


def test_a_request_for_more_rows_than_tokens_fails_no_other_request(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rows = rows_of(make_compression(), make_videos(2, 5), [9, 3], RecordingTower())
    assert [len(video_rows) for video_rows in rows] == [9, 3]


def test_a_tower_that_overflows_fails_no_other_request() -> None:
    def overflowing(frames: torch.Tensor) -> torch.Tensor:
        return torch.full((len(frames), TOKENS_PER_FRAME, WIDTH), torch.nan)

    (rows,) = rows_of(make_compression(), make_videos(5), [3], overflowing)
    assert rows.shape == (3, WIDTH)


def raising(error: Exception) -> Any:
    def compress(tokens: torch.Tensor, num_retained: int) -> CompressedTokens:
        raise error

    return compress


DEVICE_ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 256.00 MiB"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"),
    torch.AcceleratorError("CUDA error: invalid configuration argument", 9),
]


@pytest.mark.parametrize("error", DEVICE_ERRORS, ids=lambda error: type(error).__name__)
def test_a_device_error_of_a_single_worker_fails_no_other_request(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    compression, tower = make_compression(), RecordingTower()
    monkeypatch.setattr(compression, "_compress", raising(error))
    (rows,) = rows_of(compression, make_videos(5), [3], tower)
    (video,) = make_videos(5)
    expected = select_evenly(RecordingTower()(video.whole()), 3).tokens
    assert torch.equal(rows, expected)


@pytest.mark.parametrize("error", DEVICE_ERRORS, ids=lambda error: type(error).__name__)
def test_a_device_error_of_one_of_several_ranks_is_raised(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tensor_parallel(monkeypatch):
        compression = make_compression()
        monkeypatch.setattr(compression, "_compress", raising(error))
        with pytest.raises(type(error)):
            rows_of(compression, make_videos(5), [3], RecordingTower())


def test_on_an_error_that_depends_on_the_tokens_all_ranks_fall_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def overflowing(frames: torch.Tensor) -> torch.Tensor:
        return torch.full((len(frames), TOKENS_PER_FRAME, WIDTH), torch.nan)

    with tensor_parallel(monkeypatch):
        ranks = [rows_of(make_compression(), make_videos(5), [3], overflowing)[0] for _ in range(2)]
    assert ranks[0].shape == (3, WIDTH)
    assert torch.equal(*(rows.isnan() for rows in ranks))


@contextmanager
def tensor_parallel(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have a worker believe that it shares a model with another."""
    monkeypatch.setattr(tower, "model_parallel_is_initialized", lambda: True)
    monkeypatch.setattr(tower, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(tower, "get_tensor_model_parallel_world_size", lambda: 2)
    VideoCompression._is_shared.cache_clear()
    try:
        yield
    finally:
        VideoCompression._is_shared.cache_clear()


def test_videos_kept_whole_are_told_from_compressed_ones() -> None:
    compression, videos = make_compression(), make_videos(2, 5)
    assert compression.keeps_all(videos, [8, 20])
    assert not compression.keeps_all(videos, [8, 19])


@pytest.mark.parametrize("method", ["scc", "uniform"])
def test_a_video_asked_about_again_is_encoded_once_and_gives_the_same_rows(method: str) -> None:
    kept, plain = make_compression(method, cache_gb=0.01), make_compression(method)
    tower = RecordingTower()
    for count in (40, 9, 3, 9, 1):
        (rows,) = rows_of(kept, make_videos(25), [count], tower)
        (expected,) = rows_of(plain, make_videos(25), [count], RecordingTower())
        assert torch.equal(rows, expected)
    assert tower.calls == [10, 10, 5]
    kept.forget_features()
    rows_of(kept, make_videos(25), [9], tower)
    assert tower.calls == [10, 10, 5] * 2


def test_only_the_same_content_is_recognized() -> None:
    compression, tower = make_compression(cache_gb=0.01), RecordingTower()
    (video,) = make_videos(5)
    rows_of(compression, [video, replace(video, identity=b"another")], [2, 2], tower)
    # Pixels that came stock's way carry no identity.
    for _ in range(2):
        rows_of(compression, [replace(video, identity=None)], [2], tower)
    assert tower.calls == [5, 5, 5, 5]


@pytest.mark.parametrize("method", ["scc", "uniform"])
def test_a_frame_that_repeats_is_encoded_once(method: str) -> None:
    compression, tower = make_compression(method), RecordingTower()
    (different,) = make_videos(5)
    frame_of = torch.tensor([0, 0, 0, 1, 2, 2, 3, 4, 4])
    video = replace(different, frame_of=frame_of)
    everything = replace(different, pixels=different.whole()[frame_of])
    for count in (1, 7, 30, 36):
        tower.calls.clear()
        (rows,) = rows_of(compression, [video], [count], tower)
        (expected,) = rows_of(compression, [everything], [count], RecordingTower())
        assert tower.calls == [5]
        assert torch.allclose(rows, expected, atol=1e-5)
    assert compression.keeps_all([video], [36])


@pytest.mark.parametrize("method", ["average-linkage", "scc"])
def test_a_video_asked_again_is_searched_once_if_its_method_has_a_tree(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    searches: list[int] = []
    search = linkage.linkage_tree

    def counting(*args: Any, **options: Any) -> linkage.LinkageTree:
        searches.append(1)
        return search(*args, **options)

    monkeypatch.setattr(linkage, "linkage_tree", counting)
    compression, encode = make_compression(method, cache_gb=0.01), RecordingTower()
    [video] = make_videos(9)
    whole = compression.compressed(video, 36, encode)[0]
    for kept in (5, 3, 5, 30):
        [rows] = rows_of(compression, [video], [kept], encode)
        assert torch.equal(rows, get_compressor(method)(whole, kept).tokens)
    by_references = 4
    assert len(searches) == (1 + by_references if method == "average-linkage" else 0)
    compression.forget_features()
    rows_of(compression, [video], [5], encode)
    assert len(searches) == (2 + by_references if method == "average-linkage" else 0)


def test_with_an_adapter_in_the_tower_no_features_are_cached() -> None:
    for in_tower, calls in ((True, [5, 5]), (False, [5])):
        lora = SimpleNamespace(enable_tower_connector_lora=in_tower)
        compression, tower = make_compression(cache_gb=0.01, lora=lora), RecordingTower()
        for _ in range(2):
            rows_of(compression, make_videos(5), [2], tower)
        assert tower.calls == calls


def test_an_unknown_method_ends_the_start() -> None:
    with pytest.raises(ValueError, match=r"unknown video compression method.*scc.*uniform"):
        make_compression("sccc")


@pytest.mark.parametrize("rank", [0, 1])
def test_of_workers_that_share_a_model_the_first_alone_counts(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tower, "model_parallel_is_initialized", lambda: True)
    monkeypatch.setattr(tower, "get_tensor_model_parallel_rank", lambda: rank)
    monkeypatch.setattr(tower, "get_tensor_model_parallel_world_size", lambda: 1)
    VideoCompression._is_recording.cache_clear()
    try:
        compression = make_compression(cache_gb=0.01)
        before = counted()
        for num_retained in (5, 5, 3):
            rows_of(compression, make_videos(9), [num_retained], RecordingTower())
        added = {name: value - before[name] for name, value in counted().items()}
    finally:
        VideoCompression._is_recording.cache_clear()
    by_one = {"tower": 1, "compress": 3, "queries": 3, "hits": 2, "other ratios": 1, "found": 3}
    assert added == by_one if rank == 0 else not any(added.values())


def counted() -> dict[str, float]:
    def value(name: str, **labels: str) -> float:
        return REGISTRY.get_sample_value(f"scissor_vllm:{name}", labels) or 0.0

    return {
        "tower": value("video_stage_seconds_count", stage="tower"),
        "compress": value("video_stage_seconds_count", stage="compress"),
        "queries": value("video_cache_queries_total", cache="features"),
        "hits": value("video_cache_hits_total", cache="features"),
        "other ratios": value("video_cache_cross_ratio_hits_total"),
        "found": value("similarity_threshold_count"),
    }


def test_a_connector_that_sizes_rows_beforehand_ends_the_start() -> None:
    make_compression(transfer=SimpleNamespace(ec_connector="ECExampleConnector"))
    with pytest.raises(ValueError, match=r"must be ECExampleConnector with .*, got ECMoonc"):
        make_compression(transfer=SimpleNamespace(ec_connector="ECMooncakeConnector"))


def test_instances_that_would_name_videos_by_their_order_are_warned_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    transfer = SimpleNamespace(ec_connector="ECExampleConnector")
    warnings: list[str] = []
    monkeypatch.setattr(tower.logger, "warning", warnings.append)
    for connected, cache_gb, has_prefix_caching, is_warned in (
        (transfer, 0, False, True),
        (transfer, 0, True, False),
        (transfer, 4, False, False),
        (None, 0, False, False),
    ):
        make_compression(
            transfer=connected,
            processor_cache_gb=cache_gb,
            has_prefix_caching=has_prefix_caching,
        )
        assert ["rows of another video" in text for text in warnings] == [True] * is_warned
        warnings.clear()


def test_a_call_of_one_video_and_one_on_the_cpu_overlap_nothing() -> None:
    compression = make_compression()
    for num_videos in (1, 3):
        with compression.overlapping(num_videos, torch.device("cpu")):
            assert compression._overlap is None
    if not torch.cuda.is_available():
        return
    with compression.overlapping(1, torch.device("cuda")):
        assert compression._overlap is None


@pytest.mark.gpu
def test_on_a_gpu_videos_that_overlap_have_the_rows_that_each_has_alone() -> None:
    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(2)
    compression = make_compression("average-linkage", budget=100_000)
    weight = torch.randn(12, 196 * 256, device=device, generator=generator)

    def encode(frames: torch.Tensor) -> torch.Tensor:
        tokens = (frames.flatten(1) @ weight).view(len(frames), 196, 256)
        # Memory that is freed here is given out again while another stream compresses.
        for _ in range(8):
            tokens = tokens + torch.tanh(tokens)
        return tokens.bfloat16()

    videos = [
        VideoPixels(torch.randn(length, 3, 2, 2, device=device, generator=generator))
        for length in (32, 7, 16, 32)
    ]
    counts = [600, 100, 300, 62]
    alone = [rows_of(compression, [v], [k], encode)[0] for v, k in zip(videos, counts, strict=True)]
    main = torch.cuda.current_stream()
    for _ in range(20):
        with compression.overlapping(len(videos), device):
            rows = rows_of(compression, videos, counts, encode)
            assert torch.cuda.current_stream() != main
        assert torch.cuda.current_stream() == main
        for together, expected in zip(rows, alone, strict=True):
            assert torch.equal(together, expected)
        del rows

    def fail(frames: torch.Tensor) -> torch.Tensor:
        if len(frames) == len(videos[1]):
            raise KeyError
        return encode(frames)

    with pytest.raises(KeyError), compression.overlapping(len(videos), device):
        rows_of(compression, videos, counts, fail)
    assert torch.cuda.current_stream() == main
