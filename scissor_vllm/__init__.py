"""Compressed video tokens: Semantic Connected Components as a torch function, and for vLLM.

Importing this package needs the standard library alone, using its functions torch; vLLM finds its
part through entry points.
"""

from typing import TYPE_CHECKING, Any

from scissor_vllm.retention import num_retained_tokens
from scissor_vllm.version import __version__

if TYPE_CHECKING:
    from scissor_vllm.compression import CompressedTokens, compress

__all__ = ["CompressedTokens", "__version__", "compress", "num_retained_tokens"]


def __getattr__(name: str) -> Any:
    """Return what needs torch when it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from scissor_vllm import compression

    return getattr(compression, name)
