"""Searches near-still bfloat16 clips on a GPU, and counts those that do not leave K parts.

    python -m bench.near_still_search [--searches N] [--branches B] [--seconds S] [--json FILE]

In such clips the number of components is not monotone in the threshold, the case in which a search
can go wrong. One CUDA graph makes B clips by the GPU's generator and searches each on a branch of
its own; a replay is then B new searches, without the host. Frames, tokens of a frame, noise, window
and K differ by branch. Prints how many searches failed, and the rate.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from scissor_vllm.compression.cuda import SearchSettings
from scissor_vllm.compression.cuda.kernels import layout
from scissor_vllm.compression.cuda.search import Search
from scissor_vllm.compression.cuda.video import Video
from scissor_vllm.compression.scc import LINE_STEPS, THRESHOLD_MARGIN
from scissor_vllm.loadtest.record import environment, write_json

WIDTH = 16


@dataclass(frozen=True)
class Kind:
    """What a branch searches."""

    num_frames: int
    per_frame: int
    noise: float
    num_retained: int
    window: int

    @classmethod
    def of(cls, branch: int) -> Kind:
        """Return the kind of a branch, so that all differ."""
        num_frames, per_frame = 3 + branch % 5, (7, 9, 12, 16, 25, 49)[branch % 6]
        num_tokens = num_frames * per_frame
        window = (num_frames, 4, 2)[branch % 3]
        share = (0.03, 0.1, 0.25, 0.5, 0.8)[branch % 5]
        least = -(-num_frames // window)
        kept = max(least, int(share * num_tokens))
        return cls(num_frames, per_frame, 2.0 ** -(5 + branch % 7), kept, window)


class Branch:
    """One clip after another of a kind, and the count of searches that failed."""

    def __init__(self, kind: Kind, device: torch.device) -> None:
        self._kind = kind
        self.stream = torch.cuda.Stream(device)
        self._device = device
        self.num_failed = torch.zeros(1, dtype=torch.int64, device=device)

    def launch(self) -> None:
        """Make a clip, search it, and count a failure; on the current stream."""
        kind, device = self._kind, self._device
        scene = torch.randn(1, kind.per_frame, WIDTH, device=device)
        change = torch.randn(kind.num_frames, kind.per_frame, WIDTH, device=device)
        tokens = (scene + kind.noise * change).bfloat16()
        num_tokens = kind.num_frames * kind.per_frame
        video = Video(tokens, kind.window, kind.num_retained, num_components=num_tokens)
        Search(video.passes, SearchSettings(LINE_STEPS, THRESHOLD_MARGIN, kind.window)).start()
        workspace = video.passes.workspace
        has_k = workspace.number[num_tokens - 1] == kind.num_retained
        is_over = workspace.outcome[layout.OUTCOME_FLAGS] == 0
        self.num_failed += ~(has_k & is_over)


def main() -> None:
    """Search and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--searches", type=int, default=10**6)
    parser.add_argument("--branches", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=600.0, help="end after so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    args = parser.parse_args()
    result = search(args.searches, args.branches, args.seconds, args.seed)
    print(result)
    if args.json:
        write_json(args.json, {"environment": environment(), **result})
    if result["failed"]:
        raise SystemExit(1)


def search(
    num_searches: int, num_branches: int, seconds: float = 600.0, seed: int = 0
) -> dict[str, float]:
    """Return how many searches were made, how many failed, and how long it took."""
    device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.manual_seed(seed)
    branches = [Branch(Kind.of(number), device) for number in range(num_branches)]
    main_stream = torch.cuda.Stream(device)
    with torch.cuda.stream(main_stream):
        for branch in branches:
            branch.launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=main_stream):
        for branch in branches:
            branch.stream.wait_stream(main_stream)
            with torch.cuda.stream(branch.stream):
                branch.launch()
        for branch in branches:
            main_stream.wait_stream(branch.stream)
    for branch in branches:
        branch.num_failed.zero_()
    torch.cuda.synchronize()
    begin, num_replays = time.perf_counter(), 0
    while num_replays * num_branches < num_searches and time.perf_counter() - begin < seconds:
        for _ in range(16):
            graph.replay()
        num_replays += 16
        torch.cuda.synchronize()
    took = time.perf_counter() - begin
    failed = sum(int(branch.num_failed) for branch in branches)
    return {"searches": num_replays * num_branches, "failed": failed, "seconds": round(took, 1)}


if __name__ == "__main__":
    main()
