"""What our command chooses where the operator says nothing."""

from __future__ import annotations

import argparse
import os
from functools import cache
from typing import TYPE_CHECKING, Any

from scissor_vllm.cpus import num_cpus
from scissor_vllm.settings import (
    DEFAULT_TOWER_FP8_MAX_RATIO,
    DEFAULT_TOWER_MERGING_MAX_RATIO,
    TOWER_FP8_MAX_RATIO,
    TOWER_MERGING_MAX_RATIO,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CPUS_FOR_API_SERVERS = 16
"""Number of CPUs for an engine from which more API servers than one pay."""
API_SERVERS = 4
"""Of an engine."""

_LLAVA_ONEVISION = "LlavaOnevisionForConditionalGeneration"
_WHOLE_TOWER_ON_EACH_RANK = frozenset({_LLAVA_ONEVISION, "LlavaNextVideoForConditionalGeneration"})
"""Models whose uncompressed videos do not wait for one rank in that mode."""
MERGES_BY_DEFAULT: dict[str, str | None] = {_LLAVA_ONEVISION: "siglip_vision_model"}
"""Architectures whose tower merges patches where the operator does not choose, and the tower's
``model_type``, None for any. Answers were compared for these alone.

To add Qwen-VL's: ``"Qwen2_5_VLForConditionalGeneration": None`` and
``"Qwen3VLForConditionalGeneration": None``, see ``worker.merged_grid``.
"""
_FP8_BY_DEFAULT: dict[str, str | None] = {_LLAVA_ONEVISION: "siglip_vision_model"}
"""The same for a tower whose MLPs are computed in FP8."""
_HOPPER = 90
"""Compute capability."""
_ARENA_BYTES = 3 << 30
"""Of shared memory, free: vLLM's arena has 2 GiB."""
_EXPERT_COUNTS = ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts")
"""Fields of a language model's config, one of which a mixture of experts has."""


def choose_api_servers(args: argparse.Namespace) -> None:
    """Start several API servers where they answer as one does, unless the operator chose a number.

    One had two thirds of the requests/s of four (``docs/benchmarks.md``). Several have a processor
    cache each, so a video that is named by its ``uuid`` alone would be found by one of them: they
    are started where the operator switched that cache off. Engines of data parallelism on this host
    get as many each. vLLM refuses several beside some options.
    """
    num_engines = args.data_parallel_size
    is_for_vllm = (
        args.api_server_count is not None
        or args.mm_processor_cache_gb > 0
        or num_cpus() < CPUS_FOR_API_SERVERS * num_engines
        or args.headless
        or args.grpc
        or _replaces_engines(args)
        or (num_engines > 1 and _balances_elsewhere(args))
        or os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "0").lower() in ("1", "true")
    )
    if not is_for_vllm:
        args.api_server_count = API_SERVERS * num_engines


def _replaces_engines(args: argparse.Namespace) -> bool:
    """Return whether vLLM starts and stops engines while it serves."""
    return bool(
        args.enable_fault_tolerance
        or isinstance(args.fault_tolerance_config, dict)
        or args.enable_elastic_ep
    )


def _balances_elsewhere(args: argparse.Namespace) -> bool:
    """Return whether this command starts a part of the engines of data parallelism."""
    return bool(
        args.data_parallel_external_lb
        or args.data_parallel_hybrid_lb
        or args.data_parallel_multi_port_external_lb
        or args.data_parallel_rank is not None
        or args.data_parallel_start_rank is not None
        or args.data_parallel_size_local not in (None, args.data_parallel_size)
    )


def choose_executor(args: argparse.Namespace) -> None:
    """Run each engine's worker in the engine's process with data parallelism on one GPU each.

    vLLM does so for one engine. For several it starts a process for each worker, and pickles each
    step's videos to it. vLLM's choice stays for experts that engines share, and wherever engines
    do not all start here, once.
    """
    ranks = (
        args.tensor_parallel_size,
        args.pipeline_parallel_size,
        args.prefill_context_parallel_size,
    )
    is_for_vllm = (
        args.distributed_executor_backend is not None
        or args.data_parallel_size == 1
        or any(size > 1 for size in ranks)
        or args.nnodes > 1
        or args.data_parallel_backend != "mp"
        or _balances_elsewhere(args)
        or _replaces_engines(args)
    )
    if not is_for_vllm and _is_cuda() and not _has_experts(args):
        args.distributed_executor_backend = "uni"


def _has_experts(args: argparse.Namespace) -> bool:
    """Return whether the language model is a mixture of experts, or may be."""
    config = config_of(args)
    if config is None:
        return True
    text = config.get_text_config()
    return any(getattr(text, name, None) for name in _EXPERT_COUNTS)


def leave_parallelism_open(parser: argparse.ArgumentParser) -> None:
    """Have the options that :func:`choose_parallelism` chooses be None where none is given."""
    parser.set_defaults(mm_encoder_tp_mode=None, enable_shm_tensor_arena=None)


