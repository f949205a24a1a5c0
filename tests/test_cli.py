"""The command line: what it adds to vLLM's, and what it sets up."""

from __future__ import annotations

import argparse
import subprocess
import sys

import pytest

from scissor_vllm.cli import (
    add_retention_options,
    apply_retention_options,
    main,
    set_environment,
    widen_front_end,
)
from scissor_vllm.compression import METHODS


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_retention_options(parser)
    args = parser.parse_args(argv)
    args.mm_processor_kwargs = None
    args.mm_processor_cache_gb = 4
    return args


def test_without_our_flags_the_engines_options_stay_as_they_are() -> None:
    args = parse()
    apply_retention_options(args)
    assert args.mm_processor_kwargs is None


def test_our_flags_reach_the_engine_beside_the_operators_own_options() -> None:
    args = parse("--default-retention-ratio", "0.5", "--video-compression", "uniform")
    args.mm_processor_kwargs = {"device": "cpu", "retention_ratio": 0.9}
    apply_retention_options(args)
    assert args.mm_processor_kwargs == {
        "device": "cpu",
        "retention_ratio": 0.5,
        "video_compression": "uniform",
    }


def test_cache_sizes_reach_the_engine() -> None:
    args = parse("--video-frame-cache-gb", "0.5", "--video-feature-cache-gb", "0")
    apply_retention_options(args)
    assert args.mm_processor_kwargs == {"video_frame_cache_gb": 0.5, "video_feature_cache_gb": 0}


@pytest.fixture(scope="module")
def vllm_parser() -> argparse.ArgumentParser:
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    ServeSubcommand().subparser_init(parser.add_subparsers(dest="subparser", required=True))
    return parser


@pytest.mark.parametrize(
    ("num_cpus", "options", "expected"),
    [
        (1, [], None),
        (15, [], None),
        (16, [], 2),
        (128, [], 2),
        (128, ["--api-server-count", "1"], 1),
        (16, ["--api-server-count", "6"], 6),
        (16, ["--data-parallel-size", "2"], None),
        (16, ["--headless"], None),
        (16, ["--data-parallel-rank", "0"], None),
    ],
)
def test_there_are_two_api_servers_where_there_are_cpus_for_them_unless_told(
    vllm_parser: argparse.ArgumentParser, num_cpus: int, options: list[str], expected: int | None
) -> None:
    args = vllm_parser.parse_args(["serve", "model", *options])
    widen_front_end(args, num_cpus)
    assert args.api_server_count == expected


@pytest.mark.parametrize("name", ["VLLM_ALLOW_RUNTIME_LORA_UPDATING", "VLLM_USE_RUST_FRONTEND"])
def test_where_vllm_allows_one_api_server_there_is_one(
    vllm_parser: argparse.ArgumentParser, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "1")
    args = vllm_parser.parse_args(["serve", "model"])
    widen_front_end(args, 64)
    assert args.api_server_count is None


@pytest.mark.parametrize("text", ["-1", "nan", "inf", "much"])
def test_a_cache_size_below_zero_is_a_usage_error(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse("--video-frame-cache-gb", text)
    assert "--video-frame-cache-gb" in capsys.readouterr().err


def test_a_cache_size_that_is_no_number_ends_the_start() -> None:
    args = parse()
    args.mm_processor_kwargs = {"video_feature_cache_gb": "2"}
    with pytest.raises(SystemExit, match=r"video_feature_cache_gb must be a number of GiB"):
        apply_retention_options(args)


def test_a_default_below_the_minimum_ends_the_start() -> None:
    args = parse("--default-retention-ratio", "0.1", "--min-retention-ratio", "0.2")
    with pytest.raises(SystemExit, match=r"at least 0.2 on this server, got 0.1"):
        apply_retention_options(args)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_can_be_chosen(name: str) -> None:
    args = parse("--video-compression", name)
    apply_retention_options(args)
    assert args.mm_processor_kwargs == {"video_compression": name}


def test_an_unknown_method_is_a_usage_error_that_lists_the_known(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        parse("--video-compression", "scissor")
    printed = capsys.readouterr().err
    assert "invalid choice: 'scissor'" in printed
    assert all(name in printed for name in METHODS)


def test_an_unknown_method_among_the_engines_options_ends_the_start() -> None:
    args = parse()
    args.mm_processor_kwargs = {"video_compression": "scissor"}
    with pytest.raises(SystemExit, match=r"unknown .* 'scissor': choose one of evs, .*vidcom2"):
        apply_retention_options(args)


@pytest.mark.parametrize("text", ["0", "1.01", "-1", "nan", "half"])
def test_a_ratio_out_of_range_is_a_usage_error(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse("--default-retention-ratio", text)
    assert "--default-retention-ratio" in capsys.readouterr().err


def test_unset_plugins_become_all_that_vllm_would_load_and_ours() -> None:
    environment: dict[str, str] = {}
    set_environment(environment)
    names = environment["VLLM_PLUGINS"].split(",")
    assert "scissor_vllm" in names
    assert "lora_filesystem_resolver" in names


def test_plugins_that_were_named_stay_the_only_ones_beside_ours() -> None:
    environment = {"VLLM_PLUGINS": "mine", "VLLM_VIDEO_LOADER_BACKEND": "opencv"}
    set_environment(environment)
    assert environment == {
        "VLLM_PLUGINS": "mine,scissor_vllm",
        "VLLM_VIDEO_LOADER_BACKEND": "opencv",
    }


def test_pyav_is_the_default_loader() -> None:
    environment: dict[str, str] = {}
    set_environment(environment)
    assert environment["VLLM_VIDEO_LOADER_BACKEND"] == "pyav"


def test_an_unknown_command_shows_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sevre"]) == 2
    assert "scissor-vllm serve MODEL" in capsys.readouterr().err


def test_serve_help_lists_vllms_flags_and_ours() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "scissor_vllm.cli", "serve", "--help=all"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    for flag in ("--tensor-parallel-size", "--default-retention-ratio", "--min-retention-ratio"):
        assert flag in run.stdout
