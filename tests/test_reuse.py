"""Caches of a video: keyed by content, bounded, and bitwise equal to what was stored."""

from __future__ import annotations

import math
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from scissor_vllm.frontend.frame_cache import FrameCache, held_bytes
from scissor_vllm.settings import CacheSizes
from scissor_vllm.worker import feature_cache
from scissor_vllm.worker.feature_cache import FeatureCache

CPU = torch.device("cpu")
MIB = 1024**2
GIB = 1024**3


class Decoder:
    """Makes frames of a size and counts how often."""

    def __init__(self, num_bytes: int = 100) -> None:
        self.num_bytes = num_bytes
        self.count = 0

    def __call__(self) -> tuple[Any, dict[str, Any]]:
        self.count += 1
        return np.full(self.num_bytes, self.count, dtype=np.uint8), {"frames_indices": [0, 5]}


# Decoded frames.


def test_a_video_is_decoded_once() -> None:
    frames, decoder = FrameCache(1000), Decoder()
    first, metadata = frames.get("a", decoder)
    second, same_metadata = frames.get("a", decoder)
    assert decoder.count == 1
    assert second is first
    assert same_metadata == metadata == {"frames_indices": [0, 5]}


def test_cached_frames_are_read_only() -> None:
    frames, decoder = FrameCache(1000), Decoder()
    for _ in range(2):
        video, metadata = frames.get("a", decoder)
        with pytest.raises(ValueError, match="read-only"):
            video[0] = 9
        assert metadata["frames_indices"] == [0, 5]
        metadata["frames_indices"].append(9)


def test_frames_stay_within_their_bytes_and_the_longest_unused_go_first() -> None:
    frames, decoder = FrameCache(350), Decoder(100)
    for key in ("a", "b", "c", "a", "d", "e"):
        frames.get(key, decoder)
        assert frames.num_bytes <= 350
    # c, b went for d and e.
    decoder.count = 0
    for key, count in (("a", 0), ("d", 0), ("e", 0), ("b", 1)):
        frames.get(key, decoder)
        assert decoder.count == count


def test_a_view_is_cached_without_its_base() -> None:
    frames = FrameCache(1000)
    whole = np.zeros((10, 500), dtype=np.uint8)
    kept, _ = frames.get("view", lambda: (whole[:1, ::2], {}))
    assert kept.base is None
    assert frames.num_bytes == held_bytes(kept) == 250
    assert held_bytes(whole[:1]) == held_bytes(np.frombuffer(bytes(5000), np.uint8)[:9]) == 5000


def test_a_video_larger_than_the_cache_displaces_nothing() -> None:
    frames, small, large = FrameCache(350), Decoder(100), Decoder(351)
    frames.get("small", small)
    frames.get("large", large)
    frames.get("large", large)
    frames.get("small", small)
    assert (small.count, large.count) == (1, 2)


def test_a_cache_of_size_zero_stores_nothing_and_leaves_frames_writable() -> None:
    frames, decoder = FrameCache(), Decoder()
    for _ in range(2):
        video, _ = frames.get("a", decoder)
        video[0] = 9
    assert decoder.count == 2
    frames.resize(1000)
    frames.get("a", decoder)
    assert frames.num_bytes == 100
    frames.resize(0)
    assert frames.num_bytes == 0


def test_threads_that_want_one_video_wait_for_one_decode() -> None:
    frames, started, go_on = FrameCache(1000), threading.Event(), threading.Event()
    decoder = Decoder()

    def slow() -> tuple[Any, dict[str, Any]]:
        started.set()
        go_on.wait(10)
        return decoder()

    with ThreadPoolExecutor(6) as pool:
        waiting = [pool.submit(frames.get, "a", slow) for _ in range(5)]
        started.wait(10)
        # Another video is not held up.
        other_decoder = Decoder()
        pool.submit(frames.get, "b", other_decoder).result(10)
        assert other_decoder.count == 1
        go_on.set()
        videos = [future.result(10)[0] for future in waiting]
    assert decoder.count == 1
    assert all(video is videos[0] for video in videos)
    assert frames._decoding == {}


