"""Compression of one video's tokens, in torch alone: (tokens, K) to (K tokens, who went where).

A method is a function of that form, found by its name with :func:`get_compressor`. This package
knows no model, no server and no vLLM.
"""

from scissor_vllm.compression.methods import METHODS, check_method, get_compressor
from scissor_vllm.compression.result import CompressedTokens, Compressor
from scissor_vllm.compression.scc import compress

__all__ = [
    "METHODS",
    "CompressedTokens",
    "Compressor",
    "check_method",
    "compress",
    "get_compressor",
]
