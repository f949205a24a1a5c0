"""Compressed video tokens: Semantic Connected Components as a torch function, and for vLLM.

Importing this package needs torch alone; vLLM finds its part through entry points.
"""

from scissor_vllm.compression import CompressedTokens, compress
from scissor_vllm.retention import num_retained_tokens

__version__ = "0.1.0"

__all__ = ["CompressedTokens", "__version__", "compress", "num_retained_tokens"]
