"""vLLM's general plugin: our models and video loader, registered in every process.

vLLM calls :func:`register` through the entry point ``vllm.general_plugins``, once or more.
"""

from vllm.version import __version__ as vllm_version

from scissor_vllm.models import MODELS

SUPPORTED_VLLM = ((0, 32), (0, 34))
"""First supported version, and the first that is not."""


def register() -> None:
    """Register models and the video loader with vLLM. Safe to call again.

    Raises:
        RuntimeError: a vLLM that this release was not made for.
    """
    check_vllm_version(vllm_version)
    from vllm import ModelRegistry

    from scissor_vllm.frontend.video.loader import register_video_loader

    for architecture, implementation in MODELS.items():
        ModelRegistry.register_model(architecture, implementation)
    register_video_loader()


def check_vllm_version(version: str) -> None:
    """Raise RuntimeError if the version is outside ``SUPPORTED_VLLM``."""
    first, beyond = SUPPORTED_VLLM
    parts = version.split(".")
    try:
        running = (int(parts[0]), int(parts[1]))
    except (IndexError, ValueError):
        # A build from source may carry no number; its author knows what it is.
        return
    if not first <= running < beyond:
        raise RuntimeError(
            f"scissor_vllm needs vLLM >={first[0]}.{first[1]},<{beyond[0]}.{beyond[1]}, found "
            f"{version}: install a vLLM in that range or another release of scissor_vllm"
        )
