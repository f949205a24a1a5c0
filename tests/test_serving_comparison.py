"""``bench/serving.py``: servers in turn, one result file, none left behind."""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path

import pytest

from bench import serving
from scissor_vllm.loadtest.command import INTERRUPTED
from scissor_vllm.loadtest.results import read_results
from tests.preloaded import run_preloaded

ROOT = Path(__file__).parent.parent
FAKE = """
import os, subprocess, sys, time
sys.path.insert(0, {root!r})
from tests.fake_vllm import fake_server
if "--refuse-to-start" in sys.argv:
    sys.exit("no such model")
child = subprocess.Popen(["sleep", "600"])
open({children!r}, "a").write(f"{{child.pid}}\\n")
def note(body):
    gpu, role = os.environ.get("CUDA_VISIBLE_DEVICES"), [a for a in sys.argv if "ec_role" in a]
    open({asked!r}, "a").write(f"{{gpu}} {{body.get('retention_ratio')}} {{role}}\\n")
with fake_server(port=int(sys.argv[sys.argv.index("--port") + 1]), refuse=note):
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
    places = {name: str(tmp_path / name) for name in ("children", "asked")}
    fake.write_text(FAKE.format(root=str(ROOT), **places))
    monkeypatch.setitem(serving.COMMANDS, "scissor-vllm", [sys.executable, str(fake)])
    # Each load test would import vLLM.
    command = [sys.executable, "-m", "scissor_vllm.cli", "bench"]
    monkeypatch.setattr(serving, "bench", lambda argv: run_preloaded([*command, *argv]).returncode)
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


def test_servers_run_together_on_their_gpus_and_are_all_stopped(
    plan: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text = plan.read_text().replace('label = "last"', 'label = "last"\ngpu = 1')
    more = "num_frames = 8, extra_body = { top_k = 3 }"
    plan.write_text(text.replace("max_concurrency = [2]", f"max_concurrency = [2], {more}"))
    status, output = run(plan, "--together")
    assert status == 1
    assert "no such model" in capfd.readouterr().err
    runs = {measured["label"]: measured["cells"] for measured in read_results(output).runs}
    assert {label: len(cells) for label, cells in runs.items()} == {"first": 2, "last": 1}
    longer = read_results(output.with_stem("result-8-frames")).runs
    assert [(each["label"], len(each["cells"])) for each in longer] == [("last", 1)]
    assert longer[0]["settings"]["extra_body"] == {"top_k": 3}
    asked = (plan.parent / "asked").read_text().splitlines()
    assert [line.split()[0] for line in asked] == ["None"] * 10 + ["1"] * 10
    children = [int(line) for line in (plan.parent / "children").read_text().split()]
    assert len(children) == 2
    assert not any(is_running(child) for child in children)


def test_ctrl_c_in_a_load_test_ends_the_comparison_and_its_server(
    plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "bench", lambda _: INTERRUPTED)
    with pytest.raises(KeyboardInterrupt):
        run(plan)
    (child,) = (int(line) for line in (plan.parent / "children").read_text().split())
    # It is killed by now, and ends in a moment of its own.
    for _ in range(100):
        if not is_running(child):
            return
        time.sleep(0.05)
    pytest.fail(f"{child} still runs")


def test_an_encoder_on_another_gpu_is_asked_before_the_server_that_answers(plan: Path) -> None:
    rows = plan.parent / "rows"
    text = """
    bench_options = ["--num-prompts", "4", "--num-warmups", "0", "--output-len", "2"]
    [[servers]]
    label = "apart"
    sweeps = [{ retention_ratio = [0.1], max_concurrency = [1] }]
    """
    plan.write_text(f"{text}encoder_rows = '{rows}'")
    status, output = run(plan)
    assert status == 0
    (measured,) = read_results(output).runs
    assert [request["error"] for request in measured["cells"][0]["requests"]] == [None] * 4
    asked = (plan.parent / "asked").read_text().splitlines()
    assert len(asked) == 8
    for encoded, answered in zip(asked[::2], asked[1::2], strict=True):
        assert encoded.startswith("0 0.1 ")
        assert answered.startswith("1 0.1 ")
        for line, role in ((encoded, "ec_producer"), (answered, "ec_consumer")):
            assert f'"ec_role": "{role}"' in line
            assert f'"shared_storage_path": "{rows}"' in line
    children = [int(line) for line in (plan.parent / "children").read_text().split()]
    assert len(children) == 2
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
