"""SCC's search for a budget's threshold on the device, without host synchronization.

Three properties make a guess cheap. In Prim's order of a frame's tokens the components at every
threshold are runs of neighbors. The dot products of all token pairs are computed once, and the
cosine of two runs needs only a sum of them. Of the temporal step's tree only the part below the
last guess is built; the part above is one union.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton

from scissor_vllm.compression.cuda.kernels import layout, spanning_tree
from scissor_vllm.compression.cuda.kernels import threshold as kernels
from scissor_vllm.compression.cuda.products import (
    BLOCK_PRODUCTS,
    BLOCK_SHARE,
    HELD_SHARE,
    MAX_PRODUCTS,
    limit,
    max_held_tokens,
)
from scissor_vllm.compression.cuda.video import LEAST, MOST, Passes
from scissor_vllm.compression.cuda.workspace import SHARED_TOKENS, WIDE_BLOCK

GUESSES = 16
"""Guesses between two host reads of a search on its own memory. Guesses after the end cost almost
nothing. With too few guesses the tree is built once too often."""

_CELLS = 1 << 13
_TILE = 64
_CUT_BLOCK = 128


@dataclass(frozen=True)
class SearchSettings:
    """Settings of a search, documented in ``scc.py``."""

    line_steps: int
    threshold_margin: float
    window: int
    """Frames of a window of the temporal step."""


@dataclass(frozen=True)
class _Tree:
    """A maximum spanning tree of components."""

    keys: torch.Tensor
    """Keys of its edges, int64, strongest first, padded with non-edges."""
    node_of: torch.Tensor
    """Int32, the node of each number in the keys."""
    by_token: bool = False
    """Whether equal weights are ordered by token."""


class Search:
    """The search of ``scc.py`` on a workspace with a loaded video.

    ``start`` reads everything that differs by video from the device.
    """

    def __init__(self, passes: Passes, settings: SearchSettings) -> None:
        """Take the passes over the workspace."""
        self._passes = passes
        self._ws = passes.workspace
        self._settings = settings
        self._sorted_link = self._ws.link

    def start(self) -> None:
        """Search, cut and group, without host synchronization if products are stored."""
        ws = self._ws
        kernels.check_kernel[1,](
            ws.largest, ws.link, ws.state, ws.shape, ws.capacity, LEAST, MOST, block=WIDE_BLOCK
        )
        self._sorted_link = torch.sort(ws.link).values
        kernels.intervals_kernel[1,](
            ws.interval, self._sorted_link, ws.state, ws.shape, block=WIDE_BLOCK
        )
        self._steer(begins=True)
        self._guess()
        self._cut(self._tree_between_components, is_first=True)

    def run_to_end(self) -> tuple[float, int, int]:
        """Return the threshold, the number of parts of more than one token, and the flags.

        The host reads them once, and again after each further ``GUESSES`` guesses or if the
        components exceed the dense weights.
        """
        build = self._tree_between_components
        while True:
            threshold, num_joined, number = self._ws.outcome.tolist()
            flags = int(number)
            if flags & layout.SEARCHING:
                self._guess()
            elif flags & layout.TOO_MANY and build == self._tree_between_components:
                build = self._tree_between_tokens
            else:
                return threshold, int(num_joined), flags & ~layout.TOO_MANY
            self._cut(build, is_first=False)

    def _guess(self) -> None:
        """Make guesses until the search ends or the host reads."""
        ws, num_guesses = self._ws, GUESSES
        if ws.capacity <= SHARED_TOKENS:
            # Bisection ends within this many guesses.
            num_guesses = self._settings.line_steps + ws.capacity.bit_length() + 1
        for _ in range(num_guesses):
            self._passes.unite(ws.guess, ws.searching)
            self._steer(begins=False)
            if not self._passes.holds_products and not int(ws.searching):
                break

    def _steer(self, begins: bool) -> None:
        ws = self._ws
        kernels.steer_kernel[1,](
            ws.state,
            ws.balance,
            ws.guess,
            ws.searching,
            ws.again,
            ws.interval,
            ws.link,
            self._sorted_link,
            ws.parent,
            ws.shape,
            self._settings.line_steps,
            begins=begins,
            block=WIDE_BLOCK,
        )

    def _cut(self, build: Callable[[torch.Tensor], _Tree], is_first: bool) -> None:
        """Place the threshold, cut the tree, and group the tokens by part.

        Equal weights of the tree are in any order. If equal weights are on both sides of the cut,
        the tree is built again with the paper's order of the runs, which follows from the
        threshold.
        """
        ws, passes = self._ws, self._passes
        # A cut joins components, so those of the guess exist only before the first cut.
        passes.unite(ws.guess, ws.again if is_first else ws.always)
        label = passes.labels()
        tree = build(label)
        self._place(tree)
        lead, rank_of_token = passes.order_of_runs()
        if passes.holds_products or int(ws.tied):
            rank, node_of = passes.ranks(lead, rank_of_token)
            ordered = _Tree(self._spanning_tree(label, rank, node_of, ws.tied), node_of)
            self._merge_strongest(ordered, tied=True)
        self._merge_strongest(tree, tied=False)
        passes.group(passes.labels(), lead)

    def _merge_strongest(self, tree: _Tree, tied: bool) -> None:
        """Merge until K components are left, with or without ties at the cut."""
        ws = self._ws
        spanning_tree.cut_kernel[triton.cdiv(len(tree.keys), _CUT_BLOCK),](
            tree.keys,
            ws.state,
            tree.node_of,
            ws.parent,
            ws.shape,
            ws.tied,
            len(tree.keys),
            tied=int(tied),
            block=_CUT_BLOCK,
        )

    def _place(self, tree: _Tree) -> None:
        """Place the workspace's tau in the search's final interval, and set flags."""
        ws = self._ws
        kernels.place_kernel[1,](
            ws.state,
            ws.guess,
            ws.tau,
            ws.searching,
            tree.keys,
            self._sorted_link,
            ws.link,
            ws.parent,
            ws.shape,
            len(tree.keys),
            self._settings.threshold_margin,
            ws.tied,
            by_token=tree.by_token,
            block=WIDE_BLOCK,
        )

    def _tree_between_components(self, label: torch.Tensor) -> _Tree:
        """Return the maximum spanning tree of components from the weights between any two.

        The host does not know their number. Only the square of that number is touched.

        Args:
            label: (capacity,) int32 by node.
        """
        ws, size = self._ws, self._ws.num_components
        node_of = ws.new(size, torch.int32, 0)
        number, part = torch.empty_like(label), torch.empty_like(label)
        num_parts = ws.new(1, torch.int32)
        spanning_tree.number_parts_kernel[1,](
            label,
            ws.link,
            ws.guess,
            number,
            node_of,
            part,
            num_parts,
            ws.shape,
            size,
            block=WIDE_BLOCK,
        )
        spanning_tree.no_weights_kernel[triton.cdiv(size * size, _CELLS),](
            ws.weights, num_parts, block=_CELLS
        )
        self._passes.between(ws.guess, part, ws.weights, num_parts)
        tiles = triton.cdiv(size, _TILE)
        spanning_tree.mirror_weights_kernel[tiles, tiles](ws.weights, num_parts, tile=_TILE)
        label = torch.arange(size, dtype=torch.int32, device=ws.device)
        up = label.clone()
        best, kept = (ws.new(size, torch.int64, layout.NO_KEY) for _ in range(2))
        go = self._rounds(size, ws.always)
        for turn in range(len(go) - 2):
            spanning_tree.grow_kernel[size,](
                ws.weights,
                label,
                up,
                best,
                kept,
                num_parts,
                go[turn:],
                go[turn + 1 :],
                go[-1:],
                block=WIDE_BLOCK,
            )
        return _Tree(torch.sort(kept, descending=True).values, node_of)

    def _tree_between_tokens(self, label: torch.Tensor) -> _Tree:
        """Return the same from all pairs of runs, for components of any number."""
        ws = self._ws
        node_of = torch.empty_like(ws.order)
        node_of[ws.order.long()] = ws.positions
        keys = self._spanning_tree(label, ws.order, node_of, ws.always)
        return _Tree(keys, node_of, by_token=True)

    def _rounds(self, size: int, go: torch.Tensor) -> torch.Tensor:
        """Return the flags that run each of Boruvka's rounds, and a zero."""
        rounds = self._ws.new(size.bit_length() + 2, torch.int32, 0)
        rounds[:1].copy_(go)
        return rounds

    def _spanning_tree(
        self, label: torch.Tensor, rank: torch.Tensor, node_of: torch.Tensor, go: torch.Tensor
    ) -> torch.Tensor:
        """Return the maximum spanning tree of components, by Boruvka's rounds through all pairs.

        Args:
            label: (capacity,) int32 by node.
            rank: (capacity,) int32 by node, the order of nodes where weights are equal.
            node_of: its inverse.
            go: (1,) int32, there is none if it is 0.

        Returns:
            (capacity,) int64 keys of edges, strongest first, then what is no edge.
        """
        ws = self._ws
        label, up = label.clone(), ws.positions.clone()
        best, kept = (ws.new(ws.capacity, torch.int64, layout.NO_KEY) for _ in range(2))
        rounds = self._rounds(ws.capacity, go)
        for turn in range(len(rounds) - 2):
            this, following = rounds[turn:], rounds[turn + 1 :]
            self._passes.strongest(ws.guess, this, label, rank, best)
            spanning_tree.hook_kernel[ws.grid](
                best, label, up, kept, node_of, this, following, ws.shape, block=WIDE_BLOCK
            )
            spanning_tree.flatten_kernel[ws.grid](best, label, up, this, ws.shape, block=WIDE_BLOCK)
            if ws.capacity <= SHARED_TOKENS:
                continue
            reads = turn % 3 == 2 or not self._passes.holds_products
            if reads and not int(following[0]):
                break
        return torch.sort(kept, descending=True).values


def num_components(num_tokens: int, num_retained: int, device: torch.device) -> int:
    """Return the number of components of the dense weights: rarely many more than K."""
    expected = num_retained + max(1024, num_retained // 4)
    if num_tokens <= SHARED_TOKENS:
        size = num_tokens
    elif num_tokens <= max_held_tokens(device):
        size = min(expected, math.isqrt(limit(device, BLOCK_PRODUCTS, BLOCK_SHARE)))
    else:
        # In place of the products.
        size = min(expected, math.isqrt(limit(device, MAX_PRODUCTS, HELD_SHARE)))
    return max(1, min(num_tokens, size))
