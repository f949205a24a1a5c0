"""vLLM's general plugin: our models and video loader, registered in every process.

vLLM calls :func:`register` through the entry point ``vllm.general_plugins``, once or more. vLLM
does not catch its exceptions. With an unsupported vLLM nothing is registered, and the server is
stock vLLM.
"""

import os

from scissor_vllm.allocator import return_free_memory
from scissor_vllm.orphans import end_with_parent
from scissor_vllm.settings import FORMER_VIDEO_LOADER, VIDEO_LOADER
from scissor_vllm.version_gate import reason_for_stock, stand_aside, warn_once

_LOADER_VARIABLE = "VLLM_VIDEO_LOADER_BACKEND"


def register() -> None:
    """Register models and the video loader with vLLM. Safe to call again.

    Raises:
        ValueError: one of our environment variables has an invalid value.
    """
    end_with_parent()
    return_free_memory()
    reason = reason_for_stock()
    if reason is None:
        try:
            _register()
        except (ImportError, AttributeError) as error:
            reason = stand_aside(error)
    if reason is not None:
        _leave_stock(reason)
    elif _has_rust_frontend():
        warn_once(
            "VLLM_USE_RUST_FRONTEND serves none of scissor_vllm's routes: retention_ratio is "
            "ignored there; unset it to serve one"
        )


def _register() -> None:
    from vllm import ModelRegistry

    from scissor_vllm.frontend.media import register_media_connector
    from scissor_vllm.frontend.video.loader import register_video_loader
    from scissor_vllm.models import MODELS

    register_video_loader()
    register_media_connector()
    for architecture, implementation in MODELS.items():
        ModelRegistry.register_model(architecture, implementation)


def _leave_stock(reason: str) -> None:
    """Warn with the reason, and unset our loader in the environment."""
    warn_once(reason)
    loader = os.environ.get(_LOADER_VARIABLE)
    if loader in (VIDEO_LOADER, FORMER_VIDEO_LOADER):
        del os.environ[_LOADER_VARIABLE]
        warn_once(f"{_LOADER_VARIABLE}={loader} is taken back: vLLM's own loader is used")


def _has_rust_frontend() -> bool:
    from vllm import envs

    return bool(getattr(envs, "VLLM_USE_RUST_FRONTEND", False))
