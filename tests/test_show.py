"""`scissor-vllm show` draws the result of the compression."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from transformers import AutoVideoProcessor

from scissor_vllm import num_retained_tokens
from scissor_vllm.cli import main
from scissor_vllm.demo.model import demo_model_path
from scissor_vllm.show import command
from scissor_vllm.show.encoder import Encoder, EncoderError
from scissor_vllm.show.html import as_html
from scissor_vllm.show.picture import (
    DROPPED,
    MAX_FRAMES,
    Grouping,
    Picture,
    all_kept,
    colors,
    drawn_frames,
    in_frames,
    strip_rows,
)
from scissor_vllm.show.png import STRIP_ROWS, draw, drawn_cells
from tests.browser import Page, open_page
from tests.families import Media, build_qwen2_5_vl, build_qwen3_vl
from tests.serving import compress_as_served

CLIP = Path(__file__).parent.parent / "scissor_vllm" / "demo" / "clip.mp4"
RATIOS = (0.05, 0.25, 1.0)
NUM_FRAMES = 6


def small_picture(assignment: list[int], num_retained: int, *, frames: int = 2) -> Picture:
    """Return frames of 2 x 2 tokens, all of one gray, as grouped."""
    rows = np.array(assignment)
    members = [int((rows == row).argmax()) for row in range(num_retained)]
    grouping = Grouping(0.5, "scc", rows, np.array(members), 0.9)
    return Picture("gray.mp4", np.full((frames, 40, 60, 3), 128, np.uint8), 2, 2, (grouping,))


def data_of(page: Path | str) -> dict[str, Any]:
    """Return the data that lies in a page."""
    text = page if isinstance(page, str) else page.read_text()
    (text_of_data,) = re.findall(
        r'<script type="application/json" id="data">(.*?)</script>', text, re.S
    )
    data: dict[str, Any] = json.loads(text_of_data)
    return data


def rows_of(encoded: str) -> npt.NDArray[np.int64]:
    """Return rows as a page reads them, -1 for what was dropped."""
    rows = np.frombuffer(base64.b64decode(encoded), "<u2").astype(np.int64)
    return np.where(rows == DROPPED, -1, rows)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the command writes of the demo's clip."""
    folder = tmp_path_factory.mktemp("show") / "out"
    ratios = list(map(str, RATIOS))
    arguments = ["--num-frames", str(NUM_FRAMES), "--output", str(folder)]
    assert main(["show", str(CLIP), "--retention-ratio", *ratios, *arguments]) == 0
    return folder


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    """The demo model's."""
    return Encoder(str(demo_model_path()))


def test_a_folder_gets_the_page_and_a_picture_for_each_ratio(shown: Path) -> None:
    wanted = {"show.html", "show-0.05.png", "show-0.25.png", "show-1.png"}
    assert {path.name for path in shown.iterdir()} == wanted


def test_what_is_drawn_is_what_a_server_would_keep(shown: Path, encoder: Encoder) -> None:
    from scissor_vllm.frontend.video.loader import PyAVVideoBackend

    frames, metadata = PyAVVideoBackend.load_bytes(CLIP.read_bytes(), num_frames=NUM_FRAMES)
    tokens = encoder.encode(frames).tokens
    num_tokens = tokens.shape[0] * tokens.shape[1]
    data = data_of(shown / "show.html")
    assert len(data["frames"]) * data["rows"] * data["columns"] == num_tokens
    assert data["times"] == [i / metadata["fps"] for i in metadata["frames_indices"]]
    assert [grouping["retention_ratio"] for grouping in data["groupings"]] == list(RATIOS)
    for grouping in data["groupings"][:-1]:
        num_retained = num_retained_tokens(num_tokens, grouping["retention_ratio"])
        expected = compress_as_served(tokens, num_retained)
        assert rows_of(grouping["assignment"]).tolist() == expected.assignment.tolist()
        assert grouping["similarity_threshold"] == expected.similarity_threshold
        assert grouping["num_retained"] == num_retained
    assert rows_of(data["groupings"][-1]["assignment"]).tolist() == list(range(num_tokens))


