"""SCC on a GPU: the result of ``scc.py``, with the host out of the loop.

Where ``scc.py`` looks at each guess before the next, here the guesses follow each other on the
device, and so do the rounds that build the temporal step's spanning tree. The host reads a few
numbers at the end, and goes on only if the search was not over or the tree is to be cut between
equal weights.

Three things make a guess cheap. Prim's order of a frame's tokens makes the components at every
threshold runs of neighbours. The products of all pairs of tokens are computed once, those of two
frames in one order only; the cosine of two runs is a sum of them. And of the temporal step's tree
only what is below the found interval is built: what is above is one union.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
import triton

from scissor_vllm.compression import captures, kernels
from scissor_vllm.compression.result import CompressedTokens
from scissor_vllm.compression.similarity import BLOCK_ELEMENTS, exact_float32

GUESSES = 16
"""Guesses of a search between two looks of the host, where it is not captured. Those after its end
cost next to nothing; with too few, the tree is built once for nothing."""

MAX_PRODUCTS = 1 << 29
"""Most products that are held, 2 GiB in float32: those of 29 thousand tokens. Of more tokens they
are computed again on each pass, in blocks, and the host looks at each guess."""

BLOCK_PRODUCTS = 1 << 27
"""Most products of such a block, 512 MiB."""

HELD_SHARE, BLOCK_SHARE = 48, 160
"""Products that are held take no more than one part in so many of the GPU's memory, a block of
others no more than one in so many."""

ROW_BLOCKS = 4
"""Products that are held are computed in so many blocks of rows, each from its own frame on."""

MAX_COUNTED = 1 << 14
"""Most numbers that are sorted by counting, in one launch in place of a radix sort's dozen."""

MAX_COMPONENTS = captures.MAX_TOKENS
"""Components of which the weights between any two are held where a search is captured: all, 256 MiB
at most. Elsewhere as many as a block's products may take, or where none are held, as all may; of
more, each of Boruvka's rounds goes through all products."""

LEAST, MOST = 2.0**-40, 2.0**40
"""Largest magnitudes of tokens between these have products and sums far from float32's ends."""

_ROWS = 16
_WIDE = 1024
_CELLS = 1 << 13
_TILE = 64
_ROW_BLOCK = 4096
_SUM_BLOCK, _FEW_MEMBERS, _MEMBERS, _SUM_WARPS = 512, 4, 16, 4
"""Columns that are added up at once, and of how many rows."""


@dataclass(frozen=True)
class SearchSettings:
    """What a search takes from ``scc.py``, where it is explained."""

    line_steps: int
    threshold_margin: float
    window: int
    """Frames that the temporal step joins across."""


def compress(
    tokens: torch.Tensor,
    threshold: float | None,
    num_retained: int | None,
    settings: SearchSettings,
) -> CompressedTokens | None:
    """Return tokens merged at a threshold or to a budget, one of the two.

    Args:
        tokens: (T, P, D) floating, on a CUDA device.
        threshold: cosine above which two tokens are connected.
        num_retained: K.
        settings: of the search for a budget's threshold.

    Returns:
        None if the tokens are too many or too unlike in size for these kernels, or not finite.
    """
    num_frames, per_frame, _ = tokens.shape
    if num_frames * per_frame > kernels.MAX_NODES or per_frame > kernels.MAX_PER_FRAME:
        return None
    dtype = tokens.dtype
    if num_retained is None:
        assert threshold is not None
        make = partial(AtThreshold, window=settings.window)
        with captures.search(_taken(tokens), threshold, ("threshold", settings), make) as found:
            parts = found.finish(threshold)
            return _compressed(found.video.rows[None], [found.video], [parts], dtype)[0]
    with _search(tokens, num_retained, settings) as search:
        parts = search.finish(num_retained)
        return _compressed(search.video.rows[None], [search.video], [parts], dtype)[0]


def compress_unseen(
    tokens: torch.Tensor, num_retained: int, settings: SearchSettings
) -> CompressedTokens | None:
    """Return tokens merged to a budget without waiting for the device, their threshold left on it.

    Tokens that are not finite, or larger or smaller than ``compress`` takes, count as zeros. None
    if the tokens are too many.
    """
    num_frames, per_frame, _ = tokens.shape
    if num_frames * per_frame > captures.MAX_TOKENS or per_frame > kernels.MAX_PER_FRAME:
        return None
    with _search(tokens, num_retained, settings) as search:
        video = search.video
        [(merged, assignment)] = merge(video.rows[None], [video], [search.unseen(num_retained)])
        threshold = search.unseen_threshold()
        return CompressedTokens(merged.to(tokens.dtype), assignment, threshold_on_device=threshold)


def _search(
    tokens: torch.Tensor, num_retained: int, settings: SearchSettings
) -> AbstractContextManager["Search"]:
    tokens = _taken(tokens)
    size = num_components(tokens.shape[0] * tokens.shape[1], num_retained, tokens.device)
    make = partial(Search, num_components=size, settings=settings)
    return captures.search(tokens, num_retained, (size, settings), make)


