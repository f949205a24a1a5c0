"""Runs every command of the README and the docs that is not marked as needing a GPU."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from bench.world.questions import SKILLS
from scissor_vllm import num_retained_tokens
from scissor_vllm.demo.client import ANSWER, QUESTION
from scissor_vllm.settings import DEFAULT_VIDEO_COMPRESSION
from tests.conftest import DEMO_CLIP_TOKENS, PAGE_KEY
from tests.preloaded import run_preloaded
from tests.serving import OneServer, Server

ROOT = Path(__file__).parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "bench/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
"""All pages but ``deploy/README.md``, which ``test_deploy.py`` holds to its commands."""
README, API, LIBRARY = (ROOT / name for name in ("README.md", "docs/api.md", "docs/library.md"))
ACCURACY, SHOW = ROOT / "docs" / "accuracy.md", ROOT / "docs" / "web-page.md"
BY_SKILL = ROOT / "docs" / "accuracy-by-skill.md"
METHOD = ROOT / "docs" / "adding-a-method.md"
MARK = "<!-- needs a GPU -->"
PORT = "localhost:8000"


def blocks(page: Path, language: str) -> list[str]:
    """Return a page's code blocks of a language that are not marked as needing a GPU."""
    matches = re.findall(
        rf"(^{re.escape(MARK)}\n)?^ *```{language}\n(.*?)^ *```$", page.read_text(), re.M | re.S
    )
    return [text for mark, text in matches if not mark]


RUN_HERE = {
    (README, "sh"): ["make demo", "VIDEO=$(base64 -w0 scissor_vllm/demo/clip.mp4)"],
    (README, "python"): ["import torch"],
    (API, "python"): ["import base64", "import base64"],
    (API, "json"): ['"video_compression": {'],
    (LIBRARY, "python"): ["import torch", "import torch"],
    (METHOD, "python"): ["import torch"],
    (SHOW, "sh"): [".venv/bin/scissor-vllm show scissor_vllm/demo/clip.mp4"],
    (ROOT / "docs" / "load-test.md", "sh"): ["make bench"],
    (ACCURACY, "sh"): [
        ".venv/bin/python -m bench.accuracy table",
        ".venv/bin/python -m bench.accuracy table",
        "make accuracy",
    ],
    (BY_SKILL, "sh"): [
        ".venv/bin/python -m bench.world.heldout",
        ".venv/bin/python -m bench.row_order --table",
        ".venv/bin/python -m bench.accuracy table",
    ],
}
"""What the blocks begin with that a test of this file runs, by page and language."""


def test_the_blocks_are_those_that_are_run_here() -> None:
    begins = {
        (page, language): [block.split("\n")[0] for block in found]
        for page in PAGES
        for language in ("sh", "python", "json", "bash", "shell", "console", "py")
        if (found := blocks(page, language))
    }
    assert begins.keys() == RUN_HERE.keys()
    for place, expected in RUN_HERE.items():
        assert len(begins[place]) == len(expected), place
        for line, begin in zip(begins[place], expected, strict=True):
            assert line.startswith(begin), place


def test_a_block_says_its_language() -> None:
    """So that none is left out of the test above."""
    known = {"sh", "python", "json", "text", "yaml"}
    for page in PAGES:
        fences = re.findall(r"^ *```(.*)$", page.read_text(), re.M)
        assert len(fences) % 2 == 0, page
        assert set(fences[::2]) <= known, page


def check_client(client: str, server: Server, **more: int) -> None:
    """Run a client of the page, and check what it prints of the demo's clip."""
    run = subprocess.run(
        [sys.executable, "-c", client.replace(PORT, f"127.0.0.1:{server.port}")],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        cwd=ROOT,
    )
    answer, printed = run.stdout.splitlines()
    assert f'"{QUESTION}"' in client
    assert answer == ANSWER
    assert {**documented_compression(), **more} == eval(printed.split(" ", 1)[1])


def test_the_python_client_works(server: Server) -> None:
    check_client(blocks(API, "python")[0], server)


def test_the_python_client_that_sends_frames_as_images_works(page_server: Server) -> None:
    client = blocks(API, "python")[1]
    check_client(client.replace("unused", PAGE_KEY), page_server, num_compressed_images=16)