def test_a_representative_is_a_member_of_its_kept_token(shown: Path) -> None:
    for grouping in data_of(shown / "show.html")["groupings"]:
        assignment, members = rows_of(grouping["assignment"]), rows_of(grouping["representatives"])
        assert len(members) == grouping["num_retained"]
        for row in set(assignment.tolist()):
            assert assignment[members[row]] == row


def test_tokens_do_not_depend_on_how_many_frames_are_encoded_at_once(encoder: Encoder) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (11, 50, 70, 3), dtype=np.uint8)
    whole = encoder.encode(frames)
    assert whole.tokens.shape[:2] == (11, whole.rows * whole.columns)
    alone = torch.cat([encoder.encode(frame[None]).tokens for frame in frames])
    torch.testing.assert_close(whole.tokens, alone)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"])
def test_a_video_of_patches_has_the_tokens_that_transformers_gives_it_at_once(
    family: str, tmp_path: Path
) -> None:
    if family == "qwen2_5_vl":
        model = build_qwen2_5_vl(tmp_path)
    else:
        model = build_qwen3_vl(tmp_path, moe=family.endswith("moe"))
    video = Media(width=200, height=120, num_frames=21)
    encoded = Encoder(str(tmp_path)).encode(video.pixels())
    prepared = AutoVideoProcessor.from_pretrained(tmp_path)(
        videos=[torch.from_numpy(video.pixels()).permute(0, 3, 1, 2)],
        do_sample_frames=False,
        return_tensors="pt",
    )
    ((num_frames, height, width),) = prepared["video_grid_thw"].tolist()
    with torch.inference_mode():
        (whole,) = model.float().get_video_features(**prepared).pooler_output
    assert encoded.tokens.shape[:2] == (num_frames, encoded.rows * encoded.columns)
    assert (encoded.rows, encoded.columns) == (height // 2, width // 2)
    torch.testing.assert_close(encoded.tokens.flatten(0, 1), whole, atol=1e-4, rtol=1e-4)


def test_one_kept_token_has_one_color_in_every_frame() -> None:
    picture = small_picture([0, 1, 1, 2, 1, 0, 3, 0], 4)
    drawn = drawn_cells(picture, picture.groupings[0])
    _, height, width, _ = drawn.shape
    # Inside of a cell, off its border and its dot.
    corners = drawn[:, height // 2 - 3 :: height // 2, width // 2 - 3 :: width // 2][:, :2, :2]
    color = {int(row): set() for row in range(4)}  # type: dict[int, set[tuple[int, ...]]]
    cells = picture.cells(picture.groupings[0])
    for frame, row, column in np.ndindex(cells.shape):
        color[int(cells[frame, row, column])].add(tuple(corners[frame, row, column]))
    assert all(len(cell_colors) == 1 for cell_colors in color.values())
    assert len(set.union(*color.values())) == 4


def test_each_representative_has_a_dot_and_no_other_token() -> None:
    picture = small_picture([0, 0, 0, 0, 0, 1, 1, 1], 2)
    drawn = drawn_cells(picture, picture.groupings[0])
    _, height, width, _ = drawn.shape
    centers = drawn[:, height // 4 :: height // 2, width // 4 :: width // 2]
    dots = (centers == 255).all(axis=-1).reshape(-1)
    assert dots.nonzero()[0].tolist() == picture.groupings[0].representatives.tolist()


def test_a_dropped_token_is_darker_than_its_frame() -> None:
    picture = small_picture([0, -1, -1, -1, -1, -1, -1, 1], 2)
    drawn = drawn_cells(picture, picture.groupings[0])
    _, height, width, _ = drawn.shape
    assert (drawn[0, height // 4, 3 * width // 4] < 128).all()


def test_colors_of_tokens_that_follow_each_other_are_told_apart() -> None:
    drawn = colors(300).astype(int)
    assert len({tuple(color) for color in drawn}) == 300
    assert np.abs(np.diff(drawn, axis=0)).sum(axis=1).min() > 60


def test_the_strip_is_ordered_by_first_frame_and_size() -> None:
    picture = small_picture([0, 1, 1, 1, 2, 2, 0, 3, 4, 4, 4, 4], 5, frames=3)
    counts = in_frames(picture.cells(picture.groupings[0]), 5)
    assert counts.tolist() == [[1, 1, 0], [3, 0, 0], [0, 2, 0], [0, 1, 0], [0, 0, 4]]
    assert strip_rows(counts, 5).tolist() == [1, 0, 2, 3, 4]
    assert strip_rows(counts, 2).tolist() == [0, 3]
    assert strip_rows(counts[:0], 2).tolist() == []


@pytest.mark.parametrize("num_first", [(121, 124, 122, 117), (400, 3, 60, 21), (1, 1, 1, 600)])
def test_a_frames_share_of_the_strip_is_its_share_of_the_kept_tokens(
    num_first: tuple[int, ...],
) -> None:
    rng = np.random.default_rng(0)
    first = np.repeat(np.arange(len(num_first)), num_first)
    counts = np.zeros((len(first), len(num_first)), np.int64)
    for row, frame in enumerate(first):
        counts[row, frame:] = rng.integers(1, 4, len(num_first) - frame)
    rows = strip_rows(counts, 160)
    assert len(rows) == len(set(rows.tolist())) == min(160, len(counts))
    drawn = np.bincount(first[rows], minlength=len(num_first))
    assert np.abs(drawn - 160 * np.array(num_first) / sum(num_first)).max() <= 1


def test_a_png_is_a_whole_picture_of_its_caption_frames_and_strip(shown: Path) -> None:
    with Image.open(shown / "show-0.25.png") as picture:
        picture.load()
        assert picture.format == "PNG"
        assert picture.width > 6 * 190
        assert picture.height > 200


def test_a_frame_keeps_its_shape_and_is_no_larger_than_a_page_needs() -> None:
    frames = np.zeros((5, 360, 640, 3), np.uint8)
    assert drawn_frames(frames, 5).shape == (5, 144, 256, 3)
    frames[2] = 200
    assert (drawn_frames(torch.from_numpy(frames), 5) == drawn_frames(frames, 5)).all()
    assert drawn_frames(frames, 3)[1].mean() == 200  # Of a temporal patch the first is shown.


def test_the_methods_that_drop_and_those_without_a_threshold_are_drawn(tmp_path: Path) -> None:
    output = tmp_path / "uniform.html"
    arguments = ["--video-compression", "uniform", "--num-frames", "3", "--output", str(output)]
    assert main(["show", str(CLIP), *arguments]) == 0
    (grouping,) = data_of(output)["groupings"]
    assignment = rows_of(grouping["assignment"])
    assert (assignment >= 0).sum() == grouping["num_retained"]
    assert grouping["similarity_threshold"] is None
    assert list(tmp_path.iterdir()) == [output]


def test_the_page_loads_nothing_and_runs_its_own_script_alone(shown: Path) -> None:
    page = (shown / "show.html").read_text()
    markup = re.sub(r"<(script|style)[^>]*>.*?</\1>", "", page, flags=re.S)
    assert not re.search(r"\b(?:src|href)=|url\(|https?:|@import", markup)
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy.startswith("default-src 'none'; img-src data:;")
    for element in ("script", "style"):
        (text,) = re.findall(rf"<{element}>(.*?)</{element}>", page, re.S)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{element}-src 'sha256-{digest}'" in policy


def test_a_name_of_a_video_is_text_whatever_it_holds() -> None:
    picture = small_picture([0] * 8, 1)
    name = "</script><script>alert(1)</script>{{DATA}}.mp4"
    page = as_html(Picture(name, picture.frames, 2, 2, picture.groupings))
    assert "<script>alert" not in page
    assert data_of(page)["name"] == name


def test_a_file_that_is_no_video_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "text.mp4"
    file.write_text("no video")
    output = tmp_path / "out"
    assert main(["show", str(file), "--output", str(output)]) == 1
    assert "a video must be a whole file of MP4" in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--retention-ratio", "0"], "above 0 and at most 1"),
        (["--retention-ratio", "0.1", "0.2", "--output", "x.png"], "a PNG shows one ratio, got 2"),
        (["--num-frames", "0"], "--num-frames must be at least 1, got 0"),
        (["--video-compression", "none"], "invalid choice: 'none'"),
    ],
)
def test_a_wrong_argument_is_named(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["show", str(CLIP), *arguments])
    assert stop.value.code == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("output", "complaint"),
    [
        ("file", "--output must be a folder, got the file"),
        ("folder.png", "--output must be a file, got the folder"),
        ("file/x.png", "file is no folder that you may write to"),
        # Nothing can be made there, and nothing tells so before.
        ("/proc/show", "--output must be where files can be written, got /proc/show"),
    ],
)
def test_an_output_that_cannot_be_written_is_named(
    output: str, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder.png").mkdir()
    arguments = ["--num-frames", "1", "--output", str(tmp_path / output)]
    assert main(["show", str(CLIP), *arguments]) == 1
    assert complaint in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder.png"}
    assert (tmp_path / "file").read_text() == "kept"


def test_an_output_that_cannot_be_written_is_found_before_the_tower_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "look", lambda *_: pytest.fail("the video was looked at"))
    (tmp_path / "file").touch()
    assert main(["show", str(CLIP), "--output", str(tmp_path / "file")]) == 1


def test_a_pictures_suffix_may_be_in_capitals(tmp_path: Path) -> None:
    assert main(["show", str(CLIP), "--num-frames", "1", "--output", str(tmp_path / "x.PNG")]) == 0
    assert (tmp_path / "x.PNG").read_bytes().startswith(b"\x89PNG")


def test_weights_that_are_damaged_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(demo_model_path(), model)
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[:100_000])
    arguments = ["--model", str(model), "--num-frames", "1", "--output", str(tmp_path / "out")]
    assert main(["show", str(CLIP), *arguments]) == 1
    complaint = capsys.readouterr().err
    assert "--model must be a folder or a name on the hub that transformers loads" in complaint
    assert f"got '{model}': Error while deserializing" in complaint


def test_more_frames_than_can_be_drawn_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(CLIP), "--num-frames", str(MAX_FRAMES + 1)]) == 1
    assert f"at most {MAX_FRAMES} frames" in capsys.readouterr().err


