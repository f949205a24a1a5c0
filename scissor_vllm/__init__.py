"""Compressed video tokens: Semantic Connected Components as a torch function, and for vLLM.

Importing the package needs the standard library alone. Its functions need torch. vLLM finds the
plugin through entry points.
"""

from typing import TYPE_CHECKING, Any

from scissor_vllm.retention import num_retained_tokens
from scissor_vllm.version import __version__

if TYPE_CHECKING:
    from scissor_vllm.compression import CompressedTokens, compress

__all__ = ["CompressedTokens", "__version__", "compress", "num_retained_tokens"]


def __getattr__(name: str) -> Any:
    """Import names that need torch on first access."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from scissor_vllm import compression

    return getattr(compression, name)
