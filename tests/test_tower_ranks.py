"""Frames shared out among ranks: each is encoded once, and every rank has all tokens."""

import pytest
import torch

from scissor_vllm.patch_merging import GROUP_FRAMES
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

    def __init__(self) -> None:
        self.parts: list[torch.Tensor] = []
        self.is_recording = True

    def __call__(self, part: torch.Tensor, dim: int) -> torch.Tensor:
        assert dim == 0
        assert part.is_contiguous()
        if self.is_recording:
            self.parts.append(part)
            return part
        return torch.cat(self.parts)


def encode_by(
    num_ranks: int,
    pixels: torch.Tensor,
    anchors: torch.Tensor | None,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[list[torch.Tensor], list[int]]:
    """Return what each rank returns, and how many frames it encodes."""
    exchange = Exchange()
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


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@pytest.mark.parametrize("num_frames", [1, 2, 5, 8, 30])
@pytest.mark.parametrize("merges", [False, True])
def test_every_rank_has_the_tokens_of_one(
    num_ranks: int, num_frames: int, merges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(num_frames)
    pixels = torch.rand(num_frames, 1, NUM_PATCHES, 4)
    anchors = None
    if merges:
        frames = torch.arange(num_frames)[:, None]
        anchors = torch.where(
            torch.rand(num_frames, NUM_PATCHES) < 0.5, frames, frames - frames % GROUP_FRAMES
        )
    tokens, counts = encode_by(num_ranks, pixels, anchors, monkeypatch)
    for of_rank in tokens:
        assert torch.equal(of_rank, tower(pixels, anchors))
    # No rank encodes more than its share, in whole groups if patches are merged.
    group = GROUP_FRAMES if merges else 1
    assert set(counts) == {frames_per_rank(num_frames, num_ranks, group)}
    assert max(counts) < num_frames / num_ranks + group
