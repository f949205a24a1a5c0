"""Prints the CPU time of a Qwen-VL video processor as vLLM calls it, and with frames as output.

Run ``python -m bench.qwen_processor``. Both outputs are uint8, which vLLM normalizes on the device.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from transformers import Qwen2VLVideoProcessor, Qwen3VLVideoProcessor

from scissor_vllm.frontend.patch_transport import sending_frames

SHAPE = (32, 360, 640, 3)
ROUNDS = 6
OPTIONS = {
    "do_sample_frames": False,
    "do_rescale": False,
    "do_normalize": False,
    "return_tensors": "pt",
}
PROCESSORS = {
    "Qwen2.5-VL": lambda: Qwen2VLVideoProcessor(
        size={"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * 768}
    ),
    "Qwen3-VL": Qwen3VLVideoProcessor,
}


class _Holder:
    """Stands for a processor; only its video processor is used."""

    def __init__(self, video_processor: Any) -> None:
        self.video_processor = video_processor


def milliseconds(video_processor: Any, video: np.ndarray) -> float:
    """Return the least CPU time of several rounds, in this thread."""
    taken = []
    for _ in range(ROUNDS):
        begin = time.thread_time()
        video_processor([video], **OPTIONS)
        taken.append(time.thread_time() - begin)
    return min(taken) * 1e3


def main() -> None:
    """Print a line for each family."""
    torch.set_num_threads(1)
    video = np.random.default_rng(0).integers(0, 256, SHAPE, dtype=np.uint8)
    for name, make in PROCESSORS.items():
        stock = make()
        ours = sending_frames(_Holder(stock), vllm_normalizes=True).video_processor
        before, after = milliseconds(stock, video), milliseconds(ours, video)
        print(f"{name}: vLLM {before:.1f} ms, frames {after:.1f} ms, ratio {after / before:.2f}")


if __name__ == "__main__":
    main()