def test_curl_gets_the_documented_answer(server: Server) -> None:
    command = blocks(README, "sh")[1].replace(PORT, f"127.0.0.1:{server.port}")
    run = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=120, check=True, cwd=ROOT
    )
    answer = json.loads(run.stdout)
    assert answer["choices"][0]["message"]["content"] == ANSWER
    assert answer["video_compression"] == documented_compression()
    assert answer["usage"]["completion_tokens"] <= 32


def test_show_writes_the_page_and_a_picture_a_ratio() -> None:
    (command,) = blocks(SHOW, "sh")
    assert run_preloaded(shlex.split(command)).returncode == 0
    left = {path.name for path in (ROOT / "build" / "show").iterdir()}
    assert left >= {"show.html", "show-0.5.png", "show-0.25.png", "show-0.1.png"}


def documented_compression() -> dict[str, float]:
    (text,) = blocks(API, "json")
    documented: dict[str, float] = json.loads("{" + text + "}")["video_compression"]
    return documented


@pytest.mark.parametrize("page", [README, LIBRARY, METHOD], ids=lambda page: str(page.name))
def test_the_library_examples_run(page: Path) -> None:
    for example in blocks(page, "python"):
        exec(compile(example, str(page), "exec"), {})


def test_the_quoted_numbers_hold() -> None:
    assert num_retained_tokens(30, 0.1) == 3
    assert 32 * 196 == 6272


def test_make_demo_prints_the_table_and_stops_its_server(servers: OneServer) -> None:
    servers.stop()
    run = subprocess.run(
        ["make", "demo"], capture_output=True, text=True, timeout=400, check=False, cwd=ROOT
    )
    assert run.returncode == 0, run.stdout + run.stderr
    rows = re.findall(r"^(\S+) +(\d+) -> (\d+) +(\d+) +\d+ ms  '(.*)'$", run.stdout, re.M)
    table = {float(ratio): (int(before), int(after)) for ratio, before, after, _, _ in rows}
    num_tokens = DEMO_CLIP_TOKENS
    assert table == {
        ratio: (num_tokens, num_retained_tokens(num_tokens, ratio))
        for ratio in (1.0, 0.5, 0.25, 0.1)
    }
    prompts = {float(row[0]): int(row[3]) for row in rows}
    assert prompts[1.0] - prompts[0.1] == num_tokens - table[0.1][1]
    assert [row[4] for row in rows] == [ANSWER] * len(rows)
    assert "server stopped" in run.stdout
    assert "installing" not in run.stdout  # What is set up is not set up again.


def recipe(target: str, *variables: str) -> list[list[str]]:
    """Return the commands that a make target runs, with the interpreter of the tests."""
    run = subprocess.run(
        ["make", "--dry-run", "--old-file=.venv/.installed-dev", target, *variables],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        cwd=ROOT,
    )
    commands = [shlex.split(line) for line in run.stdout.replace("\\\n", " ").splitlines()]
    return [command for command in commands if command and command[0].startswith(".venv/bin/")]


def run_recipe(commands: list[list[str]]) -> str:
    """Run commands one after the other, and return what they print."""
    printed = ""
    for command in commands:
        run = run_preloaded(command)
        assert run.returncode == 0, run.stdout
        printed += run.stdout
    return printed


def test_make_bench_prints_a_row_a_cell_and_leaves_result_and_plots(
    server: Server, tmp_path: Path
) -> None:
    measure, plot = recipe("bench")
    # The server that runs, in place of one of its own; fewer cells and prompts.
    measure.remove("--demo")
    measure += ["--base-url", f"http://127.0.0.1:{server.port}", "--num-prompts", "4"]
    measure += ["--retention-ratio", "1.0", "0.1", "--max-concurrency", "4"]
    measure += ["--output", str(tmp_path / "result.json")]
    plot[-1] = str(tmp_path / "result.json")
    printed = run_recipe([measure, plot])
    rows = re.findall(r"^scissor-vllm +(\S+) +(\d+) +4 +0 ", printed, re.M)
    assert rows == [("1.0", "4"), ("0.1", "4")]
    left = {path.name for path in tmp_path.iterdir()}
    assert left >= {"result.json", "result.csv", "throughput.png", "latency.png"}


