"""Limits of decoding: bytes in flight over threads and processes, and clear errors."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from vllm.multimodal.video_decoders import VideoSourceMetadata, VideoTargetMetadata

from bench.numbered_clips import add_sound_and_cover, make_clip
from scissor_vllm.frontend.refusal import RefusedVideoError
from scissor_vllm.frontend.video.limits import MAX_DECODE_BYTES_VARIABLE, DecodingBudget
from scissor_vllm.frontend.video.loader import (
    PyAVVideoBackend,
    Qwen2VLPyAV,
    Qwen3VLPyAV,
    register_video_loader,
)
from scissor_vllm.metrics import Reason

LIMIT = 64_000


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    register_video_loader()


@pytest.fixture
def budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DecodingBudget:
    monkeypatch.setenv(MAX_DECODE_BYTES_VARIABLE, str(LIMIT))
    return DecodingBudget(tmp_path / "budget.lock")


# ---- Bytes in flight ----


def test_videos_decoded_at_once_stay_within_the_budget(budget: DecodingBudget) -> None:
    lock, held, most, at_once = threading.Lock(), 0, 0, 0

    def decode(num_bytes: int) -> None:
        nonlocal held, most, at_once
        with budget.reserve(num_bytes):
            with lock:
                held += num_bytes
                most, at_once = max(most, held), max(at_once, held > num_bytes)
            time.sleep(0.002)
            with lock:
                held -= num_bytes

    sizes = [1000, 20_000, 33_000, 64_000, 5000, 48_000] * 6
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(decode, sizes))
    assert 48_000 <= most <= LIMIT
    assert at_once


def test_a_video_larger_than_the_budget_is_decoded_alone(budget: DecodingBudget) -> None:
    taken = threading.Event()

    def take_a_little() -> None:
        with budget.reserve(1):
            taken.set()

    with budget.reserve(10 * LIMIT):
        thread = threading.Thread(target=take_a_little)
        thread.start()
        assert not taken.wait(0.1)
    assert taken.wait(10)
    thread.join()


OTHER_PROCESS = """
import sys, time
from pathlib import Path
from scissor_vllm.frontend.video.limits import DecodingBudget
with DecodingBudget(Path(sys.argv[1])).reserve(int(sys.argv[2])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_processes_share_the_budget_and_one_that_dies_gives_its_share_back(
    budget: DecodingBudget, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", OTHER_PROCESS, str(tmp_path / "budget.lock"), str(LIMIT // 2)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with budget.reserve(LIMIT // 2):
            pass
        taken = threading.Event()

        def take_all() -> None:
            with budget.reserve(LIMIT):
                taken.set()

        thread = threading.Thread(target=take_all)
        thread.start()
        assert not taken.wait(0.1)
        other.kill()
        assert taken.wait(10)
        thread.join()


def test_without_a_place_for_its_file_nothing_is_bounded_and_nothing_fails(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    budget = DecodingBudget(tmp_path / "missing" / "budget.lock")
    for _ in range(2):
        with budget.reserve(10**15):
            pass
    assert len([line for line in caplog.messages if "not bounded" in line]) <= 1


# ---- What a request may be refused for ----


@pytest.mark.parametrize("max_frames", [0, 1])
@pytest.mark.parametrize("loader", [Qwen2VLPyAV, Qwen3VLPyAV])
def test_options_that_leave_no_frame_are_refused(
    loader: type[PyAVVideoBackend], max_frames: int, tmp_path: Path
) -> None:
    data = make_clip(tmp_path / "clip.mp4", num_frames=8, width=64, height=64).read_bytes()
    if loader is Qwen3VLPyAV and max_frames == 1:
        assert len(loader.load_bytes(data, max_frames=max_frames)[0]) == 1
        return
    with pytest.raises(RefusedVideoError, match=f"'max_frames': {max_frames}.*raise num_frames"):
        loader.load_bytes(data, max_frames=max_frames)


@pytest.mark.parametrize("loader", [PyAVVideoBackend, Qwen2VLPyAV, Qwen3VLPyAV])
def test_a_video_of_one_frame_gives_it(loader: type[PyAVVideoBackend], tmp_path: Path) -> None:
    data = make_clip(tmp_path / "one.mp4", num_frames=1, width=64, height=64).read_bytes()
    frames, metadata = loader.load_bytes(data)
    assert (len(frames), metadata["frames_indices"], metadata["total_num_frames"]) == (1, [0], 1)


def test_from_two_frames_on_qwen_is_sampled_as_by_vllm() -> None:
    from vllm.multimodal.video import Qwen2VLVideoBackend

    target = VideoTargetMetadata(-1, 2, 300)
    for num_frames in (2, 3, 5, 100, 2000):
        source = VideoSourceMetadata(num_frames, 30.0, num_frames / 30)
        expected = Qwen2VLVideoBackend.compute_frames_index_to_sample(source, target)
        assert Qwen2VLPyAV.compute_frames_index_to_sample(source, target) == expected


def test_a_cover_picture_is_no_video(tmp_path: Path) -> None:
    data = add_sound_and_cover(None, tmp_path / "song.mp4").read_bytes()
    with pytest.raises(RefusedVideoError, match="sound and a cover picture") as refused:
        PyAVVideoBackend.load_bytes(data)
    assert refused.value.reason is Reason.UNREADABLE_VIDEO


def test_opencv_is_not_given_interlaced_videos(tmp_path: Path) -> None:
    options = {"x264-params": "tff=1", "flags": "+ildct+ilme"}
    clip: dict[str, Any] = {"num_frames": 8, "width": 64, "height": 64}
    data = make_clip(tmp_path / "fields.mkv", options=options, **clip).read_bytes()
    with pytest.raises(RefusedVideoError, match="must not be interlaced"):
        PyAVVideoBackend.load_bytes(data, backend="opencv")
    assert len(PyAVVideoBackend.load_bytes(data)[0]) == 8
    whole = make_clip(tmp_path / "frames.mkv", **clip).read_bytes()
    assert len(PyAVVideoBackend.load_bytes(whole, backend="opencv")[0]) == 8


# ---- Data URLs ----
