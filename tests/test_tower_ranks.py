"""Frames shared out among ranks: each is encoded once, and every rank has all tokens."""

from itertools import combinations, pairwise

import pytest
import torch

from scissor_vllm.patch_merging import group_lengths
from scissor_vllm.worker import tower_ranks
from scissor_vllm.worker.tower_ranks import encode_on_all_ranks, frames_per_rank

NUM_PATCHES, WIDTH = 9, 5


def tower(pixels: torch.Tensor, anchors: torch.Tensor | None) -> torch.Tensor:
    """Tokens of a frame: its own patches, or those of the frames that its anchors name."""
    patches = pixels.flatten(1).view(len(pixels), NUM_PATCHES, -1)
    if anchors is not None:
        patches = patches[anchors, torch.arange(NUM_PATCHES)]
    return patches @ torch.arange(1.0, 1 + patches.shape[-1] * WIDTH).view(-1, WIDTH)


class Exchange:
    """An all-gather: ranks run one after the other, first to record, then to receive."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self.parts: list[torch.Tensor] = []
        self.is_recording = True

    def __call__(self, part: torch.Tensor, dim: int) -> torch.Tensor:
        assert dim == 0
        assert part.is_contiguous()
        if self.is_recording:
            self.parts.append(part)
            return torch.cat([part] * self.num_ranks)
        return torch.cat(self.parts)


def encode_by(
    num_ranks: int,
    pixels: torch.Tensor,
    anchors: torch.Tensor | None,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[list[torch.Tensor], list[int]]:
    """Return what each rank returns, and how many frames it encodes."""
    exchange = Exchange(num_ranks)
    monkeypatch.setattr(tower_ranks, "tensor_model_parallel_all_gather", exchange)
    results: list[torch.Tensor] = []
    counts: list[int] = []

    def here(pixels: torch.Tensor, anchors: torch.Tensor | None) -> torch.Tensor:
        counts.append(len(pixels))
        return tower(pixels, anchors)

    for is_recording in (True, False):
        exchange.is_recording = is_recording
        for rank in range(num_ranks):
            monkeypatch.setattr(tower_ranks, "get_tensor_model_parallel_rank", lambda r=rank: r)
            results.append(encode_on_all_ranks(here, pixels, anchors, num_ranks))
    return results[num_ranks:], counts[num_ranks:]


def merged(num_frames: int, whole: int | None = None) -> torch.Tensor:
    """Anchors of patches that join the first frame of their group at random, but of none in a
    frame that is computed whole.
    """
    anchors = torch.arange(num_frames)[:, None].repeat(1, NUM_PATCHES)
    first = 0
    for length in group_lengths(num_frames):
        for frame in range(first + 1, first + length):
            if frame != whole:
                joins = torch.rand(NUM_PATCHES) < 0.5
                joins[frame % NUM_PATCHES] = True
                anchors[frame, joins] = first if whole not in range(first, frame) else whole
        first += length
    return anchors


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("num_frames", [1, 2, 5, 8, 30, 32])
@pytest.mark.parametrize("merges", [False, True])
def test_every_rank_has_the_tokens_of_one(
    num_ranks: int, num_frames: int, merges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(num_frames)
    pixels = torch.rand(num_frames, 1, NUM_PATCHES, 4)
    anchors = merged(num_frames) if merges else None
    tokens, counts = encode_by(num_ranks, pixels, anchors, monkeypatch)
    for of_rank in tokens:
        assert torch.equal(of_rank, tower(pixels, anchors))
    # All ranks exchange as many frames, no more than the longest share.
    shares = frames_per_rank(num_frames, num_ranks, anchors)
    assert sum(shares) == num_frames
    assert set(counts) == {max(shares)}


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("whole", [None, 8, 14])
def test_no_cut_between_groups_has_a_shorter_longest_share(
    num_ranks: int, whole: int | None
) -> None:
    torch.manual_seed(0)
    for num_frames in (1, 6, 7, 19, 32):
        anchors = merged(num_frames, whole)
        # A frame from which on no patch stands for an earlier frame's.
        begins = [n for n in range(1, num_frames) if (anchors[n:] >= n).all()]
        longest = [
            max(end - begin for begin, end in pairwise([0, *cuts, num_frames]))
            for num_cuts in range(num_ranks)
            for cuts in combinations(begins, num_cuts)
        ]
        assert max(frames_per_rank(num_frames, num_ranks, anchors)) == min(longest)
    assert max(frames_per_rank(32, num_ranks, None)) == 32 // num_ranks or num_ranks == 3
