"""Other rows for average linkage: their order, members, norms, windows and positions.

Each of :data:`VARIANTS` makes rows of a video, as ``average-linkage`` does. ``bench.row_order``
asks the demo model about them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import torch

from scissor_vllm import num_retained_tokens
from scissor_vllm.compression import linkage
from scissor_vllm.compression.linkage import WINDOW_FRAMES, LinkageTree
from scissor_vllm.compression.result import CompressedTokens, Compressor
from scissor_vllm.compression.sums import means, sizes

Tensor = torch.Tensor


class Rows(NamedTuple):
    """What the language model is given of a video."""

    tokens: Tensor
    """(K, D)"""
    positions: Tensor | None = None
    """(K,) float32, increasing from 0; None for one by one, as in serving."""
    assignment: Tensor | None = None
    """(N,) int64: the row of each token, where tokens were merged."""


@dataclass
class Video:
    """A video's tokens, and the trees that variants share."""

    tokens: Tensor
    """(T, P, D) float32; P is a square."""

    @property
    def flat(self) -> Tensor:
        """(N, D), frame by frame."""
        return self.tokens.flatten(0, 1)

    @property
    def per_frame(self) -> int:
        """P, the places of a frame."""
        return self.tokens.shape[1]

    @cached_property
    def windows(self) -> Tensor:
        """(T,) int64: the window of each frame, every 4 frames one."""
        return torch.arange(len(self.tokens)) // WINDOW_FRAMES

    @cached_property
    def tree(self) -> LinkageTree:
        """The method's own."""
        return linkage.linkage_tree(self.tokens)


Variant = Callable[[Video, int], Rows]
"""(video, K) to rows."""
Groups = Callable[[Video, int], tuple[Tensor, Tensor]]
"""(video, K) to the group of each token, (N,) int64 in 0..K-1, and the window of each frame."""
Members = Callable[[Video, Tensor, int], Tensor]
"""(video, group of each token, K) to what stands for each group: a token's number, (K,) float64.
The number's fraction of a place orders groups of one place."""
Values = Callable[[Video, Tensor, int], Tensor]
"""(video, group of each token, K) to rows (K, D)."""


def method(video: Video, num_rows: int) -> Rows:
    """Return the rows of ``average-linkage``."""
    result = linkage.cut(video.tree, video.tokens, num_rows)
    return Rows(result.tokens, assignment=result.assignment)


def every_4_frames(video: Video, num_rows: int) -> tuple[Tensor, Tensor]:
    """Return the groups of ``average-linkage``."""
    return linkage.cut(video.tree, video.tokens, num_rows).assignment, video.windows


def mean_rows(video: Video, group: Tensor, num_rows: int) -> Tensor:
    """Return the means of the groups."""
    return means(video.flat, group, num_rows)


# Members


