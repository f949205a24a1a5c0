"""What our command chooses where the operator says nothing."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from scissor_vllm.cpus import num_cpus
from scissor_vllm.settings import DEFAULT_TOWER_MERGING_MAX_RATIO, TOWER_MERGING_MAX_RATIO

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CPUS_FOR_API_SERVERS = 16
"""Number of CPUs from which a second API server pays."""

_MERGES_PATCHES = "LlavaOnevisionForConditionalGeneration"


def choose_api_servers(args: argparse.Namespace) -> None:
    """Start two API servers where they answer as one does, unless the operator chose a number.

    One prepares about 11 videos a second of 32 frames. Two have a processor cache each, so a video
    that is named by its ``uuid`` alone would be found by one of them: they are started where the
    operator switched that cache off. vLLM refuses several beside some options.
    """
    needs_one = (
        args.api_server_count is not None
        or args.mm_processor_cache_gb > 0
        or num_cpus() < CPUS_FOR_API_SERVERS
        or args.headless
        or args.grpc
        or args.enable_fault_tolerance
        or isinstance(args.fault_tolerance_config, dict)
        or args.enable_elastic_ep
        or args.data_parallel_size > 1
        or os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "0").lower() in ("1", "true")
    )
    if not needs_one:
        args.api_server_count = 2


def choose_tower_merging(args: argparse.Namespace) -> None:
    """Merge patches in the tower at low ratios, unless the operator chose or the model cannot.

    Answers were compared for LLaVA-OneVision's tower as it is saved, not quantized.
    """
    if args.tower_merging_max_ratio is not None or args.quantization is not None:
        return
    if TOWER_MERGING_MAX_RATIO in (args.mm_processor_kwargs or {}):
        return
    config = config_of(args)
    if config is None or _MERGES_PATCHES not in (
        _overridden_architectures(args) or config.architectures or []
    ):
        return
    tower = getattr(config, "vision_config", None)
    is_quantized = getattr(config, "quantization_config", None) is not None
    if getattr(tower, "model_type", None) == "siglip_vision_model" and not is_quantized:
        args.tower_merging_max_ratio = DEFAULT_TOWER_MERGING_MAX_RATIO


def config_of(args: argparse.Namespace) -> PretrainedConfig | None:
    """Return a model's config, None if it cannot be read here."""
    from vllm.transformers_utils.config import get_config

    try:
        return get_config(
            args.model_tag or args.model, args.trust_remote_code, args.revision, args.code_revision
        )
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
