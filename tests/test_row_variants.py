"""Variants of average linkage's rows, and the benchmark that asks about them."""

from __future__ import annotations

import re
from typing import Any

import torch

from bench.row_order import by_answer, clip_seeds, join, table
from bench.row_variants import (
    VARIANTS,
    WHOLE,
    Video,
    as_compressor,
    by_cuts,
    equal_windows,
    every_4_frames,
    near_in_place,
    rows_of,
)

NUM_FRAMES, PER_FRAME, WIDTH = 10, 16, 8


def make_video(seed: int = 0) -> Video:
    generator = torch.Generator().manual_seed(seed)
    things = torch.randn(PER_FRAME, WIDTH, generator=generator)
    noise = torch.randn(NUM_FRAMES, PER_FRAME, WIDTH, generator=generator)
    return Video(things + 0.4 * noise)


def test_every_variant_makes_k_rows_in_increasing_positions() -> None:
    video = make_video()
    for name, variant in VARIANTS.items():
        for num_rows in (3, 16, 80):
            rows = variant(video, num_rows)
            assert rows.tokens.shape == (num_rows, WIDTH), name
            if rows.positions is not None:
                assert rows.positions[0] == 0
                assert (rows.positions.diff() >= 0).all()


def test_variants_of_whole_frames_keep_whole_frames() -> None:
    for name, variant in WHOLE.items():
        assert len(variant(make_video(), 1).tokens) % PER_FRAME == 0, name


def test_the_parts_of_a_variant_are_by_default_the_methods() -> None:
    video = make_video()
    for num_rows in (3, 16, 40, 41, 80, 150):
        method, variant = VARIANTS["method"](video, num_rows), rows_of()(video, num_rows)
        assert torch.equal(variant.tokens, method.tokens)
        assert variant.assignment is not None
        assert method.assignment is not None
        assert torch.equal(variant.assignment, method.assignment)


def test_rows_are_the_means_of_the_tokens_that_are_assigned_to_them() -> None:
    video = make_video()
    for name in (
        "member: centroid",
        "windows: cuts 0.9",
        "near in place: 1 0",
        "windows: 8 frames",
    ):
        compressed = as_compressor(name)(video.tokens, 20)
        for row, tokens in enumerate(compressed.tokens):
            members = video.flat[compressed.assignment == row]
            torch.testing.assert_close(members.mean(dim=0), tokens)


def test_windows_end_at_cuts_and_after_4_frames() -> None:
    video = make_video()
    video.tokens[6:] = make_video(seed=1).tokens[6:]
    groups, window = by_cuts(video, 20, share=0.8)
    assert window.tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 2, 2]
    frame = torch.arange(len(groups)) // PER_FRAME
    for group in range(20):
        assert len(window[frame[groups == group]].unique()) == 1


def test_equal_windows_have_equally_many_rows() -> None:
    groups, window = equal_windows(make_video(), 24, equal=1.0)
    assert [len(groups.view(-1, PER_FRAME)[window == w].unique()) for w in range(3)] == [8, 8, 8]


def test_a_distance_that_does_not_grow_with_places_makes_the_methods_groups() -> None:
    video = make_video()
    groups, _ = near_in_place(video, 30, across=0, down=0)
    assert torch.equal(groups, every_4_frames(video, 30)[0])


def test_a_large_distance_across_joins_columns_alone() -> None:
    groups, _ = near_in_place(make_video(), 12, across=1000, down=0)
    column = torch.arange(len(groups)) % 4
    assert all(len(column[groups == group].unique()) == 1 for group in range(12))


def test_runs_are_joined_by_question_and_compared() -> None:
    seeds = clip_seeds("motion", 0, 3)
    assert list(clip_seeds("motion", 1, 1)) == [seeds[1]]
    clips = {"motion": [seeds[0], seeds[0], seeds[1], seeds[1]]}
    others = {"motion": [seeds[1], seeds[1], seeds[0], seeds[0], seeds[2]]}
    runs: list[dict[str, Any]] = [
        {"clips": clips, "right": {"method 0.1": {"motion": "0001"}, "x 0.1": {"motion": "1111"}}},
        {"clips": others, "right": {"member: centroid 0.1": {"motion": "11110"}}},
        {"clips": {"motion": [seeds[0]]}, "right": {"pictures: 2 0.1": {"motion": "1"}}},
    ]
    right, joined = join(runs, {"motion": clip_seeds("motion", 0, 2)})
    assert joined == clips
    assert right.keys() == {"method 0.1", "x 0.1", "member: centroid 0.1"}
    lines = table(right, joined).splitlines()
    assert "| member: centroid 0.1 | 100.0 | 100.0 |" in lines
    gain = "+75.0 (+50.0 to +100.0)"
    assert f"| member: centroid 0.1 | {gain} | {gain} |" in lines


def test_answers_are_counted_by_direction() -> None:
    clips = {"motion": [seed for seed in clip_seeds("motion", 0, 4) for _ in range(2)]}
    lines = by_answer({"method 0.1": {"motion": "1" * 8}}, clips).splitlines()
    counts = [int(number) for number in re.findall(r"\((\d+)\)", lines[0])]
    assert sum(counts) == 8
    cells = [cell.strip() for cell in lines[2].split("|")[2:-1]]
    assert cells == ["100" if count else "-" for count in counts]
