"""The load test sends what its result records, measures as vLLM's client, and loses no result."""

from __future__ import annotations

import csv
import io
import json
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.numbered_clips import decode_all
from scissor_vllm import num_retained_tokens
from scissor_vllm.demo.model import demo_model_path
from scissor_vllm.loadtest.client import measure, read_stream
from scissor_vllm.loadtest.clips import Clip, ClipShape, make_clips
from scissor_vllm.loadtest.command import main
from scissor_vllm.loadtest.plot import accuracy_figure, latency_figure, throughput_figure
from scissor_vllm.loadtest.record import environment, write_json
from scissor_vllm.loadtest.results import read_results
from scissor_vllm.loadtest.server import difference, kv_cache_bytes_per_token, parse_metrics
from scissor_vllm.loadtest.summary import parse_goodput, summarize_all
from scissor_vllm.loadtest.table import csv_table, markdown_table, text_table
from scissor_vllm.loadtest.workload import Cell, build_requests, cells, draw_ratios, parse_ratios
from tests.conftest import TOKENS_PER_FRAME
from tests.fake_vllm import METRICS, NUM_VIDEO_TOKENS, STAGES, fake_server
from tests.preloaded import run_preloaded
from tests.serving import Server

NUM_VIDEOS = 12
SMALL = ClipShape(width=96, height=64, num_frames=8, fps=8)


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of clips of one second."""
    generated = make_clips(tmp_path_factory.mktemp("bench-clips"), NUM_VIDEOS, SMALL)
    return generated[0].path.parent


@pytest.fixture
def bench(tmp_path: Path, videos: Path) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Runs ``scissor-vllm bench`` and returns its status and its result file."""

    def run(base_url: str, *arguments: str) -> tuple[int, dict[str, Any]]:
        result = tmp_path / "result.json"
        common = ["--base-url", base_url, "--videos", str(videos), "--output", str(result)]
        status = main([*common, "--output-len", "4", "--metrics-interval", "0.05", *arguments])
        return status, json.loads(result.read_text()) if result.exists() else {}

    return run


def rows_of(content: dict[str, Any]) -> list[dict[str, Any]]:
    return summarize_all(content["runs"])


# What is sent


@pytest.mark.parametrize(
    ("text", "ratios"),
    [
        ("stock", ()),
        ("0.25", (0.25,)),
        ("1", (1.0,)),
        ("1.0,0.5,0.1", (1.0, 0.5, 0.1)),
        ("auto", ("auto",)),
        ("auto,0.5", ("auto", 0.5)),
    ],
)
def test_a_ratio_is_one_several_none_or_the_servers_choice(
    text: str, ratios: tuple[float | str, ...]
) -> None:
    assert parse_ratios(text) == ratios
    cell = Cell(ratios, 1, None)
    assert Cell.from_dict(json.loads(json.dumps(cell.as_dict()))) == cell


@pytest.mark.parametrize("text", ["", "half", "0", "1.5", "0.5,", "0.5,stock", "nan"])
def test_what_is_no_ratio_is_refused_with_its_value(text: str) -> None:
    with pytest.raises(ValueError, match="ratio must be"):
        parse_ratios(text)


def test_a_sweep_is_every_combination_once() -> None:
    planned = cells([(0.5,), (0.1,), (0.5,)], [1, 8], [None, 2.0])
    assert len(planned) == len(set(planned)) == 8
    assert [cell.ratio_name for cell in planned[:2]] == ["0.5", "0.1"]


def test_mixed_ratios_are_drawn_by_the_seed_and_all_occur() -> None:
    cell = Cell((1.0, 0.5, 0.1), 4, None)
    drawn = draw_ratios(cell, 300, seed=1)
    assert drawn == draw_ratios(cell, 300, seed=1)
    assert drawn != draw_ratios(cell, 300, seed=2)
    assert all(60 < drawn.count(ratio) < 140 for ratio in cell.retention_ratios)


def test_requests_of_a_cell_have_videos_of_their_own_while_there_are_enough() -> None:
    clips = [Clip(Path(f"{number}.mp4"), 1.0) for number in range(10)]
    cell = Cell((0.5,), 2, None)
    warmups, requests = build_requests(clips, cell, num_prompts=6, num_warmups=4, seed=0)
    assert [request.clip for request in requests + warmups] == clips
    _, more = build_requests(clips, cell, num_prompts=12, num_warmups=0, seed=0)
    assert [request.clip for request in more] == [*clips, *clips[:2]]