def test_make_accuracy_prints_tables_and_leaves_answers_and_plots(
    server: Server, tmp_path: Path
) -> None:
    clips, ask, plot = recipe("accuracy", "NUM_PER_SKILL=1", f"ACCURACY={tmp_path}")
    # `methods` starts a server for each; `run` asks the one that runs.
    start, end = ask.index("methods"), ask.index("--retention-ratio")
    ask[start:end] = ["run", "--base-url", f"http://127.0.0.1:{server.port}"]
    ask[ask.index("1.0") : ask.index("--questions")] = ["0.25", "0.1"]
    printed = run_recipe([clips, ask, plot])
    assert DEFAULT_VIDEO_COMPRESSION in printed
    (answered,) = json.loads((tmp_path / "result.json").read_text())["runs"]
    assert len(answered["answers"]["rows"]) == 2 * len(SKILLS)
    assert {path.suffix for path in tmp_path.iterdir()} >= {".json", ".csv", ".png"}


@pytest.mark.slow
def test_make_accuracy_starts_a_server_a_method(servers: OneServer, tmp_path: Path) -> None:
    servers.stop()
    variables = ["METHODS=uniform", "RATIOS=0.25 0.1", "NUM_PER_SKILL=1", f"ACCURACY={tmp_path}"]
    assert "uniform" in run_recipe(recipe("accuracy", *variables))


@pytest.mark.slow
def test_make_bench_starts_a_server_and_stops_it(servers: OneServer, tmp_path: Path) -> None:
    servers.stop()
    measure, _ = recipe("bench")
    options = ["--num-prompts", "4", "--output", str(tmp_path / "result.json")]
    assert "server stopped" in run_recipe([[*measure, *options]])


def printed_tables(command: str) -> list[str]:
    """Return what a documented command prints, part by part."""
    program, *arguments = shlex.split(command)
    assert program == ".venv/bin/python"
    run = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.split("\n\n")


def test_the_accuracies_are_what_the_command_prints() -> None:
    newer, older = accuracies(ACCURACY)
    commands = blocks(ACCURACY, "sh")[:2]
    for quoted, command in zip((newer, older), commands, strict=True):
        rows = re.findall(r"^\| ([a-z][\w+-]*) +\|(.*)\|$", printed_tables(command)[1], re.M)
        printed = {label: re.findall(r"([\d.]+) \(", cells) for label, cells in rows}
        assert len(printed) >= 3
        assert {label: list(cells.values()) for label, cells in quoted.items()} == printed
    (in_short,) = accuracies(README)
    assert len(in_short) >= 4
    for label, cells in in_short.items():
        quoted = newer if label in newer else older
        assert cells == {ratio: quoted[label][ratio] for ratio in cells}, label


def accuracies(page: Path) -> list[dict[str, dict[str, str]]]:
    """Return the accuracies of a page's tables of methods, by method and ratio."""
    tables = []
    for head, body in re.findall(
        r"^\| \| (1\.0 \| [\d. |]+) \|\n\|[- |]+\n((?:\| `.*\n|\| of its own .*\n)+)",
        page.read_text(),
        re.M,
    ):
        table = {}
        for label, cells in re.findall(r"^\| `([\w+-]+)`[^|]*\|(.*)\|$", body, re.M):
            values = [cell.split(" (")[0].strip() for cell in cells.split("|")]
            pairs = zip(head.split(" | "), values, strict=True)
            table[label] = {ratio: value for ratio, value in pairs if value}
        tables.append(table)
    return tables


@pytest.mark.slow
def test_the_commands_of_the_accuracy_by_skill_run(tmp_path: Path) -> None:
    clips, variants, table = blocks(BY_SKILL, "sh")
    assert printed_tables(variants)
    assert printed_tables(table)
    command = clips.replace("build/validation", str(tmp_path)).replace(
        "--num-per-skill 6", "--num-per-skill 1"
    )
    subprocess.run(["bash", "-ec", command], check=True, timeout=900, cwd=ROOT)
    assert len(list((tmp_path / "videos").iterdir())) == len(SKILLS)


def test_the_flags_of_the_load_test_exist() -> None:
    section = (ROOT / "docs" / "load-test.md").read_text()
    helped = {
        part: subprocess.run(
            [sys.executable, "-m", "scissor_vllm.cli", "bench", *part, "--help"],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout
        for part in ((), ("table",), ("plot",), ("clips",))
    }
    commands = re.findall(r"scissor-vllm bench(?: (table|plot|clips))?((?:[^`\n]|\\\n)*)", section)
    assert len(commands) == 5
    for part, arguments in commands:
        for flag in re.findall(r"--[\w-]+", arguments):
            assert flag in helped[(part,) if part else ()], flag
    for flag in re.findall(r"`(?:bench plot )?(--(?!append)[\w-]+)", section):
        assert any(flag in text for text in helped.values()), flag