def test_a_failed_decode_is_not_cached() -> None:
    frames, decoder = FrameCache(1000), Decoder()

    def broken() -> tuple[Any, dict[str, Any]]:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        frames.get("a", broken)
    frames.get("a", decoder)
    assert decoder.count == 1


# Tokens of the tower.


def tokens(num_mib: float, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    num_frames = round(num_mib * MIB / 4 / 64 / dtype.itemsize)
    return torch.randn(num_frames, 4, 64, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [0.01, 1, 2.3])
def test_tokens_come_back_to_the_bit(dtype: torch.dtype, size: float) -> None:
    cache, kept = FeatureCache(8 * MIB), tokens(size, seed=1, dtype=dtype)
    cache.put(b"a", kept)
    cache.put(b"b", tokens(size, seed=2, dtype=dtype))
    cached = cache.get(b"a", CPU)
    assert cached is not None
    assert (cached.dtype, cached.is_contiguous()) == (dtype, True)
    assert torch.equal(cached, kept)
    # What the caller does to it changes nothing.
    cached.zero_()
    again = cache.get(b"a", CPU)
    assert again is not None
    assert torch.equal(again, kept)


def test_tokens_that_lie_apart_in_memory_are_kept_as_well() -> None:
    cache, kept = FeatureCache(8 * MIB), tokens(2, seed=1).transpose(0, 1)
    cache.put(b"a", kept)
    cached = cache.get(b"a", CPU)
    assert cached is not None
    assert torch.equal(cached, kept)


def test_tokens_stay_within_their_pages_whatever_comes() -> None:
    cache = FeatureCache(5 * MIB)
    rng = np.random.default_rng(0)
    sizes = {key: float(rng.uniform(0.1, 6)) for key in range(12)}
    oracle: list[int] = []

    def pages(key: int) -> int:
        return math.ceil(tokens(sizes[key], key).nbytes / MIB)

    for key in rng.integers(0, 12, 300).tolist():
        cached = cache.get(key, CPU)
        assert (cached is not None) == (key in oracle)
        if cached is not None:
            oracle.remove(key)
            oracle.append(key)
            assert torch.equal(cached, tokens(sizes[key], key))
            continue
        cache.put(key, tokens(sizes[key], key))
        if pages(key) <= 5:
            oracle.append(key)
            while sum(map(pages, oracle)) > 5:
                oracle.pop(0)
    assert oracle


@pytest.mark.parametrize("size", [0.01, 0.999, 2.3])
def test_a_tree_is_kept_beside_its_video_and_goes_with_it(size: float) -> None:
    tree = torch.arange(3000, dtype=torch.int32).view(2, -1)
    cache, kept = FeatureCache(4 * MIB), tokens(size, seed=1)
    cache.put_tree(b"a", tree)
    assert cache.get_tree(b"a", CPU) is None
    cache.put(b"a", kept, tree_bytes=tree.nbytes)
    assert cache.get_tree(b"a", CPU) is None
    for new_tree in (tree, tree + 1):
        cache.put_tree(b"a", new_tree)
        cached, cached_tree = cache.get(b"a", CPU), cache.get_tree(b"a", CPU)
        assert cached is not None
        assert cached_tree is not None
        assert torch.equal(cached, kept)
        assert torch.equal(cached_tree, tree)
    cache.put(b"b", tokens(3.5, seed=2))
    assert cache.get_tree(b"a", CPU) is None


def test_room_for_a_tree_is_part_of_the_bound() -> None:
    cache = FeatureCache(2 * MIB)
    cache.put(b"a", tokens(2, seed=1), tree_bytes=8)
    assert cache.get(b"a", CPU) is None
    cache.put(b"a", tokens(2, seed=1))
    assert cache.get(b"a", CPU) is not None


def test_a_cleared_cache_is_empty_and_has_its_whole_room() -> None:
    cache = FeatureCache(2 * MIB)
    cache.put(b"a", tokens(2, seed=1))
    cache.clear()
    assert cache.get(b"a", CPU) is None
    cache.put(b"b", tokens(2, seed=2))
    assert cache.get(b"b", CPU) is not None


def test_a_video_whose_copy_failed_is_not_found_and_leaves_its_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = FeatureCache(max_bytes=2 * 1024**2)
    video, tree = tokens(1.5, seed=1), torch.arange(9)

    copies = 0

    def fail_first(*args: Any) -> None:
        nonlocal copies
        copies += 1
        if copies in {1, 2, 4}:
            raise RuntimeError("a launch failed")
        write(*args)

    write = cache._write
    monkeypatch.setattr(cache, "_write", fail_first)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="a launch"):
            cache.put(b"a", video, tree_bytes=tree.nbytes)
        assert cache.get(b"a", CPU) is None
    cache.put(b"a", video, tree_bytes=tree.nbytes)
    with pytest.raises(RuntimeError, match="a launch"):
        cache.put_tree(b"a", tree)
    assert cache.get_tree(b"a", CPU) is None
    cache.put_tree(b"a", tree)
    for cached, original in [(cache.get(b"a", CPU), video), (cache.get_tree(b"a", CPU), tree)]:
        assert cached is not None
        assert torch.equal(cached, original)