def test_each_request_carries_its_ratio_its_video_and_no_more_are_in_flight(
    bench: Callable[..., Any],
) -> None:
    with fake_server(token_seconds=0.01) as fake:
        arguments = ("--num-prompts", "9", "--num-warmups", "3", "--max-concurrency", "3")
        status, content = bench(fake.base_url, "--retention-ratio", "1.0,0.5,0.1", *arguments)
    assert status == 0
    requests = content["runs"][0]["cells"][0]["requests"]
    assert [r["retention_ratio"] for r in requests] == draw_ratios(
        Cell((1.0, 0.5, 0.1), 3, None), 9, seed=0
    )
    assert Counter(fake.ratios[3:]) == Counter(r["retention_ratio"] for r in requests)
    assert len(set(fake.videos)) == 12
    assert fake.most_in_flight == 3
    assert all(body["max_completion_tokens"] == 4 for body in fake.bodies)
    kept = [int(NUM_VIDEO_TOKENS * r["retention_ratio"]) for r in requests]
    assert [r["retained_video_tokens"] for r in requests] == kept
    assert [r["prompt_tokens"] for r in requests] == [20 + k for k in kept]


def test_stock_requests_name_no_ratio_and_a_stock_server_is_measured(
    bench: Callable[..., Any],
) -> None:
    with fake_server(compresses=False) as fake:
        status, content = bench(
            fake.base_url + "/v1", "--retention-ratio", "stock", "--num-prompts", "2"
        )
    assert status == 0
    assert not any("retention_ratio" in body for body in fake.bodies)
    (row,) = rows_of(content)
    assert (row["label"], row["completed"], row["retained_video_tokens"]) == ("stock", 2, None)
    assert row["stage_queue_seconds"] == 0.5
    assert row["stage_video_tower_seconds"] is None


