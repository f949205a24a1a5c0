"""A video on the device: the input of a search, and its passes over all pairs of runs."""

from collections.abc import Iterator

import torch
import triton

from scissor_vllm.compression.cuda.kernels import frames, pairs, parts, union_find
from scissor_vllm.compression.cuda.products import MAX_FRAMES_AT_ONCE, Block, Products, multiply
from scissor_vllm.compression.cuda.workspace import WIDE_BLOCK, Workspace, num_lanes

LEAST, MOST = 2.0**-40, 2.0**40
"""Range of tokens' largest magnitudes in which products and sums stay within float32."""

_ROWS = 16
"""Rows of a frame in one work item of a pass."""

_MAX_PROGRAMS = 2048
"""Most programs of a pass: some 16 for each multiprocessor of a large GPU."""

_ROW_BLOCK = 4096


class Passes:
    """The passes over a workspace's video, equal for all videos with the same lanes.

    They depend on the video only through device memory, so they can be captured.
    """

    def __init__(
        self, workspace: Workspace, lanes: int, aligned: bool, products: Products | None = None
    ) -> None:
        """Take the workspace, and the products unless they are in the workspace."""
        self.workspace = workspace
        self.lanes = lanes
        self.aligned = aligned
        self._products = products

    @property
    def holds_products(self) -> bool:
        return self.workspace.products is not None

    def _warps(self, per_warp: int) -> int:
        """Return the number of warps for a frame's row."""
        return max(1, min(8, self.lanes // (32 * per_warp)))

    def _blocks(self) -> Iterator[Block]:
        if self._products is not None:
            yield from self._products.blocks(self.workspace.products)
        else:
            assert self.workspace.products is not None
            yield Block(self.workspace.products, 0, 0, 0)

    def _num_programs(self) -> int:
        return min(_MAX_PROGRAMS, self.workspace.capacity)

    def unite(self, tau: torch.Tensor, go: torch.Tensor) -> None:
        """Find the runs at tau (1,), and join those whose cosine is above it, unless go is 0."""
        ws = self.workspace
        pairs.runs_kernel[self._num_programs(),](
            ws.inside,
            ws.order,
            ws.link,
            ws.unit,
            ws.parent,
            ws.run_of,
            ws.run_size,
            tau,
            go,
            ws.shape,
            block=self.lanes,
            rows=_ROWS,
            num_warps=self._warps(4),
        )
        if not self.holds_products and not int(go):
            return
        unused = ws.parent
        self._visit(pairs.UNION, tau, go, unused, unused, unused, unused)

    def _visit(
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
        ws = self.workspace
        for block in self._blocks():
            pairs.pairs_kernel[self._num_programs(),](
                block.products,
                ws.link,
                ws.unit,
                ws.parent,
                label,
                rank,
                best,
                degree,
                tau,
                go,
                ws.shape,
                block.base,
                block.first_frame,
                block.num_frames,
                ws.always if num_parts is None else num_parts,
                block=self.lanes,
                rows=_ROWS,
                use=use,
                aligned=self.aligned,
                num_warps=self._warps(8),
            )

    def labels(self) -> torch.Tensor:
        """Return each node's component (capacity,) int32, its lowest node."""
        ws = self.workspace
        label = torch.empty_like(ws.parent)
        union_find.find_roots_kernel[ws.grid](ws.parent, label, ws.shape, block=WIDE_BLOCK)
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
        self._visit(pairs.STRONGEST, tau, go, label, rank, best, best)

    def between(
        self, tau: torch.Tensor, part: torch.Tensor, weights: torch.Tensor, num_parts: torch.Tensor
    ) -> None:
        """Raise the weights to those of the strongest edges between parts.

        Args:
            tau: (1,) float32.
            part: (N,) int32 by node.
            weights: (parts * parts,) int32, of part i to part j or of j to i.
            num_parts: (1,) int32; parts from this index on are ignored.
        """
        ws = self.workspace
        self._visit(pairs.BETWEEN, tau, ws.always, part, part, weights, ws.parent, num_parts)

    def degrees(self, tau: torch.Tensor) -> torch.Tensor:
        """Return the neighbours of each run, (capacity,) int32 by node."""
        ws = self.workspace
        degree = torch.zeros_like(ws.parent)
        self._visit(pairs.DEGREE, tau, ws.always, degree, degree, degree, degree)
        return degree

    def order_of_runs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the runs at the workspace's tau by the paper's order.

        Returns:
            (capacity,) int64 by node: in the low half, how many tokens there are from the run's
            lowest token of highest degree to the end; and (capacity,) int64 by token: how many
            runs have theirs at or before the token.
        """
        ws = self.workspace
        lead = torch.zeros_like(ws.number)
        parts.lead_tokens_kernel[ws.capacity,](
            ws.cosine,
            ws.order,
            ws.run_of,
            lead,
            ws.tau,
            ws.shape,
            block=self.lanes,
            num_warps=self._warps(4),
        )
        is_lead = torch.zeros_like(ws.parent)
        parts.mark_leads_kernel[ws.grid](
            lead, ws.parent, is_lead, ws.link, ws.tau, ws.shape, roots=0, block=WIDE_BLOCK
        )
        return lead, torch.cumsum(is_lead, 0)

    def ranks(
        self, lead: torch.Tensor, rank_of_token: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the place of each run in the paper's order, (capacity,) int32 by node, and the
        inverse, from what ``order_of_runs`` returned.
        """
        ws = self.workspace
        rank, node_of = torch.empty_like(ws.parent), torch.empty_like(ws.parent)
        parts.rank_runs_kernel[ws.grid](
            lead, rank_of_token, rank, node_of, ws.link, ws.tau, ws.shape, block=WIDE_BLOCK
        )
        return rank, node_of

    def group(self, label: torch.Tensor, lead: torch.Tensor) -> None:
        """Number the components of the runs at tau in the paper's order, and group the tokens.

        Fills in the workspace's ``by_part``, ``begin``, ``weight``, ``number`` and ``outcome``.

        Args:
            label: (capacity,) int32 by node, the component of each run.
            lead: what ``order_of_runs`` returned.
        """
        ws = self.workspace
        degree = self.degrees(ws.tau)
        part_lead, part_runs = torch.zeros_like(ws.number), torch.zeros_like(ws.parent)
        parts.lead_runs_kernel[ws.grid](
            lead, label, degree, part_lead, part_runs, ws.link, ws.tau, ws.shape, block=WIDE_BLOCK
        )
        is_lead = torch.zeros_like(ws.parent)
        parts.mark_leads_kernel[ws.grid](
            part_lead, label, is_lead, ws.link, ws.tau, ws.shape, roots=1, block=WIDE_BLOCK
        )
        torch.cumsum(is_lead, 0, out=ws.number)
        part = torch.empty_like(ws.parent)
        parts.parts_kernel[ws.grid](
            ws.order,
            ws.run_of,
            ws.run_size,
            label,
            part_lead,
            part_runs,
            ws.number,
            part,
            ws.weight,
            ws.shape,
            ws.capacity,
            block=WIDE_BLOCK,
        )
        sorted_part, by_part = torch.sort(part, stable=True)
        ws.by_part.copy_(by_part)
        torch.searchsorted(sorted_part, ws.bounds, out_int32=True, out=ws.begin)
        low_at = torch.empty_like(ws.begin)
        parts.joined_parts_kernel[1,](ws.begin, low_at, ws.capacity, block=WIDE_BLOCK)
        parts.summary_kernel[1,](ws.outcome, ws.state, ws.tau, ws.number, low_at[-1:], ws.shape)


class Video:
    """One video's tokens, loaded into a workspace.

    Attributes:
        rows: (N, D), the tokens in their own order, as zeros where they are not usable.
        window: frames that are compressed together, at most T.
        passes: over its workspace.
    """

    def __init__(
        self,
        tokens: torch.Tensor,
        window: int,
        num_retained: int = 1,
        threshold: float = 0.0,
        workspace: Workspace | None = None,
        num_components: int = 1,
    ) -> None:
        """Take tokens (T, P, D) float32, bfloat16 or float16, and K or a threshold.

        Without a workspace it allocates one, with dense weights for the given components.
        """
        self.num_frames, self.per_frame, self.width = tokens.shape
        self.num_tokens = self.num_frames * self.per_frame
        self.window = min(window, self.num_frames)
        self.num_retained = num_retained
        products = Products(self.num_frames, self.per_frame, self.window, tokens.device)
        num_inside = self.num_tokens * self.per_frame
        if workspace is None:
            workspace = Workspace(
                self.num_tokens, num_components, products.size, num_inside, tokens.device
            )
        lanes = num_lanes(self.per_frame)
        is_own = not products.is_held
        self.passes = Passes(
            workspace, lanes, self.per_frame % 4 == 0, products if is_own else None
        )
        rows = tokens.reshape(self.num_tokens, self.width)
        self.rows = torch.empty_like(rows)
        self._load(rows, threshold, workspace, products)

    def _load(
        self, rows: torch.Tensor, threshold: float, ws: Workspace, products: Products
    ) -> None:
        frames.rows_kernel[self.num_tokens,](
            rows,
            self.rows,
            ws.length,
            ws.largest,
            ws.shape,
            ws.tau,
            self.num_tokens,
            self.num_frames,
            self.per_frame,
            self.window,
            products.block_rows,
            int(products.is_apart),
            self.num_retained,
            threshold,
            self.width,
            LEAST,
            MOST,
            block=min(_ROW_BLOCK, triton.next_power_of_2(self.width)),
            num_warps=8,
        )
        by_frame = self.rows.view(self.num_frames, self.per_frame, self.width)
        shape = self.num_frames, self.per_frame, self.per_frame
        inside = ws.inside[: self.num_tokens * self.per_frame].view(shape)
        for some, out in zip(
            by_frame.split(MAX_FRAMES_AT_ONCE), inside.split(MAX_FRAMES_AT_ONCE), strict=True
        ):
            multiply(some, some.transpose(1, 2), out)
        warps = self.passes._warps
        lanes = self.passes.lanes
        frames.cosines_kernel[self.num_tokens,](
            ws.inside, ws.cosine, self.per_frame, block=lanes, num_warps=warps(2)
        )
        frames.prim_kernel[self.num_frames,](
            ws.cosine, ws.order, ws.link, self.per_frame, block=lanes, num_warps=warps(8)
        )
        ordered = self.rows[ws.order[: self.num_tokens]]
        held = None if products.size is None else ws.products
        products.hold(ordered, held)