def _taken(tokens: torch.Tensor) -> torch.Tensor:
    """Return tokens as the kernels take them."""
    return (tokens.float() if tokens.dtype == torch.float64 else tokens).contiguous()


def _compressed(
    rows: torch.Tensor,
    videos: "Sequence[Video]",
    parts: "Sequence[Parts | None]",
    dtype: torch.dtype,
    stacked: "_Stacked | None" = None,
) -> list[CompressedTokens | None]:
    """Return each video's merged tokens (B, N, D), None for one without parts."""
    there = [number for number, own in enumerate(parts) if own is not None]
    if len(there) < len(parts):
        rows, videos, stacked = rows[there], [videos[number] for number in there], None
    found = [own for own in parts if own is not None]
    results: list[CompressedTokens | None] = [None] * len(parts)
    for number, own, (merged, assignment) in zip(
        there, found, merge(rows, videos, found, stacked), strict=True
    ):
        results[number] = CompressedTokens(merged.to(dtype), assignment, own.threshold)
    return results


@dataclass(frozen=True)
class Parts:
    """What is merged into one, numbered in the paper's order."""

    threshold: float
    num_parts: int
    num_joined: int
    """Parts of more than one token."""
    tokens: "_Grouped"
    weight: torch.Tensor
    """(N,) float64: the token's share in the mean of its part's spatial components' means."""
    number: torch.Tensor
    """(N,) int64: how many parts have their lead token at or before the token."""


@dataclass(frozen=True)
class _Grouped:
    """Tokens of a video, or of several (B, ...), by their part."""

    order: torch.Tensor
    """(..., N) int32 or int64: the tokens of part 0, of part 1, ..., each in order of their
    number."""
    begin: torch.Tensor
    """(..., parts + 1) int32: where each part begins among them."""

    @classmethod
    def of(cls, part: torch.Tensor, num_parts: int) -> "_Grouped":
        """Group by part (..., N) int32."""
        by_part, order = _sorted(part)
        bounds = torch.arange(num_parts + 1, dtype=torch.int32, device=part.device)
        bounds = bounds.expand(*part.shape[:-1], -1).contiguous()
        return cls(order, torch.searchsorted(by_part, bounds, out_int32=True))

    def joined(self) -> torch.Tensor:
        """Return the place of each part among those of more than one token, else -1, int32.

        The last, for a part that is not there, is the number of those.
        """
        low_at = torch.empty_like(self.begin)
        size = low_at.shape[-1]
        kernels.joined_parts_kernel[low_at.numel() // size,](
            self.begin, low_at, size - 1, block=_WIDE
        )
        return low_at


@dataclass(frozen=True)
class _Block:
    """Products of the tokens of some frames with those of all frames from the first of them on."""

    products: torch.Tensor
    """(elements,) float32: rows in blocks, each from its own first row's column on."""
    first_frame: int
    num_frames: int
    base: int
    """Products in the blocks that came before."""