def test_a_cached_video_is_not_stored_twice() -> None:
    cache = FeatureCache(3 * MIB)
    cache.put(b"a", tokens(1, seed=1))
    for _ in range(5):
        cache.put(b"b", tokens(1, seed=2))
    assert cache.get(b"a", CPU) is not None


def test_no_memory_is_taken_before_a_video_comes_and_no_more_than_the_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    empty = torch.empty
    taken: list[int] = []

    def counted(shape: Any, **options: Any) -> torch.Tensor:
        memory = empty(shape, **options)
        if options.get("dtype") is torch.uint8:
            taken.append(memory.nbytes // MIB)
        return memory

    monkeypatch.setattr(torch, "empty", counted)
    cache = FeatureCache(100 * MIB)
    assert not taken
    for seed in range(8):
        cache.put(seed, tokens(30, seed=seed))
    assert taken == [64, 36]


def test_memory_that_cannot_be_had_leaves_what_there_is_and_names_the_setting(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    empty = torch.empty
    taken: list[Any] = []

    def scarce(shape: Any, **options: Any) -> torch.Tensor:
        if options.get("dtype") is torch.uint8:
            if taken:
                raise RuntimeError("CUDA error: out of memory")
            taken.append(shape)
        return empty(shape, **options)

    monkeypatch.setattr(torch, "empty", scarce)
    warnings: list[str] = []
    monkeypatch.setattr(feature_cache.logger, "warning", lambda text, *a: warnings.append(text % a))
    cache = FeatureCache(100 * MIB)
    for seed in range(4):
        cache.put(seed, tokens(30, seed=seed))
    assert warnings == [
        f"video_feature_cache_gb must fit in host memory, but of {100 * MIB} bytes only {64 * MIB} "
        "could be had: lower it"
    ]
    cached = [cache.get(seed, CPU) for seed in range(4)]
    assert [video is not None for video in cached] == [False, False, True, True]
    assert torch.equal(cached[3], tokens(30, seed=3))  # type: ignore[arg-type]


class Shared(feature_cache.Sharing):
    """Workers of one process, called in turn: what the first says the others hear."""

    def __init__(self, messages: list[Any], is_owner: bool) -> None:
        self.is_owner = is_owner
        self._messages = messages

    def agree(self, value: bool) -> bool:
        return bool(self._next(value))

    def share(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self._next(tokens))

    def _next(self, value: Any) -> Any:
        if self.is_owner:
            self._messages.append(value)
            return value
        return self._messages.pop(0)


def test_of_workers_with_the_same_tokens_one_keeps_them_and_all_find_them() -> None:
    messages: list[Any] = []
    owner, follower = (
        FeatureCache(70 * MIB, sharing=Shared(messages, is_owner=o)) for o in (True, False)
    )
    rng = np.random.default_rng(1)
    for key in rng.integers(0, 5, 40).tolist():
        cached = [cache.get(key, CPU) for cache in (owner, follower)]
        assert (cached[0] is None) == (cached[1] is None)
        if cached[0] is None:
            for cache in (owner, follower):
                cache.put(key, tokens(20, seed=key))
        else:
            assert torch.equal(cached[1], tokens(20, seed=key))  # type: ignore[arg-type]
        assert not messages
    assert owner._pages
    assert not follower._pages


WORKER = """
import sys
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from scissor_vllm.worker.feature_cache import FeatureCache
from scissor_vllm.worker.video_compression import make_sharing

rank, port = int(sys.argv[1]), sys.argv[2]
with set_current_vllm_config(VllmConfig()):
    init_distributed_environment(2, rank, f"tcp://127.0.0.1:{port}", rank, "gloo")
    initialize_model_parallel(2)
cache = FeatureCache(70 << 20, sharing=make_sharing())
found = []
for key in (0, 1, 0, 2, 3, 4, 0, 1, 4):
    tokens = torch.full((5, 1 << 20), float(key))
    kept = cache.get(key, torch.device("cpu"))
    if kept is None:
        cache.put(key, tokens)
    else:
        assert torch.equal(kept, tokens)
    found.append(kept is not None)
print("RESULT", "".join("ny"[each] for each in found), len(cache._pages))
"""


@pytest.mark.slow
def test_workers_of_tensor_parallelism_take_the_memory_once() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), port], stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    printed = [worker.communicate(timeout=300)[0] for worker in workers]
    results = [text.split("RESULT ")[1].split()[:2] for text in printed]
    assert results == [["nnynnnnny", "70"], ["nnynnnnny", "0"]]


