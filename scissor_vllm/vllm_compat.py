"""What differs between the supported versions of vLLM, and where it must be told what it has no
setting for, in one place.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import wraps
from typing import Any

import torch
from vllm.config import ModelConfig
from vllm.config.multimodal import MultiModalConfig
from vllm.platforms import current_platform


def cli_env_setup() -> None:
    """Set the environment that vLLM's own command sets before it starts processes.

    vLLM 0.33 moved the function; the second import can go with support for 0.32.
    """
    try:
        from vllm.entrypoints.common.startup import cli_env_setup as setup
    except ImportError:
        from vllm.entrypoints.serve.utils.api_utils import cli_env_setup as setup
    setup()


class PositionsFromModel(MultiModalConfig):
    """vLLM's config of a model whose embeddings carry their positions, at any pruning rate."""

    def is_multimodal_pruning_enabled(self) -> bool:
        """Return whether the model runners ask the model for positions after encoding: always."""
        return True


def ask_model_for_positions(model_config: ModelConfig) -> None:
    """Have the model runner call the model's ``recompute_mrope_positions``.

    That is vLLM's interface (``SupportsMultiModalPruning``) on both runners. In vLLM 0.32 and 0.33
    they use it if the server-wide ``--video-pruning-rate`` is set, which would also prune: V1's
    ``load_model`` and V2's ``maybe_create_mm_pruner`` both ask the config, after the model was
    made. A model calls this while it is made, so in its worker alone, and only for itself. It can
    go when a runner asks the model instead.
    """
    model_config.multimodal_config = _with_positions(model_config.get_multimodal_config())
    if not current_platform.is_cpu():
        from vllm.v1.worker.gpu.model_states.mm_pruning import MultiModalPruner

        skip_plain_rows(MultiModalPruner)
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    ask_where_rows_carry_positions(GPUModelRunner)


def _with_positions(config: MultiModalConfig) -> PositionsFromModel:
    """Return a config with the same values: a validator would run again on those of a copy."""
    same = PositionsFromModel.__new__(PositionsFromModel)
    same.__dict__.update(vars(config))
    return same


def skip_plain_rows(pruner: Any) -> None:
    """Have V2's pruner leave a step alone whose rows carry no positions.

    It reads, and has the model recompute, the positions of every request with an image or a video,
    at each step of its prefill. It can go when vLLM asks the model which rows carry any.

    Args:
        pruner: ``MultiModalPruner``.
    """
    recompute = pruner.recompute
    if hasattr(recompute, "__wrapped__"):
        return

    @wraps(recompute)
    def recompute_carried(self: Any, mm_embeds: list[torch.Tensor], *args: Any) -> Any:
        is_ours = hasattr(self.model, "row_width")
        if is_ours and not carry_positions(self.model, mm_embeds):
            return mm_embeds
        return recompute(self, mm_embeds, *args)

    pruner.recompute = recompute_carried


def ask_where_rows_carry_positions(runner: Any) -> None:
    """Have V1's runner ask the model for positions in those steps alone whose rows carry any.

    Its attribute is set once, for all steps: each then has the model recompute the positions of
    every request, copies them again to the device, and encodes a batch's videos one by one, which
    ours bound themselves. On a CPU ``load_model`` leaves out what sets it, so that vLLM's own
    pruning fails there at the first video. It can go when vLLM asks the model which rows carry any.

    Args:
        runner: ``GPUModelRunner``, from which the CPU's inherits.
    """
    gather = runner._gather_mm_embeddings
    if hasattr(gather, "__wrapped__"):
        return

    @wraps(gather)
    def gather_carried(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self.model_config.multimodal_config, PositionsFromModel):
            # Another model of this process.
            return gather(self, *args, **kwargs)
        self.rows_carry_positions = carry_positions(self.get_model(), self.encoder_cache.values())
        try:
            return gather(self, *args, **kwargs)
        finally:
            self.rows_carry_positions = False

    def is_enabled(self: Any) -> bool:
        if isinstance(self.model_config.multimodal_config, PositionsFromModel):
            return getattr(self, "rows_carry_positions", False)
        return bool(self.__dict__.get("prunes", False))

    def enable(self: Any, value: bool) -> None:
        self.__dict__["prunes"] = value

    runner._gather_mm_embeddings = gather_carried
    runner.is_multimodal_pruning_enabled = property(is_enabled, enable)


def carry_positions(model: Any, rows: Iterable[torch.Tensor]) -> bool:
    """Return whether any of an encoder's outputs has more than a row's values."""
    return any(output.shape[-1] != model.row_width for output in rows)