def choose_parallelism(args: argparse.Namespace) -> None:
    """Choose how ranks of tensor parallelism get and encode videos, where the operator does not.

    Each rank has the whole tower of LLaVA's models, so that ranks share out a video's frames and
    do not exchange sums in each layer. Frames reach the ranks by shared memory. Without tensor
    parallelism, and for other models, vLLM's defaults stay.
    """
    shares_out = False
    if args.tensor_parallel_size > 1:
        shares_out = not _WHOLE_TOWER_ON_EACH_RANK.isdisjoint(architectures_of(args) or [])
    if args.mm_encoder_tp_mode is None:
        args.mm_encoder_tp_mode = "data" if shares_out else "weights"
    if args.enable_shm_tensor_arena is None:
        has_one_host = args.nnodes == 1 and args.distributed_executor_backend in (None, "mp")
        args.enable_shm_tensor_arena = shares_out and has_one_host and _has_shared_memory()


def _has_shared_memory() -> bool:
    try:
        free = os.statvfs("/dev/shm")
    except OSError:
        return False
    return free.f_bavail * free.f_frsize >= _ARENA_BYTES


def choose_tower_merging(args: argparse.Namespace) -> None:
    """Merge patches in the tower at low ratios, unless the operator chose or the model cannot.

    Answers were compared for LLaVA-OneVision's tower as it is saved, not quantized.
    """
    if args.tower_merging_max_ratio is not None or _changes_tower(args):
        return
    if TOWER_MERGING_MAX_RATIO in (args.mm_processor_kwargs or {}):
        return
    if _has_tower(args, MERGES_BY_DEFAULT):
        args.tower_merging_max_ratio = DEFAULT_TOWER_MERGING_MAX_RATIO


def choose_tower_fp8(args: argparse.Namespace) -> None:
    """Compute the tower's MLPs in FP8 at low ratios, unless the operator chose or it does not pay.

    It was measured on a Hopper GPU, with the whole tower on each rank. Call it before the way of
    tensor parallelism is chosen: an operator's ``weights`` splits the tower.
    """
    if args.tower_fp8_max_ratio is not None or _changes_tower(args):
        return
    if TOWER_FP8_MAX_RATIO in (args.mm_processor_kwargs or {}):
        return
    if args.tensor_parallel_size > 1 and args.mm_encoder_tp_mode == "weights":
        return
    if _is_hopper() and _has_tower(args, _FP8_BY_DEFAULT):
        args.tower_fp8_max_ratio = DEFAULT_TOWER_FP8_MAX_RATIO


def _is_cuda() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cuda())


def _is_hopper() -> bool:
    from vllm.platforms import current_platform

    return _is_cuda() and current_platform.is_device_capability_family(_HOPPER)


def _has_tower(args: argparse.Namespace, towers: dict[str, str | None]) -> bool:
    """Return whether a model is one of these architectures with that tower, as it was saved.

    Args:
        args: of the command line.
        towers: ``model_type`` of the tower for each architecture, None for any.
    """
    config = config_of(args)
    if config is None or getattr(config, "quantization_config", None) is not None:
        return False
    tower = getattr(getattr(config, "vision_config", None), "model_type", None)
    names = _overridden_architectures(args) or config.architectures or []
    return any(name in towers and towers[name] in (None, tower) for name in names)


def _changes_tower(args: argparse.Namespace) -> bool:
    """Return whether options of vLLM change the tower's layers or their attention."""
    backend = args.mm_encoder_attn_backend
    return (
        args.quantization is not None
        or args.enable_tower_connector_lora
        or args.mm_encoder_attn_dtype not in (None, "auto")
        or getattr(backend, "name", backend) not in (None, "FLASH_ATTN")
        or bool(args.compilation_config.compile_mm_encoder)
    )


def config_of(args: argparse.Namespace) -> PretrainedConfig | None:
    """Return a model's config, None if it cannot be read here."""
    return _read_config(
        args.model_tag or args.model, args.trust_remote_code, args.revision, args.code_revision
    )


@cache
def _read_config(*names: Any) -> PretrainedConfig | None:
    from vllm.transformers_utils.config import get_config

    try:
        return get_config(*names)
    except Exception:
        # The model may be in a bucket, in another format or missing. vLLM reports that, and the
        # API server checks again.
        return None


def architectures_of(args: argparse.Namespace) -> list[str] | None:
    """Return a model's architectures, None if its config cannot be read here."""
    if named := _overridden_architectures(args):
        return named
    config = config_of(args)
    return None if config is None else list(config.architectures or [])


def _overridden_architectures(args: argparse.Namespace) -> list[str]:
    overrides = args.hf_overrides if isinstance(args.hf_overrides, dict) else {}
    return list(overrides.get("architectures") or [])