@pytest.mark.gpu
def test_tokens_of_a_gpu_come_back_to_the_bit_without_a_wait() -> None:
    cache = FeatureCache(64 * MIB, pin_memory=True)
    kept = [tokens(20, seed).cuda() for seed in range(5)]
    for seed, video_tokens in enumerate(kept):
        cache.put(seed, video_tokens)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda.set_sync_debug_mode("error")
        try:
            cached = {seed: cache.get(seed, torch.device("cuda")) for seed in (4, 2, 3)}
        finally:
            torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    for seed, copied in cached.items():
        assert copied is not None
        assert torch.equal(copied, kept[seed])


# Settings.


def test_sizes_are_those_that_were_set_or_the_defaults() -> None:
    assert CacheSizes.of(None, 4) == CacheSizes(frames=GIB, features=2 * GIB)
    settings = {"video_frame_cache_gb": 0.5, "video_feature_cache_gb": 0}
    assert CacheSizes.of(settings, 4) == CacheSizes(frames=GIB // 2, features=0)


def test_with_vllms_own_cache_off_they_are_off_unless_set() -> None:
    assert CacheSizes.of({}, 0) == CacheSizes(frames=0, features=0)
    settings = {"video_feature_cache_gb": 1}
    assert CacheSizes.of(settings, 0) == CacheSizes(frames=0, features=GIB)


@pytest.mark.parametrize("name", ["video_frame_cache_gb", "video_feature_cache_gb"])
@pytest.mark.parametrize("size", [-1, math.nan, math.inf, "1", True, None])
def test_a_size_that_is_none_is_refused_by_its_name(name: str, size: object) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"{name} must be .* GiB, got"):
        CacheSizes.of({name: size}, 4)


def test_a_cached_video_counts_as_hit_at_another_ratio_once_for_each_new_ratio() -> None:
    cache = FeatureCache(4 * MIB)
    cache.put("a", torch.zeros(8))
    asked = [("a", 5), ("a", 5), ("a", 3), ("a", 5), ("a", 3), ("b", 5), ("b", 3)]
    answers = [cache.is_for_another_ratio(key, num_retained) for key, num_retained in asked]
    assert answers == [False, False, True, False, False, False, False]
    cache.clear()
    cache.put("a", torch.zeros(8))
    assert not cache.is_for_another_ratio("a", 3), "what was forgotten begins anew"