def test_a_model_whose_videos_are_not_compressed_is_refused_by_name(tmp_path: Path) -> None:
    config = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(EncoderError, match=r"LlavaOnevision.*Qwen2_5_VL.*got Qwen2ForCausalLM"):
        Encoder(str(tmp_path))
    with pytest.raises(EncoderError, match="--model must be a folder or a name on the hub"):
        Encoder(str(tmp_path / "absent"))


def test_a_picture_of_another_videos_groups_is_refused() -> None:
    picture = small_picture([0] * 8, 1)
    with pytest.raises(ValueError, match="needs 8 assignments, got 4"):
        Picture("x", picture.frames, 2, 2, (all_kept("scc", 4),))


def test_the_command_is_listed_and_loads_nothing_heavy_to_say_so() -> None:
    code = (
        "import sys; from scissor_vllm.cli import main\n"
        "try: main(['show', '--help'])\n"
        "except SystemExit: print(sorted({'vllm', 'transformers', 'cv2'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--retention-ratio" in run.stdout
    assert run.stdout.endswith("[]\n")


@pytest.fixture(scope="module")
def page(shown: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """The page in a browser."""
    with open_page(tmp_path_factory.mktemp("browser")) as page:
        page.goto((shown / "show.html").as_uri())
        page.wait("document.body.dataset.drawn === 'true'")
        yield page


def test_a_browser_draws_the_page_under_its_own_policy(page: Page) -> None:
    assert page.complaints == []
    assert page.evaluate("document.querySelectorAll('.frames canvas').length") == NUM_FRAMES
    num_colors = page.evaluate(
        "(() => { const c = document.querySelector('.frames canvas');"
        "const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        "return new Set(Array.from({length: d.length / 4}, (_, i) => d.slice(4*i, 4*i+3).join())"
        ").size; })()"
    )
    assert num_colors > 20


def test_the_slider_goes_over_the_ratios_by_the_keyboard(page: Page) -> None:
    page.focus("#picture-ratio")
    page.press("Home")
    assert "retention ratio 0.05:" in page.text("[role=status]")
    page.press("ArrowRight")
    about = page.text("[role=status]")
    num_tokens = sum(1 for _ in rows_of(data_of_page(page)["groupings"][0]["assignment"]))
    assert "retention ratio 0.25:" in about
    assert f"K = {num_retained_tokens(num_tokens, 0.25)} kept" in about
    assert page.evaluate("document.querySelector('#picture-ratio').ariaValueText") == "0.25"


def data_of_page(page: Page) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(page.evaluate("document.getElementById('data').textContent"))
    return data


def test_the_arrow_keys_name_each_token_and_enter_shows_it_alone(page: Page) -> None:
    page.focus("#picture-ratio")
    page.press("Home")
    page.focus(".frames")
    for key in ("ArrowRight", "ArrowRight", "PageDown"):
        page.press(key)
    status = page.text(".status")
    assert re.search(r"row 1, column 2: kept token \d+ of \d+, of \d+ tokens in \d+ frames", status)
    before = page.evaluate("document.querySelector('.frames canvas').toDataURL()")
    page.press("Enter")
    alone = page.evaluate("document.querySelector('.frames canvas').toDataURL()")
    page.press("Escape")
    assert alone != before
    assert page.evaluate("document.querySelector('.frames canvas').toDataURL()") == before


def test_a_page_has_the_strip_of_a_png(page: Page) -> None:
    page.focus("#picture-ratio")
    page.press("End")
    rows = page.evaluate("view.stripRows()")
    grouping = data_of_page(page)["groupings"][-1]
    assert grouping["num_retained"] > len(rows) == STRIP_ROWS
    cells = np.array(rows_of(grouping["assignment"])).reshape(NUM_FRAMES, -1)
    assert rows == strip_rows(in_frames(cells, grouping["num_retained"]), STRIP_ROWS).tolist()
    page.press("Home")


def test_a_narrow_page_scrolls_down_only(page: Page) -> None:
    page.set_width(320)
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    page.set_width(1200)


def test_a_page_is_dark_where_that_is_preferred(page: Page) -> None:
    script = "getComputedStyle(document.body)"
    page.prefer("dark")
    dark = [page.evaluate(f"{script}.{name}") for name in ("backgroundColor", "color")]
    page.prefer("light")
    light = [page.evaluate(f"{script}.{name}") for name in ("backgroundColor", "color")]
    assert brightness(dark[0]) < 60 < 180 < brightness(dark[1])
    assert brightness(light[1]) < 60 < 180 < brightness(light[0])


def brightness(color: str) -> float:
    """Return the mean of a CSS color's channels, 0..255."""
    return float(np.mean([int(channel) for channel in re.findall(r"\d+", color)[:3]]))


def test_a_page_has_the_colors_of_a_png(page: Page) -> None:
    ours = page.evaluate("[...Array(50).keys()].map(colorOf)")
    assert np.abs(np.array(ours) - colors(50).astype(int)).max() <= 1


def test_a_picture_of_many_kept_tokens_says_what_its_strip_leaves_out() -> None:
    frames = np.full((2, 40, 40, 3), 128, np.uint8)
    picture = Picture("x", frames, 10, 10, (all_kept("scc", 200),))
    assert draw(picture, picture.groupings[0]).height > 160 * 3
    from scissor_vllm.show.text import strip_caption

    assert "160 of 200, evenly sampled" in strip_caption(picture.groupings[0], 160)
