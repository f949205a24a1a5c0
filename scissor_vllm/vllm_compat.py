"""What differs between the supported versions of vLLM, and where it must be told what it has no
setting for, in one place.
"""

import copy
from typing import Any

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
    config = copy.copy(model_config.get_multimodal_config())
    config.__class__ = PositionsFromModel
    model_config.multimodal_config = config
    if current_platform.is_cpu():
        _have_cpu_runner_ask()


def _have_cpu_runner_ask() -> None:
    """Let V1's runner on a CPU ask the config as well.

    Its ``load_model`` leaves out what it replaces: the attribute stays False there, and vLLM's own
    pruning fails at the first video. It can go when vLLM's CPU runner sets it.
    """
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    def asks(runner: CPUModelRunner) -> bool:
        return isinstance(runner.model_config.multimodal_config, PositionsFromModel)

    # A runner is made with the attribute set to False, before its model.
    CPUModelRunner.is_multimodal_pruning_enabled = property(asks, lambda runner, value: None)


def accept_parameters_in_data_urls() -> None:
    """Let vLLM read data URLs of videos whose media type names several codecs.

    ``MediaConnector._load_data_url`` ends the media type at the first comma, and takes
    ``data:video/webm;codecs=vp8,opus;base64,…`` for a URL without base64. vLLM has no other place
    where a URL passes. It can go when vLLM looks for ``;base64,`` instead.
    """
    from vllm.multimodal.media import MediaConnector

    from scissor_vllm.frontend.video.data_url import without_parameters

    load = MediaConnector._load_data_url
    if getattr(load, "accepts_parameters", False):
        return

    def load_data_url(self: MediaConnector, url: str, media_io: Any) -> Any:
        return load(self, without_parameters(url), media_io)

    load_data_url.accepts_parameters = True  # type: ignore[attr-defined]
    MediaConnector._load_data_url = load_data_url
