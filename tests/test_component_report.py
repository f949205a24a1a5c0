"""The report on components: known statistics of known tokens, and every video in the file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.component_report import QUANTILES, describe, main
from tests.test_compress import at_angles, cos_degrees

MEDIAN = QUANTILES.index(0.5)


def test_a_chain_is_seen_in_the_largest_component() -> None:
    # Seven tokens 10 degrees apart are one chain; those at 120 and 170 stay single.
    tokens = at_angles([0, 10, 20, 30, 40, 50, 60, 120, 170])
    report = describe(tokens, [1 / 3], ["scc"])
    (statistics,) = report["ratios"]
    assert statistics["num_retained"] == 3
    assert cos_degrees(50) <= statistics["threshold"] < cos_degrees(10)
    assert statistics["largest_share"] == pytest.approx(7 / 9)
    assert statistics["singleton_share"] == pytest.approx(2 / 3)
    # Of the chain's 21 pairs those up to 40 degrees apart are above a threshold just above cos 50.
    assert statistics["largest_linked"] == pytest.approx(18 / 21)
    assert statistics["largest_least_cosine"] == pytest.approx(cos_degrees(60))
    assert statistics["largest_num_frames"] == 1
    assert statistics["rows_of_a_frame"] == [3]
    assert statistics["rows_begun_in_a_frame"] == [3]
    share = np.array([7, 1, 1]) / 9
    assert statistics["entropy_bits"] == pytest.approx(-(share * np.log2(share)).sum())


def test_cosines_are_told_by_the_kind_of_pair() -> None:
    # Two by two tokens a frame: rows differ by 30 degrees, columns by none, frames by 20.
    tokens = at_angles([0, 0, 30, 30], [20, 20, 50, 50])
    cosines = describe(tokens, [0.5], ["uniform"])["cosines"]
    assert cosines["same place, next frame"][MEDIAN] == pytest.approx(cos_degrees(20))
    assert cosines["neighbours in a frame"][0] == pytest.approx(cos_degrees(30))
    assert cosines["neighbours in a frame"][-1] == pytest.approx(1)
    assert cosines["most alike in a frame"][0] == pytest.approx(1)
    assert cosines["most alike in next frame"][0] == pytest.approx(cos_degrees(20))
    assert cosines["any two of two frames"][0] == pytest.approx(cos_degrees(50))


def test_files_of_tokens_are_reported_video_by_video(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = torch.Generator().manual_seed(0)
    first, second = torch.randn(4, 9, 8, generator=draw), torch.randn(1, 5, 8, generator=draw)
    torch.save({"one": first, "other": second}, tmp_path / "two.pt")
    np.savez(tmp_path / "third.npz", third=first.numpy())
    report = tmp_path / "report.json"
    files = [str(tmp_path / name) for name in ("two.pt", "third.npz")]
    main(["--tokens", *files, "--ratios", "0.5", "0.25", "--json", str(report), "--device", "cpu"])
    saved = json.loads(report.read_text())
    assert [video["video"] for video in saved["videos"]] == ["two one", "two other", "third third"]
    assert saved["videos"][0]["ratios"] == saved["videos"][2]["ratios"]
    assert [ratio_report["num_retained"] for ratio_report in saved["videos"][1]["ratios"]] == [3, 2]
    assert "3 videos" in capsys.readouterr().out
