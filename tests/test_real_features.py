"""The figures of real features, checked on synthetic features with known figures."""

from __future__ import annotations

import pytest
import torch

from bench.real_features.__main__ import _of_another_video, table
from bench.real_features.features import SEQUENCES
from bench.real_features.figures import measure
from bench.real_features.tasks import Task, dial_name, measure_task
from scissor_vllm.compression import CompressedTokens, get_compressor


def frames(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(7, 9, 24, generator=generator)


def whole(tokens: torch.Tensor, num_retained: int) -> CompressedTokens:
    flat = tokens.flatten(0, 1)
    return CompressedTokens(flat, torch.arange(len(flat)))


def mean(tokens: torch.Tensor, num_retained: int) -> CompressedTokens:
    flat = tokens.flatten(0, 1)
    return CompressedTokens(flat.mean(dim=0, keepdim=True), torch.zeros(len(flat)).long())


def test_keeping_all_covers_all_and_finds_every_needle() -> None:
    figures = measure(whole, frames(1), frames(2), 54, seed=0)
    assert figures.coverage == pytest.approx(1)
    assert figures.coverage_in_window == pytest.approx(1)
    assert figures.fvu == 0
    assert figures.needles == 1
    assert figures.change_by_shift == 0
    assert figures.change_by_noise == pytest.approx(0.05**2, rel=0.1)


def test_one_mean_of_all_explains_no_variance() -> None:
    figures = measure(mean, frames(1), frames(2), 1, seed=0)
    assert figures.fvu == pytest.approx(1)
    assert figures.needles == 0


def test_a_dropped_token_is_replaced_by_the_row_nearest_to_it() -> None:
    video = frames(1)
    flat, kept = video[:-1].flatten(0, 1), get_compressor("uniform")(video[:-1], 27)
    error = 0.0
    for token, row in zip(flat, kept.assignment.tolist(), strict=True):
        cosines = torch.nn.functional.cosine_similarity(token[None], kept.tokens)
        nearest = kept.tokens[row if row >= 0 else int(cosines.argmax())]
        error += float((token - nearest).square().sum())
    variance = float((flat - flat.mean(dim=0)).square().sum())
    figures = measure(get_compressor("uniform"), video, frames(2), 27, seed=0)
    assert (kept.assignment < 0).any()
    assert figures.fvu == pytest.approx(error / variance, rel=1e-5)


def test_needles_come_from_another_video_of_the_same_split() -> None:
    for split in ("validation", "test"):
        sequences = [sequence for sequence in SEQUENCES if sequence.split == split]
        for sequence in sequences:
            assert _of_another_video(sequence, sequences).video != sequence.video
    videos = [{s.video for s in SEQUENCES if s.split == split} for split in ("validation", "test")]
    assert not videos[0] & videos[1]


def test_the_table_has_means_and_the_cells_that_are_ahead() -> None:
    methods = ("scc-windows", "average-linkage", dial_name(0))
    task = Task("made up", 6, frames(1), frames(2), (0.5,), methods)
    rows = measure_task(task)
    assert [row["method"] for row in rows] == list(methods)
    lines = table(rows, 0.5).splitlines()
    assert len(lines) == 2 + len(methods)
    # Exponent 0 is average linkage.
    assert lines[3].split("|")[2:] == lines[4].split("|")[2:]
    assert lines[2].endswith("| - |")
    assert lines[3].endswith(" of 1 |")
