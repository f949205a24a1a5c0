"""Prints the API server's CPU time for one video before it reaches the engine, stock and ours.

    python -m bench.front_end [--threads N] [--frames N] [--size WxH | --clips FOLDER] [--cpu-time]
        [--tower-merging-max-ratio R] [--repeats N] [--burst N] [--json FILE]

The stages run as in the server, on one clip in the shapes of LLaVA-OneVision-7B, or on each clip of
a folder. Stock and ours take turns. The stages are: decode the file, hash it for vLLM's caches,
prepare it (Hugging Face's processor, placeholders), and send it through vLLM's serializer and a
socket. The last line is the work that moves to the model, here on the CPU. A GPU does it in a
fraction of a millisecond.

``--cpu-time`` prints the CPU time of all threads instead of elapsed time: what a video takes from
others under load. "send" has both ends of the socket. Malloc is tuned as in our server, for stock
too.

``--burst N`` also prepares N videos at once, in the threads of a server. It prints when the first
and when the last video is ready for the engine.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import zmq
from vllm.config import ModelConfig
from vllm.model_executor.models import llava_onevision as stock
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalKwargsItem
from vllm.multimodal.media import MediaWithBytes
from vllm.multimodal.processing import TimingContext
from vllm.multimodal.processing.inputs import ProcessorInputs
from vllm.multimodal.video import VIDEO_LOADER_REGISTRY
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from bench.model_shapes.llava_onevision import build
from bench.numbered_clips import make_clip
from scissor_vllm.allocator import keep_touched_memory
from scissor_vllm.loadtest.record import environment, write_json
from scissor_vllm.plugin import register
from scissor_vllm.settings import TOWER_MERGING_MAX_RATIO
from scissor_vllm.worker.video_pixels import take_video_pixels

RATIO = 0.1
MEDIA_THREADS = 8
"""vLLM's VLLM_MEDIA_LOADING_THREAD_COUNT; one more thread prepares the decoded videos."""
BURSTS = 3
TOWER_MERGING_OPTION = "--tower-merging-max-ratio"

_UNNAMED = {"video": ["request-0"]}
"""Without caches vLLM names each item by its request."""


class Link:
    """A socket like vLLM's from the API server to the engine, with both ends in this process."""

    def __init__(self, folder: str) -> None:
        context = zmq.Context(io_threads=2)
        address = f"ipc://{folder}/link"
        self._sender, self._receiver = context.socket(zmq.PUSH), context.socket(zmq.PULL)
        self._sender.bind(address)
        self._receiver.connect(address)
        self._encoder = MsgpackEncoder()
        self._decoder = MsgpackDecoder(MultiModalKwargsItem)

    def send(self, item: MultiModalKwargsItem) -> tuple[MultiModalKwargsItem, int]:
        """Return the received item and the number of bytes sent."""
        frames: list[Any] = []
        thread = threading.Thread(
            target=lambda: frames.extend(self._receiver.recv_multipart(copy=False))
        )
        thread.start()
        message = self._encoder.encode(item)
        self._sender.send_multipart(message, copy=False)
        thread.join()
        buffers = [frame.buffer for frame in frames]
        return self._decoder.decode(buffers), sum(map(len, buffers))


class Way:
    """A request's path to the engine: a video loader and a processor."""

    clock = staticmethod(time.perf_counter)
    """Seconds of the stages."""

    def __init__(self, loader: str, processor: Any, options: dict[str, object]) -> None:
        self.loader = VIDEO_LOADER_REGISTRY.load(loader)
        self.processor = processor
        self.options = options
        self.num_bytes = 0

    def stages(self, data: bytes, num_frames: int, link: Link) -> dict[str, float]:
        """Return the milliseconds of each stage of one request."""
        times: dict[str, float] = {}

        def timed(stage: str, work: Callable[[], Any]) -> Any:
            start = self.clock()
            result = work()
            times[stage] = (self.clock() - start) * 1e3
            return result

        processor = self.processor
        video = timed("decode", lambda: self.loader.load_bytes(data, num_frames=num_frames))
        inputs = self._inputs(video, data)
        timed("name", lambda: processor._get_mm_hashes(inputs))
        inputs.mm_uuid_items = _UNNAMED
        timing = TimingContext()
        output = timed("prepare", lambda: processor.apply(inputs, timing))
        if self.clock is time.perf_counter:
            times["of it, Hugging Face"] = timing.stage_secs["apply_hf_processor"] * 1e3
        (item,) = output["mm_kwargs"]["video"]
        arrived, self.num_bytes = timed("send", lambda: link.send(item))
        fields = {name: elem.data[None] for name, elem in arrived.items()}
        dtype = processor.info.ctx.model_config.dtype
        timed(
            "(in the model) normalize",
            lambda: [video.whole() for video in take_video_pixels(fields, dtype)],
        )
        return times

    def _inputs(self, video: Any, data: bytes) -> ProcessorInputs:
        items = self.processor.info.parse_mm_data({"video": [MediaWithBytes(video, data)]})
        text = self.processor.dummy_inputs.get_dummy_text({"video": 1})
        prompt = self.processor.info.get_tokenizer().encode(text)
        return ProcessorInputs(prompt, items, hf_processor_mm_kwargs=self.options)

    def burst(self, data: bytes, num_frames: int, num_videos: int) -> list[float]:
        """Return when each of ``num_videos`` simultaneous videos is prepared, in milliseconds."""
        decoders, preparer = ThreadPoolExecutor(MEDIA_THREADS), ThreadPoolExecutor(1)
        begin = time.perf_counter()

        def prepare(video: Any) -> float:
            inputs = self._inputs(video, data)
            inputs.mm_uuid_items = _UNNAMED
            self.processor.apply(inputs, TimingContext())
            return (time.perf_counter() - begin) * 1e3

        def decode() -> Future[float]:
            return preparer.submit(prepare, self.loader.load_bytes(data, num_frames=num_frames))

        with decoders, preparer:
            decoded = [decoders.submit(decode) for _ in range(num_videos)]
            return sorted(video.result().result() for video in decoded)