def middle(video: Video, group: Tensor, num_rows: int) -> Tensor:
    """Return the lower median by place, the method's."""
    place = torch.arange(len(group)) % video.per_frame
    by_place = torch.argsort(group * video.per_frame + place, stable=True)
    count = sizes(group, num_rows)
    return by_place[torch.cumsum(count, 0) - count + (count - 1) // 2].double()


def first(video: Video, group: Tensor, num_rows: int) -> Tensor:
    """Return the first token."""
    return _extreme(group, num_rows, "amin")


def last(video: Video, group: Tensor, num_rows: int) -> Tensor:
    """Return the last token."""
    return _extreme(group, num_rows, "amax")


def nearest_mean(video: Video, group: Tensor, num_rows: int) -> Tensor:
    """Return the token of the highest cosine with the group's mean, the lowest of equal ones."""
    normalize = torch.nn.functional.normalize
    rows = normalize(mean_rows(video, group, num_rows), dim=1)
    cosine = (normalize(video.flat, dim=1) * rows[group]).sum(dim=1)
    best = torch.full((num_rows,), -torch.inf).scatter_reduce(0, group, cosine, "amax")
    number = torch.arange(len(group))
    candidate = torch.where(cosine == best[group], number, len(group))
    return torch.full((num_rows,), len(group)).scatter_reduce(0, group, candidate, "amin").double()


def centroid(video: Video, group: Tensor, num_rows: int) -> Tensor:
    """Return the place of mean line and mean column, in the frame of the middle member."""
    side = math.isqrt(video.per_frame)
    place = torch.arange(len(group)) % video.per_frame
    count = sizes(group, num_rows).double()

    def mean(value: Tensor) -> Tensor:
        return (
            torch.zeros(num_rows, dtype=torch.float64).index_add(0, group, value.double()) / count
        )

    frame = middle(video, group, num_rows) // video.per_frame
    line = (mean(place // side) + 0.5).floor()
    return frame * video.per_frame + line * side + mean(place % side).clamp(max=side - 1)


def mean_place(video: Video, group: Tensor, num_rows: int) -> Tensor:
    """Return the mean place in a frame, in the frame of the middle member. It needs no columns."""
    place = torch.arange(len(group)) % video.per_frame
    total = torch.zeros(num_rows, dtype=torch.float64).index_add(0, group, place.double())
    frame = middle(video, group, num_rows) // video.per_frame
    return frame * video.per_frame + total / sizes(group, num_rows)


def _middle_of_a_frame(reduce: str) -> Members:
    """Return the middle member among those of a group's first or last frame."""

    def chosen(video: Video, group: Tensor, num_rows: int) -> Tensor:
        frame = torch.arange(len(group)) // video.per_frame
        only = _extreme(group, num_rows, reduce).long() // video.per_frame
        kept = (frame == only[group]).nonzero().squeeze(1)
        place = kept % video.per_frame
        by_place = kept[torch.argsort(group[kept] * video.per_frame + place, stable=True)]
        count = sizes(group[kept], num_rows)
        return by_place[torch.cumsum(count, 0) - count + (count - 1) // 2].double()

    return chosen


def at_random(video: Video, group: Tensor, num_rows: int) -> Tensor:
    """Return a random place in the frame of the middle member."""
    generator = torch.Generator().manual_seed(0)
    place = torch.rand(num_rows, generator=generator) * (video.per_frame - 1)
    return middle(video, group, num_rows) // video.per_frame * video.per_frame + place


def _extreme(group: Tensor, num_rows: int, reduce: str) -> Tensor:
    number = torch.arange(len(group))
    start = number.new_zeros(num_rows)
    return start.scatter_reduce(0, group, number, reduce, include_self=False).double()


# Values


def members_norm(video: Video, group: Tensor, num_rows: int) -> Tensor:
    """Return the means of the groups, as long as their members are on average."""
    rows = mean_rows(video, group, num_rows)
    length = means(video.flat.norm(dim=1, keepdim=True), group, num_rows)
    return torch.nn.functional.normalize(rows, dim=1) * length


def nearest_norm(video: Video, group: Tensor, num_rows: int) -> Tensor:
    """Return the means of the groups, as long as the member nearest the mean."""
    rows = mean_rows(video, group, num_rows)
    length = video.flat.norm(dim=1)[nearest_mean(video, group, num_rows).long()]
    return torch.nn.functional.normalize(rows, dim=1) * length[:, None]


def nearest_token(video: Video, group: Tensor, num_rows: int) -> Tensor:
    """Return the member nearest the mean of each group."""
    return video.flat[nearest_mean(video, group, num_rows).long()]


# Groups


def _joined(
    video: Video, window: Tensor, distance: Callable[[Tensor], Tensor], exponent: float = 0
) -> tuple[Tensor, Tensor]:
    """Return parent and height of all tokens, joined inside the windows of frames (T,)."""
    parents, heights = [], []
    begin = 0
    for num_frames in window.bincount().tolist():
        rows = video.tokens[begin : begin + num_frames].flatten(0, 1)
        parent, height = linkage._join(distance(rows), exponent)
        parents.append(parent + begin * video.per_frame)
        heights.append(height)
        begin += num_frames
    return torch.cat(parents), torch.cat(heights)


def _cut(video: Video, parent: Tensor, order: Tensor, num_rows: int) -> Tensor:
    """Return the groups that the first N - K merges of an order leave."""
    rank = torch.empty(len(order), dtype=torch.int32)
    rank[order] = torch.arange(len(order), dtype=torch.int32)
    tree = LinkageTree(parent, torch.zeros(len(order)), rank, WINDOW_FRAMES * video.per_frame)
    return linkage.cut(tree, video.tokens, num_rows).assignment


def by_cuts(video: Video, num_rows: int, share: float) -> tuple[Tensor, Tensor]:
    """Return groups in windows that also end at the video's own cuts.

    A cut is where the mean cosine of consecutive frames' tokens is below so large a share of its
    median over the video.
    """
    unit = torch.nn.functional.normalize(video.tokens, dim=2)
    cosine = (unit[1:] * unit[:-1]).sum(dim=2).mean(dim=1)
    is_cut = [True, *(cosine < share * cosine.median()).tolist()]
    windows: list[int] = []
    for frame, begins in enumerate(is_cut):
        full = frame >= WINDOW_FRAMES and windows[-1] == windows[-WINDOW_FRAMES]
        windows.append(windows[-1] + (begins or full) if windows else 0)
    window = torch.tensor(windows)
    parent, height = _joined(video, window, linkage.distances)
    return _cut(video, parent, torch.sort(height, stable=True).indices, num_rows), window


def by_exponent(video: Video, num_rows: int, exponent: float) -> tuple[Tensor, Tensor]:
    """Return groups by another exponent of a pair's size, below 0 too: it favours large groups."""
    parent, height = _joined(video, video.windows, linkage.distances, exponent)
    return _cut(video, parent, torch.sort(height, stable=True).indices, num_rows), video.windows


def windows_of(video: Video, num_rows: int, num_frames: int) -> tuple[Tensor, Tensor]:
    """Return groups in windows of another length."""
    tree = linkage.linkage_tree(video.tokens, window_frames=num_frames)
    window = torch.arange(len(video.tokens)) // num_frames
    return linkage.cut(tree, video.tokens, num_rows).assignment, window


def equal_windows(video: Video, num_rows: int, equal: float) -> tuple[Tensor, Tensor]:
    """Return groups, so large a share of them in equal numbers for all windows."""
    height = video.tree.height
    window = video.windows.repeat_interleave(video.per_frame)
    num_windows = int(window[-1]) + 1
    if num_rows < num_windows:
        return every_4_frames(video, num_rows)
    each = max(1, int(equal * num_rows) // num_windows)
    kept = torch.zeros(len(height), dtype=torch.bool)
    for number in range(num_windows):
        inside = (window == number).nonzero().squeeze(1)
        kept[inside[torch.sort(height[inside], stable=True, descending=True).indices[:each]]] = True
    left = torch.where(kept, -torch.inf, height)
    kept[torch.sort(left, stable=True, descending=True).indices[: num_rows - int(kept.sum())]] = (
        True
    )
    order = torch.argsort(kept.int(), stable=True)
    return _cut(video, video.tree.parent, order, num_rows), video.windows


def near_in_place(
    video: Video,
    num_rows: int,
    across: float,
    down: float,
    time: float = 0,
    num_frames: int = WINDOW_FRAMES,
) -> tuple[Tensor, Tensor]:
    """Return groups by a distance that grows with the distance in the picture and in time.

    Args:
        video: of the tokens.
        num_rows: K.
        across: added at a horizontal distance of a picture's side, in proportion to its square.
        down: likewise, vertical.
        time: added for 4 frames, in proportion.
        num_frames: of a window.
    """
    side = math.isqrt(video.per_frame)

    def distance(rows: Tensor) -> Tensor:
        number = torch.arange(len(rows))
        at = number % video.per_frame
        scale = torch.tensor([down, across]).sqrt() / side
        where = torch.stack([at // side, at % side], dim=1) * scale
        frame = (number // video.per_frame).float()[:, None] / WINDOW_FRAMES
        added = torch.cdist(where, where).square() + time * torch.cdist(frame, frame)
        return linkage.distances(rows) + added

    window = torch.arange(len(video.tokens)) // num_frames
    parent, height = _joined(video, window, distance)
    return _cut(video, parent, torch.sort(height, stable=True).indices, num_rows), window


# Whole variants


def rows_of(
    groups: Groups = every_4_frames,
    members: Members = middle,
    values: Values = mean_rows,
    num_pictures: int | None = None,
) -> Variant:
    """Return a variant: rows by picture, then by the place of what stands for each.

    Args:
        groups: which tokens are joined.
        members: whose places the rows are ordered by.
        values: of the rows.
        num_pictures: of a window; None for the method's.
    """

    def variant(video: Video, num_rows: int) -> Rows:
        group, window = groups(video, num_rows)
        member = members(video, group, num_rows)
        order = torch.argsort(_picture(video, window, member, num_rows, num_pictures), stable=True)
        row = torch.empty_like(order)
        row[order] = torch.arange(num_rows)
        return Rows(values(video, group, num_rows)[order], assignment=row[group])

    return variant


def _picture(
    video: Video, window: Tensor, member: Tensor, num_rows: int, num_pictures: int | None
) -> Tensor:
    """Return the picture of each group's member, and in it the place, as one number (K,)."""
    num_frames, per_frame = video.tokens.shape[:2]
    if num_pictures is None:
        surplus = num_rows - math.ceil(num_frames / WINDOW_FRAMES)
        num_pictures = max(1, math.ceil(surplus * WINDOW_FRAMES / (num_frames * per_frame)))
    frame = (member // per_frame).long()
    begin = torch.searchsorted(window, window)[frame]
    picture_frames = math.ceil(WINDOW_FRAMES / num_pictures)
    picture = window[frame] * num_pictures + (frame - begin) // picture_frames
    return picture * per_frame + member % per_frame


def in_order_of(members: Members) -> Variant:
    """Return a variant: rows in the order of tokens, whatever their window."""

    def variant(video: Video, num_rows: int) -> Rows:
        group, _ = every_4_frames(video, num_rows)
        order = torch.argsort(members(video, group, num_rows), stable=True)
        return Rows(mean_rows(video, group, num_rows)[order])

    return variant


def with_positions(scaled: bool) -> Variant:
    """Return the method's rows at the positions of their middle members in the whole video.

    Args:
        scaled: to the number of rows.
    """

    def variant(video: Video, num_rows: int) -> Rows:
        group, window = every_4_frames(video, num_rows)
        member = middle(video, group, num_rows)
        key = _picture(video, window, member, num_rows, 1)
        order = torch.argsort(key, stable=True)
        # A window takes as many positions as its frames, and a picture as one frame: spread it.
        position = window[(member // video.per_frame).long()] * WINDOW_FRAMES * video.per_frame
        position = (position + member % video.per_frame * WINDOW_FRAMES)[order].float()
        position = position - position[0]
        if scaled:
            position *= (num_rows - 1) / position[-1]
        return Rows(mean_rows(video, group, num_rows)[order], position)

    return variant


# Whole frames


def whole(video: Video, num_rows: int) -> Rows:
    """Return all tokens."""
    return Rows(video.flat)


def whole_shuffled(video: Video, num_rows: int) -> Rows:
    """Return all tokens, those of each frame in a random order."""
    generator = torch.Generator().manual_seed(0)
    frames = [frame[torch.randperm(len(frame), generator=generator)] for frame in video.tokens]
    return Rows(torch.cat(frames))


def whole_tenth(video: Video, num_rows: int) -> Rows:
    """Return all tokens at positions scaled to a tenth."""
    return Rows(video.flat, torch.arange(len(video.flat)) / 10)


def whole_frames(video: Video, num_rows: int) -> Rows:
    """Return all tokens, those of a frame at one position."""
    frame = torch.arange(len(video.flat)) // video.per_frame
    return Rows(video.flat, (frame * video.per_frame).float())


def unmerged(ratio: float) -> Variant:
    """Return a variant: every token replaced by the method's row that it is in, N in all."""

    def variant(video: Video, num_rows: int) -> Rows:
        return Rows(_replaced(video, ratio))

    return variant


def unmerged_frames(ratio: float) -> Variant:
    """Return a variant: so replaced tokens of one frame of each window, the second."""

    def variant(video: Video, num_rows: int) -> Rows:
        frames = _replaced(video, ratio).view_as(video.tokens)
        return Rows(frames[1::WINDOW_FRAMES].flatten(0, 1))

    return variant


def _replaced(video: Video, ratio: float) -> Tensor:
    result = linkage.cut(video.tree, video.tokens, num_retained_tokens(len(video.flat), ratio))
    return result.tokens[result.assignment]


WHOLE: Mapping[str, Variant] = {
    "whole": whole,
    "whole, positions / 10": whole_tenth,
    "whole, one position a frame": whole_frames,
    "whole, frames shuffled": whole_shuffled,
    "whole, of rows at 0.1": unmerged(0.1),
    "a frame a window, of rows at 0.1": unmerged_frames(0.1),
}
"""Variants that keep whole frames, the same at every ratio."""

VARIANTS: Mapping[str, Variant] = {
    "method": method,
    "order: first token": in_order_of(first),
    "order: last token": in_order_of(last),
    "order: random in window": rows_of(members=at_random),
    "member: nearest mean": rows_of(members=nearest_mean),
    "member: centroid": rows_of(members=centroid),
    "member: mean place": rows_of(members=mean_place),
    "member: first token": rows_of(members=first),
    "member: last token": rows_of(members=last),
    "member: middle of first frame": rows_of(members=_middle_of_a_frame("amin")),
    "member: middle of last frame": rows_of(members=_middle_of_a_frame("amax")),
    "pictures: 1": rows_of(num_pictures=1),
    "pictures: 2": rows_of(num_pictures=2),
    "pictures: 4": rows_of(num_pictures=4),
    "norm: members'": rows_of(values=members_norm),
    "norm: nearest's": rows_of(values=nearest_norm),
    "row: nearest token": rows_of(values=nearest_token),
    **{
        f"exponent: {p:g}": rows_of(partial(by_exponent, exponent=p))
        for p in (-0.25, -0.1, 0.1, 0.25)
    },
    **{f"windows: cuts {s:g}": rows_of(partial(by_cuts, share=s)) for s in (0.7, 0.8, 0.9)},
    **{f"windows: {n} frames": rows_of(partial(windows_of, num_frames=n)) for n in (1, 2, 3, 6, 8)},
    **{
        f"equal windows: {share:g}": rows_of(partial(equal_windows, equal=share))
        for share in (0.5, 1)
    },
    **{
        f"near in place: {x:g} {y:g}": rows_of(partial(near_in_place, across=x, down=y))
        for x, y in ((0.1, 0.1), (0.3, 0.3), (1, 1), (0.3, 0), (1, 0), (1, 0.1))
    },
    "near in place: 0.3 0.3, time 0.1": rows_of(
        partial(near_in_place, across=0.3, down=0.3, time=0.1)
    ),
    **{
        f"centroid, near in place: {x:g} {y:g}": rows_of(
            partial(near_in_place, across=x, down=y), members=centroid
        )
        for x, y in ((0.1, 0.1), (0.3, 0.3), (1, 1), (0.3, 0), (1, 0), (1, 0.1), (3, 0.3))
    },
    "centroid, equal windows: 1": rows_of(partial(equal_windows, equal=1), members=centroid),
    **{
        f"centroid, windows: {n} frames": rows_of(partial(windows_of, num_frames=n), centroid)
        for n in (6, 8)
    },
    "centroid, near in place: 0.3 0.3, windows: 8 frames": rows_of(
        partial(near_in_place, across=0.3, down=0.3, num_frames=8), members=centroid
    ),
    "positions: of the video": with_positions(scaled=False),
    "positions: scaled": with_positions(scaled=True),
}
"""Variants of average linkage by name. The first is the method as it is."""


def as_compressor(name: str) -> Compressor:
    """Return a variant of merged rows as a method: (tokens (T, P, D), K) to rows.

    Raises:
        ValueError: its rows are not those of groups.
    """

    def compressed(tokens: Tensor, num_retained: int) -> CompressedTokens:
        rows = VARIANTS[name](Video(tokens), num_retained)
        if rows.assignment is None:
            raise ValueError(f"{name!r} does not say which row a token is in: choose another")
        return CompressedTokens(rows.tokens, rows.assignment)

    return compressed