class Video:
    """A video's tokens in Prim's order of each frame, their products, and what a pass fills in.

    Positions in that order number the tokens; a component of the spatial step is a run of them, and
    known by its last, its node.

    Attributes:
        rows: (N, D), the tokens in their own order.
        length: (N,) float32, theirs.
        order: (N,) int32, the token at each position.
        link: (N,) float32, the weight that joined each to its frame's tree, -inf for the first.
        parent: (N,) int32 by node, the forest of what was united.
        state: of a search on the device, and flags; see ``kernels``.
        tau: (1,) float32, the threshold that was asked for or found.
        always: (1,) int32, 1.
        window: frames that are compressed together, at most T.
        grid: of a kernel with a lane for each token.
    """

    def __init__(self, tokens: torch.Tensor, window: int) -> None:
        """Take tokens (T, P, D) float32, bfloat16 or float16, and the frames of a window."""
        self.num_frames, self.per_frame, self.width = tokens.shape
        self.window = min(window, self.num_frames)
        self.num_tokens = self.num_frames * self.per_frame
        self.device = tokens.device
        rows = tokens.reshape(self.num_tokens, self.width)
        self._lanes = max(16, triton.next_power_of_2(self.per_frame))
        self._chunks = triton.cdiv(self.per_frame, _ROWS)
        self.grid = (triton.cdiv(self.num_tokens, _WIDE),)

        self.state = self.new(kernels.NUM_STATES, torch.int64)
        # Where nobody looks at the flags, what they tell of counts as nothing.
        self.rows = torch.empty_like(rows)
        self.length = self.new(self.num_tokens, torch.float32)
        largest = self.new(self.num_tokens, torch.float32)
        kernels.usable_rows_kernel[self.num_tokens,](
            rows,
            self.rows,
            self.length,
            largest,
            self.width,
            LEAST,
            MOST,
            block=min(_ROW_BLOCK, triton.next_power_of_2(self.width)),
            num_warps=8,
        )
        kernels.check_kernel[1,](
            largest, self.state, self.num_tokens, LEAST, MOST, block=_WIDE, num_warps=4
        )
        frames = self.rows.view(tokens.shape)
        self._inside = _multiplied(frames, frames.transpose(1, 2))
        self._cosine = torch.empty_like(self._inside)
        kernels.cosines_kernel[self.per_frame, self.num_frames](
            self._inside, self._cosine, self.per_frame, block=self._lanes, num_warps=self._warps(2)
        )
        self.order = self.new(self.num_tokens, torch.int32)
        self.link = self.new(self.num_tokens, torch.float32)
        kernels.prim_kernel[self.num_frames,](
            self._cosine,
            self.order,
            self.link,
            self.per_frame,
            block=self._lanes,
            num_warps=self._warps(8),
        )
        self._ordered = self.rows[self.order]
        self._hold_products()
        self.tau = self.new(1, torch.float32)
        self.always = self.new(1, torch.int32, 1)
        self._unit = self.new(self.num_tokens, torch.float32)
        self.parent = self.new(self.num_tokens, torch.int32)
        self._run_of = self.new(self.num_tokens, torch.int32)
        self._run_size = self.new(self.num_tokens, torch.int32)

    def new(self, size: int, dtype: torch.dtype, value: int | None = None) -> torch.Tensor:
        """Return a tensor (size,) on the device."""
        if value is None:
            return torch.empty(size, dtype=dtype, device=self.device)
        return torch.full((size,), value, dtype=dtype, device=self.device)

    def _warps(self, per_warp: int) -> int:
        """Return the warps for a frame's row with so many vectors of 32 to a warp."""
        return max(1, min(8, self._lanes // (32 * per_warp)))

    def _hold_products(self) -> None:
        """Compute all products, or none if they are too many to be held.

        Of windows, only those of two tokens of the same one.
        """
        self._apart = self.window < self.num_frames
        frames = self.window if self._apart else math.ceil(self.num_frames / ROW_BLOCKS)
        self._block_rows = frames * self.per_frame
        self._held: torch.Tensor | None = None
        size = self._num_products_before(self.num_tokens)
        if size > _limit(self.device, MAX_PRODUCTS, HELD_SHARE):
            self._apart = False
            rows = _limit(self.device, BLOCK_PRODUCTS, BLOCK_SHARE) // self.num_tokens
            self._block_rows = max(1, rows // self.per_frame) * self.per_frame
            return
        self._held = self.new(size, torch.float32)
        start = self._multiply_windows(self._held) if self._apart else 0
        for row in range(start, self.num_tokens, self._block_rows):
            self._multiply(row, self._held[self._num_products_before(row) :])

    def _multiply_windows(self, out: torch.Tensor) -> int:
        """Compute the products of all windows that are whole, and return the first token after."""
        rows = self._block_rows
        count = self.num_tokens // rows
        windows = self._ordered[: count * rows].view(count, rows, self.width)
        products = out[: count * rows**2].view(count, rows, rows)
        _multiplied(windows, windows.transpose(1, 2), products)
        return count * rows

    @property
    def holds_products(self) -> bool:
        return self._held is not None

    def _num_products_before(self, row: int) -> int:
        """Return how many products the blocks have that begin before a row."""
        total = 0
        for start in range(0, row, self._block_rows):
            left = self.num_tokens - start
            rows = min(self._block_rows, left)
            total += rows * (rows if self._apart else left)
        return total

    def _multiply(self, start: int, out: torch.Tensor) -> torch.Tensor:
        """Compute the block of products that begins with a row."""
        left, right = self._ordered[start : start + self._block_rows], self._ordered[start:]
        out = out[: len(left) * len(right)]
        _multiplied(left, right.T, out.view(len(left), len(right)))
        return out

    def _blocks(self) -> Iterator[_Block]:
        if self._held is not None:
            yield _Block(self._held, 0, self.num_frames, 0)
            return
        buffer = self.new(self._block_rows * self.num_tokens, torch.float32)
        for start in range(0, self.num_tokens, self._block_rows):
            rows = min(self._block_rows, self.num_tokens - start)
            yield _Block(
                self._multiply(start, buffer),
                start // self.per_frame,
                rows // self.per_frame,
                self._num_products_before(start),
            )

    def unite(self, tau: torch.Tensor, go: torch.Tensor) -> None:
        """Find the runs at tau (1,), and join those whose cosine is above it, unless go is 0."""
        kernels.lengths_kernel[self.num_frames, self._chunks](
            self._inside,
            self.order,
            self.link,
            self._unit,
            self.parent,
            self._run_of,
            self._run_size,
            tau,
            go,
            self.per_frame,
            block=self._lanes,
            rows=_ROWS,
            num_warps=self._warps(4),
        )
        if not self.holds_products and not int(go):
            return
        unused = self.parent
        self._pairs(kernels.UNION, tau, go, unused, unused, unused, unused)

    def _pairs(
        self,
        use: int,
        tau: torch.Tensor,
        go: torch.Tensor,
        label: torch.Tensor,
        rank: torch.Tensor,
        best: torch.Tensor,
        degree: torch.Tensor,
        num_parts: torch.Tensor | None = None,
    ) -> None:
        for block in self._blocks():
            kernels.pairs_kernel[self.window, block.num_frames, self._chunks](
                block.products,
                self.link,
                self._unit,
                self.parent,
                label,
                rank,
                best,
                degree,
                tau,
                go,
                self.num_tokens,
                self.per_frame,
                self._block_rows,
                block.base,
                block.first_frame,
                self.window,
                self.always if num_parts is None else num_parts,
                block=self._lanes,
                rows=_ROWS,
                use=use,
                apart=self._apart,
                aligned=self.per_frame % 4 == 0,
                num_warps=self._warps(8),
            )

    def labels(self) -> torch.Tensor:
        """Return each node's component (N,) int32, its lowest node."""
        label = torch.empty_like(self.parent)
        kernels.find_roots_kernel[self.grid](self.parent, label, self.num_tokens, block=_WIDE)
        return label

    def strongest(
        self,
        tau: torch.Tensor,
        go: torch.Tensor,
        label: torch.Tensor,
        rank: torch.Tensor,
        best: torch.Tensor,
    ) -> None:
        """Raise each component's key in ``best`` to that of its strongest edge to another."""
        self._pairs(kernels.STRONGEST, tau, go, label, rank, best, best)

    def between(
        self,
        tau: torch.Tensor,
        part: torch.Tensor,
        weights: torch.Tensor,
        num_parts: torch.Tensor,
    ) -> None:
        """Raise the weights (parts * parts,) int32 to those of the strongest edges between parts.

        Args:
            tau: (1,).
            part: (N,) int32 by node.
            weights: of part i to part j or of j to i.
            num_parts: (1,) int32, those from this one on are left out.
        """
        self._pairs(kernels.BETWEEN, tau, self.always, part, part, weights, self.parent, num_parts)

    def ranks(
        self, lead: torch.Tensor, rank_of_token: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the place of each run in the paper's order, (N,) int32 by node, and the inverse.

        Args:
            lead: what ``order_of_runs`` returned, with ``rank_of_token``.
            rank_of_token: see there.
        """
        rank, node_of = (
            self.new(self.num_tokens, torch.int32),
            self.new(self.num_tokens, torch.int32),
        )
        kernels.rank_runs_kernel[self.grid](
            lead, rank_of_token, rank, node_of, self.link, self.tau, self.num_tokens, block=_WIDE
        )
        return rank, node_of

    def order_of_runs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the runs at tau by the paper's order.

        Returns:
            (N,) int64 by node: in the low half, how many tokens there are from the run's lowest
            token of highest degree to the end; and (N,) int64 by token: how many runs have theirs
            at or before the token.
        """
        lead = self.new(self.num_tokens, torch.int64, 0)
        kernels.lead_tokens_kernel[self.num_tokens,](
            self._cosine,
            self.order,
            self._run_of,
            lead,
            self.tau,
            self.num_tokens,
            self.per_frame,
            block=self._lanes,
            num_warps=self._warps(4),
        )
        is_lead = self.new(self.num_tokens, torch.int32, 0)
        kernels.mark_leads_kernel[self.grid](
            lead, self.parent, is_lead, self.link, self.tau, self.num_tokens, roots=0, block=_WIDE
        )
        return lead, torch.cumsum(is_lead, 0)

    def parts(self, label: torch.Tensor, lead: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the components of the runs at tau in the paper's order.

        Args:
            label: (N,) int32 by node, the component of each run.
            lead: what ``order_of_runs`` returned.

        Returns:
            The part of each token (N,) int32, its weight (N,) float64, and how many parts have
            their lead token at or before it (N,) int64.
        """
        degree = self.new(self.num_tokens, torch.int32, 0)
        self._pairs(kernels.DEGREE, self.tau, self.always, degree, degree, degree, degree)
        part_lead = self.new(self.num_tokens, torch.int64, 0)
        part_runs = self.new(self.num_tokens, torch.int32, 0)
        kernels.lead_runs_kernel[self.grid](
            lead,
            label,
            degree,
            part_lead,
            part_runs,
            self.link,
            self.tau,
            self.num_tokens,
            block=_WIDE,
        )
        is_lead = self.new(self.num_tokens, torch.int32, 0)
        kernels.mark_leads_kernel[self.grid](
            part_lead, label, is_lead, self.link, self.tau, self.num_tokens, roots=1, block=_WIDE
        )
        number = torch.cumsum(is_lead, 0)
        part = self.new(self.num_tokens, torch.int32)
        weight = self.new(self.num_tokens, torch.float64)
        kernels.parts_kernel[self.grid](
            self.order,
            self._run_of,
            self._run_size,
            label,
            part_lead,
            part_runs,
            number,
            part,
            weight,
            self.num_tokens,
            block=_WIDE,
        )
        return part, weight, number


class AtThreshold:
    """The parts that both steps leave at a threshold. ``start`` never waits for the device."""

    def __init__(self, tokens: torch.Tensor, window: int) -> None:
        """Take tokens (T, P, D), and the frames of a window."""
        self._tokens = tokens
        self._window = window
        self.asked = torch.empty(1, dtype=torch.float32, device=tokens.device)
        """The threshold."""

    def start(self) -> None:
        """Find the parts, and note what the host is to look at."""
        self.video = video = Video(self._tokens, self._window)
        video.tau.copy_(self.asked)
        video.unite(video.tau, video.always)
        lead, _ = video.order_of_runs()
        part, self._weight, self._number = video.parts(video.labels(), lead)
        self._grouped = _Grouped.of(part, video.num_tokens)
        self._seen = torch.stack(
            [video.state[kernels.FLAGS], self._number[-1], self._grouped.joined()[-1]]
        )

    def finish(self, threshold: float) -> Parts | None:
        """Return the parts, None if these tokens are not for these kernels. The host looks once."""
        flags, count, num_joined = self._seen.tolist()
        if flags:
            return None
        tokens = _Grouped(self._grouped.order, self._grouped.begin[: count + 1])
        return Parts(float(threshold), count, num_joined, tokens, self._weight, self._number)


@dataclass(frozen=True)
class _Tree:
    """A maximum spanning tree of components."""

    keys: torch.Tensor
    """Of its edges, int64, strongest first, then what is no edge."""
    node_of: torch.Tensor
    """Int32, the node for each number that keys name."""
    by_token: bool = False
    """Whether equal weights are in the order of their tokens."""


@dataclass(frozen=True)
class _Cut:
    """What a search has come to."""

    tokens: _Grouped
    weight: torch.Tensor
    """(N,) float64."""
    number: torch.Tensor
    """(N,) int64, as of ``Parts``."""
    seen: torch.Tensor
    """(3,) float64 for the host: flags, the threshold, and the parts of more than one token."""


class Search:
    """The search of ``scc.py`` for the threshold of a budget, on the device.

    ``start`` never waits for the device and depends on K by a number on the device alone, so that
    it can be captured in a CUDA graph where products are held.
    """

    def __init__(
        self,
        tokens: torch.Tensor,
        num_components: int,
        settings: SearchSettings,
        asked: torch.Tensor | None = None,
    ) -> None:
        """Take tokens (T, P, D), and how many components a tree is built between at once."""
        self._tokens = tokens
        self._num_components = num_components
        self._settings = settings
        if asked is None:
            asked = torch.empty(1, dtype=torch.int32, device=tokens.device)
        self.asked = asked
        """K."""

    def start(self) -> None:
        """Search, cut, and note what the host is to look at."""
        self.video = video = Video(self._tokens, self._settings.window)
        self._sorted_link = _sorted(video.link)[0]
        self._balance = video.new(2, torch.float64)
        self._tau = video.new(1, torch.float32)
        self._searching = video.new(1, torch.int32)
        self._again = video.new(1, torch.int32)
        self._tied = video.new(1, torch.int32)
        self._positions = torch.arange(video.num_tokens, dtype=torch.int32, device=video.device)
        self._steer(kernels.BEGIN)
        self._guess()
        self.first_cut = self._cut(self._tree_between_components)

    def unseen(self, num_retained: int) -> Parts:
        """Return K parts without a look of the host, of tokens few enough for a capture.

        They are those of ``finish``, unless the threshold lies in an interval that is narrower than
        the resolution. The parts have no threshold, and as many of them as may be are taken to be
        of more than one token.
        """
        assert self.video.num_tokens <= captures.MAX_TOKENS
        most_joined = min(num_retained, self.video.num_tokens - num_retained)
        return self._parts(self.first_cut, num_retained, math.nan, most_joined)

    def unseen_threshold(self) -> torch.Tensor:
        """Return the threshold of ``unseen`` parts, () float64 on the device, NaN for none."""
        flags, threshold, _ = self.first_cut.seen
        return torch.where(flags == 0, threshold, math.nan)

    def _parts(self, cut: _Cut, num_retained: int, threshold: float, num_joined: int) -> Parts:
        tokens = _Grouped(cut.tokens.order, cut.tokens.begin[: num_retained + 1])
        return Parts(threshold, num_retained, num_joined, tokens, cut.weight, cut.number)

    def finish(self, num_retained: int, seen: Sequence[float] | None = None) -> Parts | None:
        """Return parts for a threshold whose two steps leave at least K, cut to K.

        The host looks once; again after each further ``GUESSES`` guesses, for each interval that is
        too narrow to hold a threshold, and if there are too many components for the weights between
        any two. None if these tokens are not for these kernels.

        Args:
            num_retained: K.
            seen: what the host has looked at already.
        """
        # What was captured is written again by the next start: it stays where it is.
        cut, tree = self.first_cut, self._tree_between_components
        while True:
            number, threshold, num_joined = seen or cut.seen.tolist()
            seen, flags = None, int(number)
            if flags & (kernels.NOT_FINITE | kernels.OUT_OF_RANGE):
                return None
            if flags & kernels.SEARCHING:
                self._guess()
            elif flags & kernels.TOO_NARROW:
                self._steer(kernels.NEXT)
            elif flags & kernels.TOO_MANY:
                tree = self._tree_between_tokens
            else:
                return self._parts(cut, num_retained, threshold, int(num_joined))
            cut = self._cut(tree)

    def _guess(self) -> None:
        """Make guesses until the search is over or the host is to look."""
        video, num_guesses = self.video, GUESSES
        if video.num_tokens <= captures.MAX_TOKENS:
            # Halving ends within so many: what is captured needs no second look.
            num_guesses = self._settings.line_steps + video.num_tokens.bit_length()
        for _ in range(num_guesses):
            video.unite(self._tau, self._searching)
            self._steer(kernels.STEP)
            if not video.holds_products and not int(self._searching):
                break

    def _steer(self, phase: int) -> None:
        video = self.video
        kernels.steer_kernel[1,](
            video.state,
            self._balance,
            self._tau,
            self._searching,
            self._again,
            video.link,
            self._sorted_link,
            video.parent,
            video.num_tokens,
            video.num_frames,
            self.asked,
            self._settings.line_steps,
            phase=phase,
            block=_WIDE,
        )

    def _cut(self, build: Callable[[torch.Tensor], _Tree]) -> _Cut:
        """Place the threshold, cut the tree, group the tokens by part and weight them.

        The tree's equal weights are in any order. If such are on both sides of the cut, it is built
        again with the paper's order of the runs, which follows from the threshold.
        """
        video = self.video
        # The last cut joined components: only before the first are those of a guess there.
        is_first = build == self._tree_between_components
        video.unite(self._tau, self._again if is_first else video.always)
        label = video.labels()
        tree = build(label)
        self._place(tree)
        lead, rank_of_token = video.order_of_runs()
        if video.holds_products or int(self._tied):
            rank, node_of = video.ranks(lead, rank_of_token)
            ordered = _Tree(self._spanning_tree(label, rank, node_of, self._tied), node_of)
            self._merge_strongest(ordered, tied=True)
        self._merge_strongest(tree, tied=False)
        part, weight, number = video.parts(video.labels(), lead)
        tokens = _Grouped.of(part, video.num_tokens)
        seen = [video.state[kernels.FLAGS :], video.tau, tokens.joined()[-1:]]
        return _Cut(tokens, weight, number, torch.cat([each.double() for each in seen]))

    def _merge_strongest(self, tree: _Tree, tied: bool) -> None:
        """Merge until K components are left, where weights are tied at the cut or where not."""
        kernels.cut_kernel[triton.cdiv(len(tree.keys), 128),](
            tree.keys,
            self.video.state,
            tree.node_of,
            self.video.parent,
            len(tree.keys),
            self.asked,
            self._tied,
            tied=int(tied),
            block=128,
        )

    def _place(self, tree: _Tree) -> None:
        """Place the video's tau in the interval that was found, and set flags."""
        video = self.video
        kernels.place_kernel[1,](
            video.state,
            self._tau,
            video.tau,
            self._searching,
            tree.keys,
            self._sorted_link,
            video.link,
            video.parent,
            video.num_tokens,
            video.num_frames,
            self.asked,
            len(tree.keys),
            self._settings.threshold_margin,
            self._tied,
            by_token=tree.by_token,
            block=_WIDE,
        )

    def _tree_between_components(self, label: torch.Tensor) -> _Tree:
        """Return the maximum spanning tree of components from the weights between any two.

        Their number is not known here, but memory is touched by its square only.

        Args:
            label: (N,) int32 by node.
        """
        video, size = self.video, self._num_components
        node_of = video.new(size, torch.int32, 0)
        number, part = torch.empty_like(label), torch.empty_like(label)
        num_parts = video.new(1, torch.int32)
        kernels.number_parts_kernel[1,](
            label,
            video.link,
            self._tau,
            number,
            node_of,
            part,
            num_parts,
            video.num_tokens,
            size,
            block=_WIDE,
        )
        weights = video.new(size * size, torch.int32)
        kernels.no_weights_kernel[triton.cdiv(size * size, _CELLS),](
            weights, num_parts, block=_CELLS
        )
        video.between(self._tau, part, weights, num_parts)
        tiles = triton.cdiv(size, _TILE)
        kernels.mirror_weights_kernel[tiles, tiles](weights, num_parts, tile=_TILE)
        label = torch.arange(size, dtype=torch.int32, device=video.device)
        up = label.clone()
        best, kept = video.new(2 * size, torch.int64, kernels.NO_KEY).split(size)
        go = self._rounds(size, video.always)
        for turn in range(len(go) - 2):
            kernels.grow_kernel[size,](
                weights,
                label,
                up,
                best,
                kept,
                num_parts,
                go[turn:],
                go[turn + 1 :],
                go[-1:],
                block=_WIDE,
            )
        return _Tree(_sorted(kept, decreasing=True)[0], node_of)

    def _tree_between_tokens(self, label: torch.Tensor) -> _Tree:
        """Return the same from all products, for components of any number (N,) int32 by node."""
        node_of = torch.empty_like(self.video.order)
        node_of[self.video.order] = self._positions
        keys = self._spanning_tree(label, self.video.order, node_of, self.video.always)
        return _Tree(keys, node_of, by_token=True)

    def _rounds(self, size: int, go: torch.Tensor) -> torch.Tensor:
        """Return what tells each of Boruvka's rounds to run, for the first go, and a zero."""
        rounds = self.video.new(size.bit_length() + 2, torch.int32, 0)
        rounds[:1].copy_(go)
        return rounds

    def _spanning_tree(
        self, label: torch.Tensor, rank: torch.Tensor, node_of: torch.Tensor, go: torch.Tensor
    ) -> torch.Tensor:
        """Return the maximum spanning tree of components, by Boruvka's rounds through all products.

        Args:
            label: (N,) int32 by node.
            rank: (N,) int32 by node, the order of nodes where weights are equal.
            node_of: its inverse.
            go: (1,) int32, there is none if it is 0.

        Returns:
            (N,) int64 keys of edges, strongest first, then what is no edge.
        """
        video = self.video
        label, up = label.clone(), self._positions.clone()
        best = video.new(video.num_tokens, torch.int64, kernels.NO_KEY)
        kept = video.new(video.num_tokens, torch.int64, kernels.NO_KEY)
        rounds = self._rounds(video.num_tokens, go)
        for turn in range(len(rounds) - 2):
            this, following = rounds[turn:], rounds[turn + 1 :]
            video.strongest(self._tau, this, label, rank, best)
            kernels.hook_kernel[video.grid](
                best, label, up, kept, node_of, this, following, video.num_tokens, block=_WIDE
            )
            kernels.flatten_kernel[video.grid](best, label, up, this, video.num_tokens, block=_WIDE)
            if video.num_tokens <= captures.MAX_TOKENS:
                continue
            looks = turn % 3 == 2 or not video.holds_products
            if looks and not int(following[0]):
                break
        return _sorted(kept, decreasing=True)[0]


@dataclass(frozen=True)
class _Stacked:
    """What a merge of equally long videos goes by, as one tensor of all (B, ...)."""

    length: torch.Tensor
    weight: torch.Tensor
    number: torch.Tensor
    order: torch.Tensor
    begin: torch.Tensor

    @classmethod
    def of(cls, videos: Sequence[Video], parts: "Sequence[Parts | _Cut]") -> "_Stacked":
        """Stack what videos and their parts have."""
        return cls(
            _stacked([each.length for each in videos]),
            _stacked([each.weight for each in parts]),
            _stacked([each.number for each in parts]),
            _stacked([each.tokens.order for each in parts]),
            _stacked([each.tokens.begin for each in parts]),
        )


def merge(
    rows: torch.Tensor,
    videos: Sequence[Video],
    parts: Sequence[Parts],
    stacked: _Stacked | None = None,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return what each video's tokens are merged into, and where each went.

    Args:
        rows: (B, N, D), those of the videos.
        videos: equally long.
        parts: theirs, equally many of each.
        stacked: of these, where it is there already; perhaps with more parts than there are.

    Returns:
        Of each video (K, D) of the tokens' dtype, and (N,) int64.
    """
    if not videos:
        return []
    video, num_parts = videos[0], parts[0].num_parts
    stacked = stacked or _Stacked.of(videos, parts)
    row_length, weight, number = stacked.length, stacked.weight, stacked.number
    tokens = _Grouped(stacked.order, stacked.begin[:, : num_parts + 1].contiguous())
    low_at = tokens.joined()
    shape = len(videos), num_parts, video.width
    kept = torch.empty(shape, dtype=torch.float32, device=video.device)
    # Products of 16-bit numbers are exact and fast: representatives are sums of two such.
    is_short = rows.dtype == torch.bfloat16
    factors = kept
    if is_short:
        # Products in rows of a round length are several times faster.
        size = triton.cdiv(num_parts + max(each.num_joined for each in parts), 64) * 64
        factors = torch.empty(
            len(videos), size, video.width, dtype=torch.bfloat16, device=video.device
        )
    merged = torch.empty(shape, dtype=rows.dtype, device=video.device)
    _add_up(rows, tokens, weight, low_at, kept, factors, merges=False)
    length = torch.linalg.vector_norm(kept, dim=-1)
    assignment = torch.empty(number.shape, dtype=torch.int64, device=video.device)
    stride = factors.shape[1]
    step = max(1, BLOCK_ELEMENTS // (len(videos) * stride))
    for start in range(0, video.num_tokens, step):
        some = rows[:, start : start + step]
        product = _multiplied(some if is_short else some.float(), factors.transpose(1, 2))
        kernels.nearest_kernel[some.shape[1], len(videos)](
            product,
            length,
            low_at,
            row_length,
            assignment,
            number,
            start,
            video.num_tokens,
            num_parts,
            stride,
            video.window * video.per_frame,
            halves=is_short,
            block=_WIDE,
        )
    _add_up(
        rows,
        _Grouped.of(assignment.int(), num_parts),
        weight,
        low_at,
        kept,
        merged,
        merges=True,
    )
    return list(zip(merged, assignment, strict=True))


def _stacked(of_each: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return (B, ...), without a copy of a single one."""
    return of_each[0][None] if len(of_each) == 1 else torch.stack(list(of_each))


def _add_up(
    rows: torch.Tensor,
    tokens: _Grouped,
    weight: torch.Tensor,
    low_at: torch.Tensor,
    kept: torch.Tensor,
    out: torch.Tensor,
    merges: bool,
) -> None:
    """Fill in the representatives ``kept``, and as factors ``out``; or the means of ``merges``."""
    num_videos, num_parts, width = kept.shape
    kernels.sums_kernel[num_parts, triton.cdiv(width, _SUM_BLOCK), num_videos](
        rows,
        tokens.order,
        tokens.begin,
        weight,
        kept,
        out,
        low_at,
        rows.shape[1],
        width,
        out.shape[1],
        merges=merges,
        halves=not merges and out.dtype == torch.bfloat16,
        few=_FEW_MEMBERS,
        members=_MEMBERS,
        block=_SUM_BLOCK,
        num_warps=_SUM_WARPS,
    )


def costliest_calls(device: torch.device) -> list[tuple[int, float]]:
    """Return what ``scc.costliest_calls`` does: all graphs captured, then the most that is held."""
    times = captures.USES_BEFORE_CAPTURE + 1
    return [
        *[
            (captures.MAX_TOKENS * (8 - turn) // 8, 0.1)
            for turn in range(captures.MAX_CAPTURES)
            for _ in range(times)
        ],
        (_max_held_tokens(device), 0.4),
    ]


def _max_held_tokens(device: torch.device) -> int:
    """Return how many tokens' products are held, about."""
    # Of their square, the blocks of rows leave a share out.
    share = (ROW_BLOCKS + 1) / (2 * ROW_BLOCKS)
    return math.isqrt(int(_limit(device, MAX_PRODUCTS, HELD_SHARE) / share))


def _limit(device: torch.device, num_products: int, share: int) -> int:
    """Return so many products, or fewer if they are more than a share of the GPU's memory."""
    if device.type != "cuda":
        return num_products
    memory = torch.cuda.get_device_properties(device).total_memory
    return min(num_products, memory // (4 * share))


def num_components(num_tokens: int, num_retained: int, device: torch.device) -> int:
    """Return how many components to build a tree between: those above K are rarely many."""
    expected = num_retained + max(1024, num_retained // 4)
    if num_tokens <= captures.MAX_TOKENS:
        # One size, so that one graph serves all ratios.
        size = MAX_COMPONENTS
    elif num_tokens <= _max_held_tokens(device):
        size = min(expected, math.isqrt(_limit(device, BLOCK_PRODUCTS, BLOCK_SHARE)))
    else:
        # In place of the products.
        size = min(expected, math.isqrt(_limit(device, MAX_PRODUCTS, HELD_SHARE)))
    return max(1, min(num_tokens, size))


def _sorted(values: torch.Tensor, decreasing: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Return values (..., n) in order and where each was, equal ones by their place."""
    size = values.shape[-1]
    if size > MAX_COUNTED:
        return torch.sort(values, descending=decreasing, stable=True)
    result = torch.empty_like(values)
    order = torch.empty(values.shape, dtype=torch.int32, device=values.device)
    kernels.sort_kernel[triton.cdiv(size, 32), values.numel() // size](
        values, result, order, size, decreasing=decreasing, own_block=32, block=256
    )
    return result, order


def _multiplied(
    left: torch.Tensor, right: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return left @ right in float32; numbers of 16 bits are multiplied exactly."""
    if left.dtype == torch.float32 or left.device.type != "cuda":
        with exact_float32(left.device):
            return torch.matmul(left.float(), right.float(), out=out)
    multiply = torch.bmm if left.dim() == 3 else torch.mm
    if out is None:
        return multiply(left, right, out_dtype=torch.float32)
    return multiply(left, right, out_dtype=torch.float32, out=out)
