"""``bench/serving.py``: servers in turn, one result file, none left behind."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import serving
from scissor_vllm.loadtest.results import read_results
from tests.preloaded import run_preloaded

ROOT = Path(__file__).parent.parent
FAKE = """
import subprocess, sys, time
sys.path.insert(0, {root!r})
from tests.fake_vllm import fake_server
if "--refuse-to-start" in sys.argv:
    sys.exit("no such model")
child = subprocess.Popen(["sleep", "600"])
open({children!r}, "a").write(f"{{child.pid}}\\n")
with fake_server(port=int(sys.argv[sys.argv.index("--port") + 1])):
    time.sleep(600)
"""
PLAN = """
bench_options = ["--num-prompts", "4", "--num-warmups", "1", "--output-len", "2"]
[[servers]]
label = "first"
sweeps = [{ retention_ratio = [1.0, 0.5], max_concurrency = [1] }]
[[servers]]
label = "does not start"
options = ["--refuse-to-start"]
sweeps = [{ retention_ratio = [0.5], max_concurrency = [1] }]
[[servers]]
label = "last"
sweeps = [
  { retention_ratio = [0.1], max_concurrency = [1] },
  { retention_ratio = ["0.1,0.5"], max_concurrency = [2] },
]
"""


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    fake = tmp_path / "fake.py"
    fake.write_text(FAKE.format(root=str(ROOT), children=str(tmp_path / "children")))
    monkeypatch.setitem(serving.COMMANDS, "scissor-vllm", [sys.executable, str(fake)])
    # Each load test would import vLLM.
    forks = SimpleNamespace(
        run=lambda command, **_: run_preloaded(command), DEVNULL=subprocess.DEVNULL
    )
    monkeypatch.setattr(serving, "subprocess", forks)
    (tmp_path / "videos").mkdir()
    for name in "abcd":
        (tmp_path / "videos" / f"{name}.mp4").write_bytes(
            (ROOT / "scissor_vllm" / "demo" / "clip.mp4").read_bytes()
        )
    path = tmp_path / "plan.toml"
    path.write_text(PLAN)
    return path


def run(plan: Path, *options: str) -> tuple[int, Path]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    output = plan.parent / "result.json"
    videos = plan.parent / "videos"
    places = ["--output", str(output), "--videos", str(videos), "--port", str(port)]
    return serving.main([str(plan), "a-model", *places, *options]), output


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def test_every_server_is_measured_once_and_stopped_and_one_that_fails_is_told(
    plan: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    status, output = run(plan, "--only", "first")
    assert status == 0
    (first,) = read_results(output).runs
    assert first["label"] == "first"
    capfd.readouterr()

    status, output = run(plan)
    assert status == 1
    captured = capfd.readouterr()
    assert "does not start ended after" in captured.err
    assert "no such model" in captured.err
    runs = {measured["label"]: measured["cells"] for measured in read_results(output).runs}
    assert runs["first"] == first["cells"]  # Not measured again.
    assert {
        label: [(tuple(cell["retention_ratios"]), cell["max_concurrency"]) for cell in cells]
        for label, cells in runs.items()
    } == {
        "first": [((1.0,), 1), ((0.5,), 1)],
        "last": [((0.1,), 1), ((0.1, 0.5), 2)],
    }
    children = [int(line) for line in (plan.parent / "children").read_text().split()]
    assert len(children) == 3  # "first" twice.
    assert not any(is_running(child) for child in children)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("servers = [", "must be a TOML file"),
        ("[[servers]]\nlabel = 'a'", "server 'a' lacks sweeps"),
        ("[[servers]]\nlabel = 'a'\nsweeps = []\nport = 1", "server 'a' has unknown port"),
        ("[[servers]]\nlabel = 'a'\nserve = 'b'\nsweeps = []", "serve must be one of vllm"),
        (
            "[[servers]]\nlabel = 'a'\nsweeps = [{ retention_ratio = [1] }]",
            "sweep lacks max_concurrency",
        ),
    ],
)
def test_a_plan_that_cannot_be_followed_is_named(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(text)
    with pytest.raises(serving.PlanError, match=named):
        serving.read_plan(path)


@pytest.mark.parametrize("path", sorted((ROOT / "bench").glob("serving-*.toml")), ids=str)
def test_the_plans_are_read_and_name_stock_first(path: Path) -> None:
    servers, _ = serving.read_plan(path)
    assert servers[0].label == "stock"
    assert servers[0].command == serving.COMMANDS["vllm"]
    # Without it vLLM would load our plugin, since it is installed.
    assert servers[0].environment["VLLM_PLUGINS"] == ""
    assert serving.COMMANDS["scissor-vllm"] in [server.command for server in servers]
