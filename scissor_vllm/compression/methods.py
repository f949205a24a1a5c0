"""The compression methods by name. A new method is one function and one line in this file."""

import pkgutil
from collections.abc import Mapping
from functools import partial

import torch

from scissor_vllm.compression import linkage, scc
from scissor_vllm.compression.ablations import compress_across_frames, compress_in_frames
from scissor_vllm.compression.baselines import select_longest, select_randomly
from scissor_vllm.compression.linkage import AverageLinkage
from scissor_vllm.compression.result import Compressor
from scissor_vllm.compression.rivals import compress_by_kitoke, select_by_floc, select_k_center
from scissor_vllm.compression.scc import compress_for_serving, represent
from scissor_vllm.compression.selection import merging
from scissor_vllm.compression.uniform import select_evenly

SELECTORS: Mapping[str, Compressor | str] = {
    "uniform": select_evenly,
    "random": select_randomly,
    "l2norm": select_longest,
    "floc": select_by_floc,
    "k-center": select_k_center,
    "evs": "scissor_vllm.compression.vllm_selectors:select_by_evs",
    "vidcom2": "scissor_vllm.compression.vllm_selectors:select_by_vidcom2",
}
"""Methods that keep tokens as they are and drop the others. What needs vLLM is named as
``module:function`` and imported when it is asked for."""

MERGE = "+merge"
"""After a selector's name: the tokens it drops are merged into those it keeps, as SCC does."""

MERGERS: Mapping[str, Compressor] = {
    "scc": compress_for_serving,
    "scc-windows": partial(compress_for_serving, temporal_window=4),
    "scc-no-merge": represent,
    "scc-spatial": compress_in_frames,
    "scc-temporal": compress_across_frames,
    "average-linkage": AverageLinkage(),
    "kitoke": compress_by_kitoke,
}
"""Methods whose rows are means of tokens."""

METHODS: tuple[str, ...] = (*MERGERS, *SELECTORS, *(name + MERGE for name in SELECTORS))
"""The names that :func:`get_compressor` knows."""


def check_method(name: str) -> None:
    """Raise ValueError if there is no method of that name; the message lists those there are."""
    if name not in METHODS:
        known = ", ".join(sorted(METHODS))
        raise ValueError(f"unknown video compression method {name!r}: choose one of {known}")


def get_compressor(name: str) -> Compressor:
    """Return the method of that name.

    Raises:
        ValueError: no such method.
        ImportError: the method is vLLM's own and vLLM is not installed.
    """
    check_method(name)
    if name in MERGERS:
        return MERGERS[name]
    selector = SELECTORS[name.removesuffix(MERGE)]
    if isinstance(selector, str):
        selector = _imported(name, selector)
    return merging(selector) if name.endswith(MERGE) else selector


def warm_up_shapes(
    name: str, max_tokens: int, device: torch.device
) -> list[tuple[int, int, float]]:
    """Return shapes and ratios (T, P, K/N) of the calls after which a method prepares no more.

    Args:
        name: of the method.
        max_tokens: N of the largest video.
        device: that compresses.
    """
    is_linkage = isinstance(MERGERS.get(name), AverageLinkage)
    return (linkage if is_linkage else scc).warm_up_shapes(max_tokens, device)


def _imported(name: str, path: str) -> Compressor:
    try:
        found: Compressor = pkgutil.resolve_name(path)
    except ImportError as error:
        raise ImportError(
            f"the video compression method {name!r} is vLLM's own and cannot be imported "
            f"({error}): install a vLLM that this release supports, or choose another method"
        ) from error
    return found
