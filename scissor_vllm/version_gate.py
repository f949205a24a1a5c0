"""The supported range of vLLM. Outside of it the plugin stands aside and vLLM stays stock.

Imports the standard library and ``vllm.version`` only.
"""

from __future__ import annotations

import logging
import os

SUPPORTED_VLLM = ((0, 32), (0, 34))
"""First supported version, and the first unsupported version after it."""

ALLOW_UNTESTED = "SCISSOR_VLLM_ALLOW_UNTESTED_VLLM"
"""Environment variable: 1 has the plugin try a vLLM outside of ``SUPPORTED_VLLM``."""

_WARNED = "SCISSOR_VLLM_WARNED"
"""Environment variable with the warnings logged so far. Child processes inherit it."""

# A child of vLLM's logger, which alone has a handler.
logger = logging.getLogger(f"vllm.{__name__}")

_failure: str | None = None
"""Reason why registration failed in this process."""


def reason_for_stock() -> str | None:
    """Return the reason why vLLM stays stock in this process, None if the plugin is active."""
    return _failure or untested_reason(vllm_version(), os.environ.get(ALLOW_UNTESTED, ""))


def untested_reason(version: str, allowed: str = "") -> str | None:
    """Return the reason why the plugin stands aside with a version of vLLM, or None.

    Args:
        version: vLLM's version.
        allowed: value of ``ALLOW_UNTESTED``.
    """
    parts = version.split(".")
    try:
        running = (int(parts[0]), int(parts[1]))
    except (IndexError, ValueError):
        # A build from source may have no version number.
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
    """Return the version of the installed vLLM, "" if it has none."""
    try:
        # The distribution's name differs by platform, so its metadata cannot be looked up.
        from vllm.version import __version__
    except ImportError:
        return ""
    return str(__version__)


def stand_aside(error: Exception) -> str:
    """Record that registration failed, and return the reason for staying stock."""
    global _failure
    _failure = (
        f"scissor_vllm does not fit vLLM {vllm_version()} ({type(error).__name__}: {error}), so "
        "videos are not compressed: install another release of scissor_vllm"
    )
    return _failure


def warn_once(message: str) -> None:
    """Log a warning once for this process and its children."""
    given = os.environ.get(_WARNED, "").split("\n")
    if message in given:
        return
    os.environ[_WARNED] = "\n".join([*filter(None, given), message])
    logger.warning(message)
