"""Which vLLM this release was tested with, and what happens with another: vLLM stays stock.

Standard library only, beside the number in ``vllm.version``.
"""

from __future__ import annotations

import logging
import os

SUPPORTED_VLLM = ((0, 32), (0, 34))
"""First supported version, and the first that is not."""

ALLOW_UNTESTED = "SCISSOR_VLLM_ALLOW_UNTESTED_VLLM"
"""Environment variable: 1 has the plugin try a vLLM outside of ``SUPPORTED_VLLM``."""

_WARNED = "SCISSOR_VLLM_WARNED"
"""Environment variable with the warnings given so far: a server's processes inherit it."""

# A child of vLLM's logger, which alone has a handler.
logger = logging.getLogger(f"vllm.{__name__}")

_failure: str | None = None
"""Why our parts could not be registered in this process."""


def reason_for_stock() -> str | None:
    """Return why vLLM stays stock in this process, in one sentence; None if the plugin acts."""
    return _failure or untested_reason(vllm_version(), os.environ.get(ALLOW_UNTESTED, ""))


def untested_reason(version: str, allowed: str = "") -> str | None:
    """Return why the plugin stands aside with a version of vLLM, None if it does not.

    Args:
        version: of vLLM.
        allowed: value of ``ALLOW_UNTESTED``.
    """
    parts = version.split(".")
    try:
        running = (int(parts[0]), int(parts[1]))
    except (IndexError, ValueError):
        # A build from source may carry no number; its author knows what it is.
        return None
    first, beyond = SUPPORTED_VLLM
    if first <= running < beyond or allowed.strip().lower() in ("1", "true", "yes"):
        return None
    return (
        f"scissor_vllm was tested with vLLM >={first[0]}.{first[1]},<{beyond[0]}.{beyond[1]} and "
        f"found {version}, so videos are not compressed: install a vLLM in that range or another "
        f"release of scissor_vllm, or set {ALLOW_UNTESTED}=1 to try"
    )


def vllm_version() -> str:
    """Return the version of the installed vLLM, "" if it does not tell one."""
    try:
        # The distribution has another name on each platform, so its metadata is of no use.
        from vllm.version import __version__
    except ImportError:
        return ""
    return str(__version__)


def stand_aside(error: Exception) -> str:
    """Note that a part of vLLM is not where it was, and return the reason for staying stock."""
    global _failure
    _failure = (
        f"scissor_vllm does not fit vLLM {vllm_version()} ({type(error).__name__}: {error}), so "
        "videos are not compressed: install another release of scissor_vllm"
    )
    return _failure


def warn_once(message: str) -> None:
    """Log a warning, once for this process and those that it starts."""
    given = os.environ.get(_WARNED, "").split("\n")
    if message in given:
        return
    os.environ[_WARNED] = "\n".join([*filter(None, given), message])
    logger.warning(message)