def test_a_server_with_the_plugin_is_not_measured_as_stock(
    bench: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with fake_server() as fake:
        assert bench(fake.base_url, "--retention-ratio", "stock")[0] == 1
        assert not fake.bodies
        assert "start that with an empty VLLM_PLUGINS" in capsys.readouterr().err
        by_default = ("--retention-ratio", "stock", "--label", "default", "--num-prompts", "2")
        assert bench(fake.base_url, *by_default)[0] == 0


def test_a_request_rate_spaces_the_requests_by_the_seed(
    bench: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: list[float] = []
    draw = np.random.gamma

    def drawn(shape: float, scale: float) -> float:
        planned.append(draw(shape, scale))
        return planned[-1]

    # Of vLLM's client, from whose plan the clock of a busy machine may differ.
    monkeypatch.setattr(np.random, "gamma", drawn)
    with fake_server() as fake:
        arguments = ("--retention-ratio", "0.5", "--request-rate", "6", "--num-prompts", "6")
        bench(fake.base_url, *arguments, "--num-warmups", "0")
        again = ("--append", "--label", "again")
        _, content = bench(fake.base_url, *arguments, "--num-warmups", "0", *again)
    (first,), (second,) = (run["cells"] for run in content["runs"])
    intervals, repeated = planned[:6], planned[6:]
    assert repeated == intervals
    assert len(set(intervals)) == 6
    for cell in (first, second):
        starts = [request["start_seconds"] for request in cell["requests"]]
        # vLLM scales its Poisson arrivals so that the last of n comes after n / rate seconds.
        assert starts == sorted(starts)
        assert starts[-1] > 0.3
    assert first["max_concurrency"] is None
    assert first["request_rate_per_second"] == 6


# What is measured


def test_statistics_are_those_of_vllms_own_client() -> None:
    import numpy as np
    from vllm.benchmarks.lib.endpoint_request_func import RequestFuncOutput
    from vllm.benchmarks.serve import calculate_metrics

    rng = np.random.default_rng(0)
    ttft, rest = rng.uniform(0.1, 0.4, 40), rng.uniform(0.2, 0.6, 40)
    tokens = [1 if number % 8 == 0 else 12 for number in range(40)]
    outputs = [
        RequestFuncOutput(
            success=number % 10 != 9,
            ttft=ttft[number],
            latency=ttft[number] + rest[number],
            output_tokens=tokens[number],
            prompt_len=100,
            start_time=1.0,
        )
        for number in range(40)
    ]
    goodput = {"ttft": 300.0, "tpot": 45.0, "e2el": 800.0}
    theirs, _ = calculate_metrics([], outputs, 7.5, None, [50, 90, 99], goodput)
    requests = [
        {
            "video": "a",
            "error": None if output.success else "broken",
            "ttft_seconds": output.ttft,
            "e2e_seconds": output.latency,
            "output_tokens": output.output_tokens,
            "prompt_tokens": output.prompt_len,
        }
        for output in outputs
    ]
    cell = {**Cell((0.5,), 4, None).as_dict(), "duration_seconds": 7.5, "requests": requests}
    run = {"label": "a", "server": {}, "settings": {"goodput_milliseconds": goodput}}
    (ours,) = summarize_all([{**run, "cells": [cell]}])
    assert ours["requests_per_second"] == pytest.approx(theirs.request_throughput)
    assert ours["goodput_requests_per_second"] == pytest.approx(theirs.request_goodput)
    assert 0 < theirs.request_goodput < theirs.request_throughput
    assert ours["output_tokens_per_second"] == pytest.approx(theirs.output_throughput)
    assert (ours["completed"], ours["failed"]) == (theirs.completed, theirs.failed) == (36, 4)
    for name, values in (
        ("ttft", theirs.percentiles_ttft_ms),
        ("tpot", theirs.percentiles_tpot_ms),
        ("e2e", theirs.percentiles_e2el_ms),
    ):
        for percentile, milliseconds in values:
            mine = ours[f"{name}_p{percentile}_seconds"] * 1000
            assert mine == pytest.approx(milliseconds), (name, percentile)


def test_goodput_is_written_as_for_vllm() -> None:
    from vllm.benchmarks.serve import parse_goodput as vllms

    pairs = ["ttft:2000", "tpot:50.5", "e2el:9000"]
    assert parse_goodput(pairs) == vllms(pairs)


@pytest.mark.parametrize("pair", ["ttft", "ttft:", "ttft:-1", "ttft:nan", "speed:3"])
def test_an_objective_of_another_form_is_a_usage_error(
    pair: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--goodput", pair])
    assert f"got {pair!r}" in capsys.readouterr().err


def test_fields_of_the_body_are_sent_with_each_request_and_recorded(
    bench: Callable[..., Any],
) -> None:
    fields = {"media_io_kwargs": {"video": {"num_frames": 128}}, "top_k": 5}
    with fake_server() as fake:
        _, content = bench(
            *(fake.base_url, "--retention-ratio", "0.5", "--num-prompts", "2"),
            *("--extra-body", json.dumps(fields)),
        )
    assert len(fake.bodies) >= 2
    for body in fake.bodies:
        assert body.items() >= {**fields, "retention_ratio": 0.5}.items()
    assert content["runs"][0]["settings"]["extra_body"] == fields


@pytest.mark.parametrize(("text", "problem"), [("{", "must be JSON"), ("[1]", "a JSON object")])
def test_a_body_that_is_no_json_object_is_a_usage_error(
    text: str, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--extra-body", text])
    message = capsys.readouterr().err
    assert problem in message
    assert f"got {text}" in message


def test_latencies_throughput_and_seconds_of_video_are_those_of_the_answers(
    bench: Callable[..., Any],
) -> None:
    with fake_server(token_seconds=0.05) as fake:
        _, content = bench(
            *(fake.base_url, "--retention-ratio", "0.5", "--num-prompts", "4"),
            *("--num-warmups", "0", "--goodput", "ttft:1", "--save-detailed"),
        )
    (row,) = rows_of(content)
    assert 0.05 <= row["ttft_p50_seconds"] < 0.1
    assert 0.05 <= row["tpot_p50_seconds"] < 0.1
    assert 0.2 <= row["e2e_p50_seconds"] < 0.4
    assert 0.05 <= row["itl_p50_seconds"] < 0.1
    assert row["video_seconds_per_second"] == pytest.approx(row["requests_per_second"])
    assert row["goodput_requests_per_second"] == 0
    assert row["kv_cache_tokens_per_request"] == 20 + 50 + 4
    assert row["kv_cache_usage_max"] == 0.25
    (cell,) = content["runs"][0]["cells"]
    assert cell["kv_cache"]["num_tokens"] == 1600
    assert cell["kv_cache"]["samples"][0]["num_requests_running"] == 2


def test_a_refusal_is_counted_with_the_servers_words(
    bench: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(body: dict[str, Any]) -> str | None:
        return "retention_ratio must be at least 0.2" if body["retention_ratio"] < 0.2 else None

    with fake_server(refuse=refuse) as fake:
        status, content = bench(
            fake.base_url, "--retention-ratio", "0.5,0.1", "0.1", "--num-prompts", "8"
        )
    mixed, none = rows_of(content)
    assert mixed["completed"] == sum(r == 0.5 for r in draw_ratios(Cell((0.5, 0.1), 1, None), 8, 0))
    assert mixed["completed"] + mixed["failed"] == 8
    assert none["completed"] == 0
    assert none["ttft_p50_seconds"] is None
    reason = "8 x 400 Bad Request: retention_ratio must be at least 0.2"
    assert none["errors"] == reason
    assert reason in capsys.readouterr().out
    assert status == 1


def test_a_stream_that_breaks_off_is_an_error(bench: Callable[..., Any]) -> None:
    with fake_server(break_off=lambda body: body["retention_ratio"] == 0.1) as fake:
        _, content = bench(fake.base_url, "--retention-ratio", "1.0", "0.1", "--num-prompts", "3")
    whole, broken = rows_of(content)
    assert (whole["completed"], whole["failed"]) == (3, 0)
    assert (broken["completed"], broken["failed"]) == (0, 3)
    assert broken["errors"] == "3 x stream broken off: the engine is gone"


@pytest.mark.parametrize(
    ("body", "compression", "error"),
    [
        (b'data: {"choices":[],"video_compression":{"a":1}}\n\ndata: [DONE]\n\n', {"a": 1}, None),
        (b'data: {"choices":[],"video_compression":{"a"', None, None),
        (b'data: {"choices":[{"delta":{"content":"\\"error\\""}}]}\n\n', None, None),
        (b'data: {"error":{"message":"no\\nmemory"}}\n\n', None, "stream broken off: no memory"),
    ],
)
def test_a_stream_is_read_for_what_vllms_client_leaves_out(
    body: bytes, compression: dict[str, int] | None, error: str | None
) -> None:
    assert read_stream(body) == (compression, error)


def test_a_server_without_metrics_is_measured(bench: Callable[..., Any]) -> None:
    with fake_server(has_metrics=False) as fake:
        status, content = bench(fake.base_url, "--retention-ratio", "0.5", "--num-prompts", "2")
    assert status == 0
    (cell,) = content["runs"][0]["cells"]
    assert cell["server_metrics"] is None
    assert cell["kv_cache"]["samples"] == []


def test_stages_are_the_differences_that_a_cell_made(bench: Callable[..., Any]) -> None:
    with fake_server(metrics_seconds=0.3, num_answered=1000) as fake:
        _, content = bench(
            *(fake.base_url, "--retention-ratio", "0.5"),
            *("--num-prompts", "4", "--num-warmups", "3", "--max-concurrency", "4"),
        )
    (cell,) = content["runs"][0]["cells"]
    tower = cell["server_metrics"]["histograms"]['scissor_vllm:video_stage_seconds{stage="tower"}']
    assert tower == {"sum_seconds": 2.0, "count": 4}
    (row,) = rows_of(content)
    assert row["stage_video_tower_seconds"] == row["stage_queue_seconds"] == 0.5
    assert row["stage_prefill_seconds"] is None


def test_metrics_are_added_over_engines_and_none_after_a_restart() -> None:
    one_engine = (METRICS + STAGES).format(count=3, half=1.5)
    second = "".join(
        line.replace('engine="0"', 'engine="1"') + "\n"
        for line in METRICS.format(count=5, half=2.5).splitlines()
        if not line.startswith("#")
    )
    caches = """\
# TYPE scissor_vllm:video_cache_hits counter
scissor_vllm:video_cache_hits_total{cache="frames",pid="1"} 1.0
scissor_vllm:video_cache_hits_total{cache="frames",pid="2"} 2.0
"""
    both = parse_metrics(one_engine + second + caches)
    assert both.counters['scissor_vllm:video_cache_hits{cache="frames"}'] == 3.0
    assert both.histograms["vllm:request_queue_time_seconds"] == (4.0, 8.0)
    assert both.histograms['scissor_vllm:video_stage_seconds{stage="tower"}'] == (1.5, 3.0)
    assert both.counters["vllm:prefix_cache_queries"] == 8.0
    assert both.num_kv_cache_tokens == 3200
    assert difference(both, parse_metrics(one_engine)) is None
    assert difference(None, both) is None


QWEN2_7B = {
    "text_config": {
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "hidden_size": 3584,
    },
}


def test_kv_cache_bytes_follow_from_the_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN2_7B))
    # Qwen2-7B: 28 layers of 4 heads of 128 numbers of 2 bytes, for keys and for values.
    assert kv_cache_bytes_per_token(str(tmp_path)) == 57344
    assert kv_cache_bytes_per_token("no-one/has-this-model") is None
    assert kv_cache_bytes_per_token(None) is None


@pytest.mark.parametrize(
    ("dtype", "num_bytes", "expected"),
    [
        ("auto", "None", 57344),
        # A worker's share of two, then float32.
        ("auto", 1600 * 28672, 57344),
        ("auto", 1600 * 114688 + 100, 114688),
        ("fp8", 1600 * 28672, 28672),
        ("turboquant_4bit_nc", "None", None),
    ],
)
def test_kv_cache_bytes_are_what_the_server_tells_of_its_cache(
    tmp_path: Path, dtype: str, num_bytes: object, expected: int | None
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN2_7B))
    told = parse_metrics(
        f'vllm:cache_config_info{{block_size="16",cache_dtype="{dtype}",'
        f'kv_cache_memory_bytes="{num_bytes}",num_gpu_blocks="100"}} 1.0\n'
    )
    assert kv_cache_bytes_per_token(str(tmp_path), told) == expected


# What is kept


def test_an_aborted_sweep_keeps_its_cells_and_goes_on(
    bench: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ratios = ("--retention-ratio", "1.0", "0.5", "0.1", "--num-prompts", "2", "--num-warmups", "0")
    calls = 0

    async def abort(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return await measure(*arguments, **options)

    with fake_server() as fake:
        with monkeypatch.context() as patch:
            patch.setattr("scissor_vllm.loadtest.sweep.measure", abort)
            status, content = bench(fake.base_url, *ratios)
        assert status == 130
        assert [row["retention_ratio"] for row in rows_of(content)] == ["1.0", "0.5"]
        before = content["runs"][0]["cells"]
        fake.bodies.clear()
        status, content = bench(fake.base_url, *ratios, "--append")
        assert status == 0
        assert fake.ratios == [0.1, 0.1]
    assert content["runs"][0]["cells"][:2] == before
    assert [row["retention_ratio"] for row in rows_of(content)] == ["1.0", "0.5", "0.1"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["result.csv", "result.json"]


def test_a_cell_without_an_answer_is_measured_again(bench: Callable[..., Any]) -> None:
    arguments = ("--retention-ratio", "0.5", "--num-prompts", "2")
    with fake_server(refuse=lambda body: "not now") as fake:
        status, content = bench(fake.base_url, *arguments)
        assert (status, rows_of(content)[0]["completed"]) == (1, 0)
        fake.refuse = lambda body: None
        status, content = bench(fake.base_url, *arguments, "--append")
    assert status == 0
    assert [row["completed"] for row in rows_of(content)] == [2]


def test_a_run_takes_more_cells_later(bench: Callable[..., Any]) -> None:
    with fake_server() as fake:
        bench(fake.base_url, "--retention-ratio", "0.5", "--num-prompts", "2")
        _, content = bench(
            *(fake.base_url, "--retention-ratio", "0.5", "0.1", "--num-prompts", "2"),
            *("--max-concurrency", "1", "2", "--append"),
        )
    (run,) = content["runs"]
    assert len(run["cells"]) == 4
    assert len(run["commands"]) == 2


def test_servers_are_merged_by_label_and_compared_with_stock(bench: Callable[..., Any]) -> None:
    arguments = ("--num-prompts", "4", "--max-concurrency", "2")
    with fake_server(compresses=False, token_seconds=0.02) as fake:
        bench(fake.base_url, "--retention-ratio", "stock", *arguments)
    with fake_server(token_seconds=0.01) as fake:
        _, content = bench(
            fake.base_url, "--label", "scc", "--retention-ratio", "0.1", "--append", *arguments
        )
    stock, scc = rows_of(content)
    assert (stock["label"], scc["label"]) == ("stock", "scc")
    assert stock["requests_per_second_over_stock"] == 1
    for name, key in (
        ("requests_per_second", "requests_per_second"),
        ("ttft_p50", "ttft_p50_seconds"),
    ):
        assert scc[f"{name}_over_stock"] == pytest.approx(scc[key] / stock[key])


def test_a_result_is_never_mixed_with_another_measurement(
    bench: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--retention-ratio", "0.5", "--num-prompts", "2")
    with fake_server() as fake:
        bench(fake.base_url, *arguments)
        saved = (tmp_path / "result.json").read_bytes()
        assert bench(fake.base_url, *arguments)[0] == 1
        assert "--append adds to it" in capsys.readouterr().err
        assert bench(fake.base_url, *arguments, "--append", "--question", "Why?")[0] == 1
        assert "label 'scissor-vllm' with question" in capsys.readouterr().err
        other = ("--append", "--label", "other")
        assert bench(fake.base_url, *arguments, *other, "--seed", "1")[0] == 1
        assert "was measured with seed 0, this is 1" in capsys.readouterr().err
        assert (tmp_path / "result.json").read_bytes() == saved
        elsewhere = json.loads(saved)
        elsewhere["environment"]["cpu"] = "another"
        (tmp_path / "result.json").write_text(json.dumps(elsewhere))
        assert bench(fake.base_url, *arguments, "--append")[0] == 1
        assert "with cpu another" in capsys.readouterr().err
        assert bench(fake.base_url, *arguments, "--overwrite")[0] == 0


def test_no_server_is_one_line_that_says_what_to_do(
    bench: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with fake_server() as fake:
        gone = fake.base_url
    assert bench(gone)[0] == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"--base-url must name a running server, {gone}" in message
    assert "scissor-vllm serve MODEL" in message


def test_a_server_that_dies_ends_the_sweep_and_its_cell_is_not_kept(
    bench: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def die_before(requests: Any, cell: Cell, settings: Any, **options: Any) -> Any:
        if cell.retention_ratios == (0.1,):
            gone = type(settings)(**{**vars(settings), "base_url": "http://127.0.0.1:1"})
            object.__setattr__(settings, "base_url", gone.base_url)
        return await measure(requests, cell, settings, **options)

    monkeypatch.setattr("scissor_vllm.loadtest.sweep.measure", die_before)
    with fake_server() as fake:
        status, content = bench(
            fake.base_url, "--retention-ratio", "0.5", "0.1", "0.2", "--num-prompts", "2"
        )
    assert status == 1
    assert [row["retention_ratio"] for row in rows_of(content)] == ["0.5"]
    assert "stopped answering" in capsys.readouterr().err


def test_the_result_says_what_was_run_and_where(bench: Callable[..., Any]) -> None:
    with fake_server() as fake:
        _, content = bench(fake.base_url, "--retention-ratio", "0.5", "--num-prompts", "2")
    (run,) = content["runs"]
    assert run["commands"][0].startswith(f"scissor-vllm bench --base-url {fake.base_url}")
    assert run["server"]["model"] == "fake"
    assert run["server"]["vllm_version"] == "0.0.1"
    assert run["settings"]["videos"] == {"folder": SMALL.folder_name}
    assert content["environment"] == environment()
    assert content["environment"]["num_cpus"] >= 1


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(content=values)
def test_what_is_written_is_read_again(
    tmp_path_factory: pytest.TempPathFactory, content: Any
) -> None:
    path = tmp_path_factory.getbasetemp() / "content.json"
    write_json(path, content)
    assert json.loads(path.read_text()) == content


# What is shown


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    """A result file: stock and scc at two concurrencies, scc at two ratios and a mix."""

    def cell(ratios: list[float], concurrency: int, seconds: float) -> dict[str, Any]:
        request = {
            "video": "a.mp4",
            "video_seconds": 4.0,
            "error": None,
            "ttft_seconds": seconds / 10,
            "e2e_seconds": seconds / 5,
            "prompt_tokens": 100,
            "output_tokens": 11,
            "retained_video_tokens": 80,
        }
        return {
            "retention_ratios": ratios,
            "max_concurrency": concurrency,
            "request_rate_per_second": None,
            "duration_seconds": seconds,
            "requests": [request] * 10,
            "server_metrics": None,
            "kv_cache": None,
        }

    def run(label: str, *done: dict[str, Any]) -> dict[str, Any]:
        return {
            "label": label,
            "commands": [],
            "server": {"kv_cache_bytes_per_token": 2**20},
            "settings": {},
            "cells": list(done),
        }

    runs = [
        run("stock", cell([], 1, 10), cell([], 8, 5)),
        run(
            "scc",
            *(cell([1.0], 1, 10), cell([0.1], 1, 5), cell([1.0, 0.1], 1, 8)),
            *(cell([1.0], 8, 5), cell([0.1], 8, 2)),
        ),
    ]
    path = tmp_path / "measured.json"
    path.write_text(json.dumps({"format": 1, "environment": {}, "runs": runs}))
    return path


def test_the_markdown_table_has_a_line_a_cell(
    measured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["table", str(measured), "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 7
    assert lines[0].startswith("| label | ratio | concurrency | requests/s | x stock | TTFT")
    assert lines[-1].startswith("| scc | 0.1 | 8 | 5.00 | 2.50 | 200 / 200 / 200 |")
    assert "111.0" in lines[-1]  # MiB: 100 prompt and 11 output tokens.
    assert len({line.count("|") for line in lines}) == 1
    assert lines == markdown_table(summarize_all(read_results(measured).runs)).splitlines()


def test_the_csv_has_every_value_under_a_name_with_its_unit(measured: Path) -> None:
    rows = summarize_all(read_results(measured).runs)
    read = list(csv.DictReader(io.StringIO(csv_table(rows))))
    assert len(read) == 7
    assert read[3]["retention_ratio"] == "0.1"
    assert float(read[3]["requests_per_second"]) == 2.0
    assert float(read[3]["ttft_p50_seconds"]) == 0.5
    assert read[3]["stage_prefill_seconds"] == ""


def test_objectives_can_be_set_afterwards(
    measured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["table", str(measured), "--csv", "--goodput", "ttft:600"])
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    good = [float(row["goodput_requests_per_second"]) for row in rows]
    assert good == [0.0, 2.0, 0.0, 2.0, 0.0, 2.0, 5.0]


def test_the_table_tells_of_caches_and_of_videos_sent_twice(
    bench: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with fake_server() as fake:
        arguments = ("--num-warmups", "0", "--retention-ratio", "0.5")
        _, content = bench(fake.base_url, "--num-prompts", str(NUM_VIDEOS + 1), *arguments)
    assert f"more than once in 1 cells ({NUM_VIDEOS} distinct)" in capsys.readouterr().out
    counters = content["runs"][0]["cells"][0]["server_metrics"]["counters"]
    counters["vllm:prefix_cache_hits"] = counters["vllm:prefix_cache_queries"]
    counters['scissor_vllm:video_cache_queries{cache="features"}'] = 4
    counters['scissor_vllm:video_cache_hits{cache="features"}'] = 3
    (row,) = rows_of(content)
    assert (row["prefix_cache_hit_rate"], row["features_cache_hit_rate"]) == (1.0, 0.75)
    assert (row["mm_cache_hit_rate"], row["frames_cache_hit_rate"]) == (None, None)
    assert "75% of a cell's lookups in the server's features cache" in text_table([row])


def test_the_table_tells_of_preemptions(measured: Path) -> None:
    content = json.loads(measured.read_text())
    assert "preempted" not in text_table(rows_of(content))
    first, second = content["runs"][0]["cells"][:2]
    first["server_metrics"] = {"counters": {"vllm:num_preemptions": 3.0}}
    second["server_metrics"] = {"counters": {"vllm:num_preemptions": 0.0}}
    rows = rows_of(content)
    assert [row["preemptions"] for row in rows[:3]] == [3.0, 0.0, None]
    completed = rows[0]["completed"]
    assert f"preempted in 1 cells, 3 times in one of {completed} requests" in text_table(rows)


def test_throughput_is_a_line_per_concurrency_against_the_ratio(measured: Path) -> None:
    (axes,) = throughput_figure(summarize_all(read_results(measured).runs)).axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert set(lines) == {
        "stock, no ratio, concurrency 1",
        "stock, no ratio, concurrency 8",
        "scc, concurrency 1",
        "scc, concurrency 8",
    }
    assert list(lines["scc, concurrency 8"].get_xdata()) == [0.1, 1.0]
    assert list(lines["scc, concurrency 8"].get_ydata()) == [5.0, 2.0]
    assert set(lines["stock, no ratio, concurrency 8"].get_ydata()) == {2.0}


def test_latency_is_a_line_per_ratio_against_throughput(measured: Path) -> None:
    (axes,) = latency_figure(summarize_all(read_results(measured).runs)).axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert set(lines) == {
        "stock, no ratio",
        "scc, ratio 1.0",
        "scc, ratio 0.1",
        "scc, ratio 1.0,0.1",
    }
    assert list(lines["scc, ratio 0.1"].get_xdata()) == [2.0, 5.0]
    assert list(lines["scc, ratio 0.1"].get_ydata()) == pytest.approx([0.5, 0.2])
    assert sorted(text.get_text() for text in axes.texts) == ["1"] * 4 + ["8"] * 3


def test_accuracy_is_drawn_against_the_throughput_of_its_ratio(measured: Path) -> None:
    rows = summarize_all(read_results(measured).runs)
    accuracy: list[dict[str, Any]] = [
        {"method": "stock", "retention_ratio": None, "accuracy": 0.6},
        {"method": "scc", "retention_ratio": 1.0, "accuracy": 0.6, "low": 0.57, "high": 0.62},
        {"method": "scc", "retention_ratio": 0.1, "accuracy": 0.5},
        {"method": "scc", "retention_ratio": 0.3, "accuracy": 0.55},
    ]
    (axes,) = accuracy_figure(rows, accuracy).axes
    assert axes.get_xlabel() == "requests/s at concurrency 8"
    bars = {bar.get_label(): bar for bar in axes.containers}
    assert set(bars) == {"stock", "scc"}
    line, _, (spread,) = bars["scc"].lines
    assert [*zip(line.get_xdata(), line.get_ydata(), strict=True)] == [(2.0, 0.6), (5.0, 0.5)]
    assert spread.get_segments()[0][:, 1].tolist() == pytest.approx([0.57, 0.62])


def test_plots_are_pictures(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import cv2

    accuracy = measured.with_name("accuracy.json")
    accuracy.write_text('[{"method": "scc", "retention_ratio": 0.1, "accuracy": 0.5}]')
    folder = measured.parent / "plots"
    status = main(["plot", str(measured), "--accuracy", str(accuracy), "--output", str(folder)])
    assert status == 0
    names = ["accuracy.png", "latency.png", "throughput.png"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert len(capsys.readouterr().out.splitlines()) == 3
    for name in names:
        picture = cv2.imread(str(folder / name))
        assert picture is not None
        assert picture.shape[0] > 400
        assert picture.std() > 5


@pytest.mark.parametrize(
    ("accuracy", "message"),
    [
        ("{}", "no method and retention_ratio of the accuracy file"),
        ("[3]", "must be a JSON list of objects"),
        ('[{"method": "other", "retention_ratio": 0.1, "accuracy": 1}]', "name them alike"),
    ],
)
def test_an_accuracy_file_that_does_not_fit_is_refused(
    measured: Path, accuracy: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = measured.with_name("accuracy.json")
    path.write_text(accuracy)
    assert main(["plot", str(measured), "--accuracy", str(path)]) == 1
    assert message in capsys.readouterr().err


def test_another_file_is_no_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.json"
    path.write_text('{"runs": []}')
    assert main(["table", str(path)]) == 1
    assert "is no result file of the load test" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_of_a_table_ends_the_command_quietly(
    measured: Path,
) -> None:
    command = [sys.executable, "-m", "scissor_vllm.cli", "bench", "table", str(measured)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as table:
        assert table.stdout is not None
        assert table.stderr is not None
        table.stdout.close()
        assert table.stderr.read() == b""
    assert table.returncode == 128 + signal.SIGPIPE


# The clips


def test_clips_move_differ_and_are_made_once(tmp_path: Path) -> None:
    first, second = make_clips(tmp_path, 2, SMALL)
    pictures = [decode_all(clip.path) for clip in (first, second)]
    assert [len(frames) for frames in pictures] == [SMALL.num_frames] * 2
    assert first.seconds == 1.0
    for frames in pictures:
        assert frames[0].shape == (64, 96, 3)
        assert abs(frames[0].astype(int) - frames[-1]).mean() > 3
    assert abs(pictures[0][0].astype(int) - pictures[1][0]).mean() > 10
    made = first.path.stat().st_mtime_ns
    again = make_clips(tmp_path, 3, SMALL)
    assert again[0].path.stat().st_mtime_ns == made
    other = make_clips(tmp_path, 1, ClipShape(96, 64, 8, 8, seed=1))
    assert other[0].path.read_bytes() != first.path.read_bytes()


@pytest.mark.parametrize("size", [("--width", "97"), ("--height", "32")])
def test_a_size_that_cannot_be_encoded_is_refused(
    size: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["clips", str(tmp_path), "--num-clips", "1", *size]) == 1
    assert f"got {size[1]} x " in (err := capsys.readouterr().err) or f"x {size[1]}" in err


def test_a_folder_without_videos_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--videos", str(tmp_path), "--output", str(tmp_path / "r.json")]) == 1
    assert f"got {tmp_path}" in capsys.readouterr().err


# What it needs

OPTIONAL = ("av", "matplotlib", "pandas", "datasets", "soundfile", "scipy", "plotly", "seaborn")


def run_without(modules: tuple[str, ...], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``scissor-vllm bench`` where these modules cannot be imported."""
    code = (
        "import sys\n"
        f"for name in {modules!r}: sys.modules[name] = None\n"
        "from scissor_vllm.loadtest.command import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_measuring_needs_no_optional_package(videos: Path, tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    with fake_server() as fake:
        where = ("--base-url", fake.base_url, "--videos", str(videos), "--output", str(output))
        load = ("--retention-ratio", "0.5", "--num-prompts", "2")
        run = run_preloaded(["scissor-vllm", "bench", *where, *load], without=OPTIONAL)
    assert run.returncode == 0, run.stdout
    assert "0.5" in run.stdout
    assert rows_of(json.loads(output.read_text()))[0]["video_seconds_per_second"] > 0


def test_each_part_says_what_it_needs(tmp_path: Path, measured: Path) -> None:
    run = run_without(("vllm",))
    assert run.returncode == 1
    assert "vllm is not installed here" in run.stderr
    clips_run = run_without(("av",), "clips", str(tmp_path))
    assert clips_run.returncode == 1
    assert "pip install av" in clips_run.stderr
    drawn = run_without(("matplotlib",), "plot", str(measured))
    assert drawn.returncode == 1
    assert "pip install 'scissor-vllm[bench]'" in drawn.stderr


# The real thing


def test_a_real_server_is_measured(server: Server, videos: Path, tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    command = ["scissor-vllm", "bench", "--label", "scc"]
    where = ["--base-url", f"http://127.0.0.1:{server.port}/v1", "--output", str(output)]
    load = ["--num-prompts", "4", "--num-warmups", "1", "--output-len", "6"]
    grid = ["--retention-ratio", "stock", "0.25", "0.5,0.1", "--max-concurrency", "2"]
    run = run_preloaded(
        [*command, *where, *load, *grid, "--videos", str(videos), "--metrics-interval", "0.1"]
    )
    assert run.returncode == 0, run.stdout
    assert "100%" in run.stdout  # The progress bar.
    content = json.loads(output.read_text())
    before, quarter, mixed = rows_of(content)
    tokens = SMALL.num_frames * TOKENS_PER_FRAME
    assert [row["completed"] for row in (before, quarter, mixed)] == [4, 4, 4]
    assert before["retained_video_tokens"] == tokens
    assert quarter["retained_video_tokens"] == num_retained_tokens(tokens, 0.25)
    assert before["prompt_tokens"] - quarter["prompt_tokens"] == (
        tokens - quarter["retained_video_tokens"]
    )
    for request in content["runs"][0]["cells"][2]["requests"]:
        assert request["retained_video_tokens"] == num_retained_tokens(
            tokens, request["retention_ratio"]
        )
        assert request["output_tokens"] == 6
        assert 0 < request["ttft_seconds"] < request["e2e_seconds"]
    for row in (before, quarter, mixed):
        assert row["stage_prefill_seconds"] > 0
        assert row["stage_decode_seconds"] > 0
        # The server's time to the first token lies within the client's.
        assert row["stage_queue_seconds"] + row["stage_prefill_seconds"] < row["e2e_p99_seconds"]
    config = json.loads((demo_model_path() / "config.json").read_text())
    text = config["text_config"]
    heads, width = text["num_key_value_heads"], text["hidden_size"] // text["num_attention_heads"]
    num_values = 2 * text["num_hidden_layers"] * heads * width  # Keys and values.
    # The demo is served in float32.
    assert content["runs"][0]["server"]["kv_cache_bytes_per_token"] == 4 * num_values
    assert content["runs"][0]["server"]["model"] == "demo"
    assert content["runs"][0]["cells"][0]["kv_cache"]["num_tokens"] > 0
