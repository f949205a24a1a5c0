"""Compression of one video's tokens, in torch alone: (tokens, K) to (K tokens, who went where).

A method is a function of that form, found by its name with :func:`get_compressor`. This package
knows no model, no server and no vLLM.
"""

from scissor_vllm.compression.methods import METHODS, Compressor, get_compressor
from scissor_vllm.compression.result import CompressedTokens
from scissor_vllm.compression.scc import compress

__all__ = ["METHODS", "CompressedTokens", "Compressor", "compress", "get_compressor"]