def make_ways(model: Path, merging_max_ratio: float = 0.0) -> dict[str, Way]:
    """Return stock's path and ours for one model."""
    register()
    settings = {TOWER_MERGING_MAX_RATIO: merging_max_ratio}
    config = ModelConfig(model=str(model), mm_processor_cache_gb=0, mm_processor_kwargs=settings)
    ours = MULTIMODAL_REGISTRY.create_processor(config)
    info = stock.LlavaOnevisionProcessingInfo(ours.info.ctx)
    dummy_inputs = stock.LlavaOnevisionDummyInputsBuilder(info)
    return {
        "stock": Way("opencv", stock.LlavaOnevisionMultiModalProcessor(info, dummy_inputs), {}),
        "ours": Way("pyav", ours, {"retention_ratio": RATIO}),
    }


def print_stages(runs: dict[str, list[dict[str, float]]]) -> None:
    """Print each stage's median, and the sum of the medians before the engine."""
    medians = {
        name: {stage: statistics.median(run[stage] for run in rows) for stage in rows[0]}
        for name, rows in runs.items()
    }
    for stages in medians.values():
        stages["front end"] = sum(stages[stage] for stage in ("decode", "prepare", "send"))
    for stage, before in medians["stock"].items():
        after = medians["ours"][stage]
        ratio = f"{after / before:7.2f}" if before > 0.1 else ""
        print(f"{stage:36} {before:7.1f} {after:7.1f} {ratio}")


def print_bursts(bursts: dict[str, list[list[float]]]) -> None:
    """Print when the first and the last video of a burst are ready, as medians over bursts."""
    num_videos = len(bursts["stock"][0])
    for place, name in ((0, "first"), (-1, "last")):
        before, after = (
            statistics.median(times[place] for times in bursts[way]) for way in ("stock", "ours")
        )
        line = f"{name} of {num_videos} at once"
        print(f"{line:36} {before:7.0f} {after:7.0f} {after / before:7.2f}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the times of all runs to this file")
    parser.add_argument("--threads", type=int, default=1, help="torch's, as in a server: 1")
    parser.add_argument("--frames", type=int, default=32, help="frames to sample (default: 32)")
    parser.add_argument("--size", default="640x360", help="of the clip (default: 640x360)")
    parser.add_argument("--clips", type=Path, metavar="FOLDER", help="clips to use instead")
    parser.add_argument("--cpu-time", action="store_true", help="CPU time of the stages")
    parser.add_argument(TOWER_MERGING_OPTION, type=float, default=0.0, metavar="R")
    parser.add_argument("--repeats", type=int, default=10, help="timed runs (default: 10)")
    parser.add_argument("--burst", type=int, default=0, metavar="N", help="videos at once")
    args = parser.parse_args()

    keep_touched_memory()
    torch.set_num_threads(args.threads)
    if args.cpu_time:
        Way.clock = staticmethod(time.process_time)
    width, height = map(int, args.size.split("x"))
    with tempfile.TemporaryDirectory() as folder:
        if args.clips:
            clips = [path.read_bytes() for path in sorted(args.clips.glob("*.mp4"))]
        else:
            clip = make_clip(Path(folder, "clip.mp4"), width=width, height=height, num_frames=64)
            clips = [clip.read_bytes()]
        model = Path(folder, "model")
        build("7b", model)
        ways, link = make_ways(model, args.tower_merging_max_ratio), Link(folder)
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
        for turn in range(args.repeats + 2):
            for data, (name, way) in itertools.product(clips, ways.items()):
                times = way.stages(data, args.frames, link)
                if turn >= 2:
                    runs[name].append(times)
        bursts: dict[str, list[list[float]]] = {name: [] for name in ways}
        for _ in range(BURSTS if args.burst else 0):
            for name, way in ways.items():
                bursts[name].append(way.burst(clips[0], args.frames, args.burst))
    num_bytes = {name: way.num_bytes for name, way in ways.items()}
    print(f"{f'median ms, {args.frames} frames of {args.size}':36}   stock    ours   ratio")
    print_stages(runs)
    before, after = (count / 2**20 for count in num_bytes.values())
    print(f"{'MiB sent':36} {before:7.1f} {after:7.1f} {after / before:7.2f}")
    if args.burst:
        print_bursts(bursts)
    if args.json:
        measured = {
            "unit": "ms",
            "clock": "CPU" if args.cpu_time else "elapsed",
            "clips": args.clips.name if args.clips else "drawn",
            "tower_merging_max_ratio": args.tower_merging_max_ratio,
            "num_frames": args.frames,
            "size": args.size,
            "num_threads": args.threads,
            "retention_ratio": RATIO,
            "num_bytes": num_bytes,
            "runs": runs,
            "bursts": bursts,
        }
        write_json(args.json, {"environment": environment(), **measured})


if __name__ == "__main__":
    main()
