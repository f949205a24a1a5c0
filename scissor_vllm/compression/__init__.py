"""Compression of one video's tokens in torch: (tokens, K) to (K tokens, assignment).

A method is a function of this form. :func:`get_compressor` returns it by name. The package knows no
model, no server and no vLLM.
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
