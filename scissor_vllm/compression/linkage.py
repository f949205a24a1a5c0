"""Average linkage (UPGMA) of a video's tokens, inside windows of a few frames.

Each window's tokens are joined bottom-up, the two closest groups first. The distance of groups A
and B of a and b tokens is

    height(A, B) = (mean of 1 - cosine between A and B) * (a * b / (a + b)) ** ward_exponent.

Exponent 0 is average linkage; 1 weighs groups as Ward's method does. The merges of all windows,
sorted by height, are one tree. The N - K lowest merges leave exactly K groups, so one tree serves
every K. A row is the mean of its group's tokens.

Rows are in the order of windows, and inside a window in the order of a frame's places: a window's
rows are one picture, or several if they are more than a frame has places. Language models read
places off the order of rows.

Every round joins all pairs of groups that are each other's nearest. The heights never fall from a
child to its parent, so this gives the tree of the textbook algorithm, which joins one pair at a
time. Source: reciprocal nearest neighbours, F. Murtagh, "A Survey of Recent Advances in
Hierarchical Clustering Algorithms", The Computer Journal 26 (1983).

A CPU and a GPU make the same groups. Unit vectors are rounded to integers, so their products are
exact in any order of summation. All arithmetic after that is float32, in one stated order.
"""

import functools
import itertools
import math
from dataclasses import dataclass, replace
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray

from scissor_vllm.compression.result import CompressedTokens
from scissor_vllm.compression.sums import means, sizes
from scissor_vllm.compression.validation import check_num_retained, check_tokens, checked_frames

WINDOW_FRAMES = 4
"""Frames of a window."""

MAX_WINDOW_TOKENS = 1 << 12
"""Most tokens of a window, whose similarities take 64 MiB. Longer frames make shorter windows."""

UNIT_BITS = 18
"""A unit vector's components are integers times 2^-18: a cosine is off by about 2^-19."""

DISTANCE_BITS = 24
"""Distances are multiples of 2^-24."""

COPY = 2.0**-22
"""Tokens at most this distant are copies. They are joined at height 0 before all others."""

INDEX_BITS = 12
"""Bits of a token's number in its window."""

_BLOCK_ROWS = 196
"""Rows of a window that are multiplied at once, with the rows after them only."""

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class LinkageTree:
    """The merges of one video's tokens, on the tokens' device."""

    parent: torch.Tensor
    """(N,) int64: the group of token i is joined to the group of this lower token. A window's
    first token has itself."""
    height: torch.Tensor
    """(N,) float32: the height of that merge, inf for a window's first token."""
    rank: torch.Tensor
    """(N,) int32: the merge's place among all, by height; of equal heights by token."""
    window_tokens: int
    """Tokens of every window but the last, which may have fewer."""

    @property
    def num_windows(self) -> int:
        """Number of windows: the number of groups that all merges leave."""
        return -(-len(self.parent) // self.window_tokens)


@dataclass(frozen=True)
class AverageLinkage:
    """Average linkage as a method, whose search is the same for all K."""

    window_frames: int = WINDOW_FRAMES
    """Frames of a window."""
    ward_exponent: float = 0.0
    """In [0, 1]; 0 is average linkage."""

    @torch.no_grad()
    def __call__(self, tokens: torch.Tensor, num_retained: int) -> CompressedTokens:
        """Return tokens merged inside windows, as :func:`compress_by_linkage`."""
        check_num_retained(num_retained, check_tokens(tokens))
        return self.cut(self.tree(tokens), tokens, num_retained)

    @torch.no_grad()
    def tree(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return what :meth:`cut` needs of a video's tree, (3, N) int32 on the tokens' device."""
        tree = linkage_tree(
            tokens, window_frames=self.window_frames, ward_exponent=self.ward_exponent
        )
        return torch.stack([tree.parent.int(), tree.rank, tree.height.view(torch.int32)])

    def tree_bytes(self, num_tokens: int) -> int:
        """Return the size of a tree."""
        return 12 * num_tokens

    @torch.no_grad()
    def cut(self, tree: torch.Tensor, tokens: torch.Tensor, num_retained: int) -> CompressedTokens:
        """Return tokens merged to K rows by their tree, without a search.

        The similarity threshold is the mean cosine of the last two groups that were joined.

        Args:
            tree: that :meth:`tree` made of these tokens.
            tokens: (T, P, D) floating; N = T*P.
            num_retained: K, 1 <= K <= N.

        Raises:
            TypeError, ValueError: as :func:`cut`.
        """
        # A row of the tree lies at any multiple of 4 bytes. Kernels are compiled for aligned ranks.
        parent, rank, height = tree[0].long(), tree[1].clone(), tree[2].view(torch.float32)
        size = _window_tokens(tokens.shape[0], tokens.shape[1], self.window_frames)
        result = cut(LinkageTree(parent, height, rank, size), tokens, num_retained)
        if self.ward_exponent != 0 or num_retained == len(parent):
            return result
        is_made = (rank < len(parent) - num_retained) & (height < torch.inf)
        threshold = 1 - torch.where(is_made, height, 0.0).max().double()
        if threshold.is_cuda:
            return replace(result, threshold_on_device=threshold)
        return replace(result, similarity_threshold=float(threshold))


@torch.no_grad()
def compress_by_linkage(
    tokens: torch.Tensor,
    num_retained: int,
    *,
    window_frames: int = WINDOW_FRAMES,
    ward_exponent: float = 0.0,
) -> CompressedTokens:
    """Return tokens merged by average linkage inside windows, one picture of rows after another.

    Each picture's rows are in the order of their middle members' places in a frame. With fewer rows
    than windows, runs of consecutive windows share a row, in K runs as equally long as can be. On a
    GPU with Triton the host does not wait for the device; tokens that are not finite then count as
    zeros.

    Args:
        tokens: (T, P, D) floating, one video; N = T*P. Not modified.
        num_retained: K, 1 <= K <= N.
        window_frames: frames of a window.
        ward_exponent: in [0, 1]; 0 is average linkage.

    Raises:
        TypeError, ValueError: as :func:`scissor_vllm.compress`, or an unsupported setting.
    """
    check_num_retained(num_retained, check_tokens(tokens))
    tree = linkage_tree(tokens, window_frames=window_frames, ward_exponent=ward_exponent)
    return cut(tree, tokens, num_retained)


@torch.no_grad()
def linkage_tree(
    tokens: torch.Tensor, *, window_frames: int = WINDOW_FRAMES, ward_exponent: float = 0.0
) -> LinkageTree:
    """Return the tree of a video, for :func:`cut` at any K.

    Args:
        tokens: (T, P, D) floating, one video.
        window_frames: frames of a window, 1 or more.
        ward_exponent: in [0, 1]; 0 is average linkage.

    Raises:
        TypeError, ValueError: as :func:`compress_by_linkage`.
    """
    num_tokens = check_tokens(tokens)
    if isinstance(window_frames, bool) or not isinstance(window_frames, int) or window_frames < 1:
        raise ValueError(f"window_frames must be an int of 1 or more, got {window_frames!r}")
    if not 0 <= ward_exponent <= 1:
        raise ValueError(f"ward_exponent must lie in [0, 1], got {ward_exponent}")
    size = _window_tokens(tokens.shape[0], tokens.shape[1], window_frames)
    cuda = _cuda_kernels(tokens.device)
    if cuda is not None:
        parent, height = cuda.join_windows(tokens.reshape(num_tokens, -1), size, ward_exponent)
    else:
        rows = checked_frames(tokens, 1).reshape(num_tokens, -1)
        parent, height = _join_windows(rows, size, ward_exponent)
    order = torch.sort(height, stable=True).indices
    place = torch.arange(num_tokens, dtype=torch.int32, device=order.device)
    rank = torch.empty_like(place).scatter(0, order, place)
    return LinkageTree(parent, height, rank, size)


@torch.no_grad()
def cut(tree: LinkageTree, tokens: torch.Tensor, num_retained: int) -> CompressedTokens:
    """Return the K groups that a tree's N - K lowest merges leave, as the means of their tokens.

    Args:
        tree: of these tokens, or of a video of the same frames.
        tokens: (T, P, D) floating; N = T*P.
        num_retained: K, 1 <= K <= N.

    Raises:
        TypeError, ValueError: as :func:`compress_by_linkage`, or another number of tokens.
    """
    num_tokens = check_tokens(tokens)
    check_num_retained(num_retained, num_tokens)
    if len(tree.parent) != num_tokens:
        raise ValueError(
            f"the tree has {len(tree.parent)} tokens and the video {num_tokens}: cut a tree with "
            "the tokens that it was made of"
        )
    groups = _groups(tree, num_retained)
    part = _in_order_of_places(groups, num_retained, tokens.shape[1], tree.window_tokens)
    flat = tokens.detach().reshape(num_tokens, -1)
    cuda = _cuda_kernels(tokens.device)
    if cuda is not None:
        rows = cuda.group_means(flat, part, num_retained)
    else:
        rows = means(flat.float(), part, num_retained)
    return CompressedTokens(rows.to(tokens.dtype), part)


def warm_up_shapes(max_tokens: int, device: torch.device) -> list[tuple[int, int, float]]:
    """Return shapes and ratios (T, P, K/N) of the calls after which nothing more is prepared.

    Args:
        max_tokens: N of the largest video.
        device: that compresses.
    """
    cuda = _cuda_kernels(device)
    return cuda.warm_up_shapes(max_tokens) if cuda else []


def _groups(tree: LinkageTree, num_groups: int) -> torch.Tensor:
    """Return the group of each token, (N,) int64, numbered by their lowest tokens.

    No host synchronization.
    """
    token = torch.arange(len(tree.parent), device=tree.parent.device)
    if num_groups < tree.num_windows:
        return token // tree.window_tokens * num_groups // tree.num_windows
    cuda = _cuda_kernels(token.device)
    if cuda is not None:
        root, is_root = cuda.group_roots(tree.parent, tree.rank, tree.window_tokens, num_groups)
        return (torch.cumsum(is_root, 0) - 1)[root]
    root = torch.where(tree.rank < len(token) - num_groups, tree.parent, token)
    # A chain of parents goes down from token to token of one window.
    for _ in range(min(tree.window_tokens, len(token)).bit_length()):
        root = root[root]
    return (torch.cumsum(root == token, 0) - 1)[root]


def _in_order_of_places(
    groups: torch.Tensor, num_groups: int, per_frame: int, window_tokens: int
) -> torch.Tensor:
    """Return the groups (N,) int64 numbered by picture, then by the place of their middle member.

    A window is one picture while its rows are hardly more than the places of a frame, on average
    over the video. With more rows it is several, of equally many frames. At K = N tokens stay as
    they are. A token's place is its number in its frame. The middle member is the lower median of a
    group's members by place, and of one place by frame. Groups of one picture and place keep their
    order. No host synchronization.

    Args:
        groups: (N,) int64 in 0..K-1, none of them empty.
        num_groups: K.
        per_frame: P, the places of a frame.
        window_tokens: tokens of a window. Lower groups have lower windows.
    """
    num_tokens = len(groups)
    if num_groups == num_tokens:
        return groups
    window_frames = max(1, window_tokens // per_frame)
    # K is rounded up: a quarter of 4 frames may be a row more than one frame has places.
    surplus = num_groups - math.ceil(num_tokens / window_tokens)
    num_pictures = max(1, math.ceil(surplus * window_frames / num_tokens))
    picture_tokens = math.ceil(window_frames / num_pictures) * per_frame

    place = torch.arange(num_tokens, device=groups.device) % per_frame
    by_place = torch.argsort(groups * per_frame + place, stable=True)
    count = sizes(groups, num_groups)
    middle = by_place[torch.cumsum(count, 0) - count + (count - 1) // 2]
    picture = middle // window_tokens * num_pictures + middle % window_tokens // picture_tokens
    order = torch.argsort(picture * per_frame + middle % per_frame, stable=True)
    number = torch.empty_like(order)
    number[order] = torch.arange(num_groups, device=order.device)
    return number[groups]


def _window_tokens(num_frames: int, per_frame: int, window_frames: int) -> int:
    """Return the tokens of a window."""
    if per_frame > MAX_WINDOW_TOKENS:
        num_parts = -(-per_frame // MAX_WINDOW_TOKENS)
        return -(-per_frame // num_parts)
    return min(num_frames, window_frames, MAX_WINDOW_TOKENS // per_frame) * per_frame


def _cuda_kernels(device: torch.device) -> ModuleType | None:
    """Return the kernels for a CUDA device, None where this module's code is to run."""
    if device.type != "cuda":
        return None
    try:
        from scissor_vllm.compression.cuda import linkage as cuda_linkage
    except ImportError:
        # Without Triton the code here runs on the GPU too.
        return None
    return cuda_linkage


def _join_windows(
    rows: torch.Tensor, size: int, ward_exponent: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return parent and height of rows (N, D) float32, in windows of so many rows."""
    parents, heights = [], []
    for window, first in zip(rows.split(size), itertools.count(0, size), strict=False):
        parent, height = _join(distances(window), ward_exponent)
        parents.append(parent + first)
        heights.append(height)
    return torch.cat(parents), torch.cat(heights)


def distances(rows: torch.Tensor) -> torch.Tensor:
    """Return 1 - cosine of all pairs of rows (n, D) float32, as multiples of 2^-24, (n, n).

    Symmetric. The distance of two zero rows is 0, of a zero row and another 1.
    """
    units, scale = unit_integers(rows)
    zero = scale == 0
    distance = torch.empty(len(rows), len(rows), dtype=torch.float32, device=rows.device)
    for start in range(0, len(rows), _BLOCK_ROWS):
        part = slice(start, start + _BLOCK_ROWS)
        product = units[part] @ units[start:].T
        cosine = product.mul_(scale[part, None] * scale[start:])
        grid = cosine.mul_(2.0**DISTANCE_BITS).round_().neg_().add_(2.0**DISTANCE_BITS)
        block = grid.clamp_(min=0.0).mul_(2.0**-DISTANCE_BITS).float()
        distance[part, start:] = block
        distance[start:, part] = block.T
    distance[zero[:, None] & zero] = 0.0
    return distance


def unit_integers(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows' unit vectors as integers, and one over their lengths, 0 for a zero row.

    A cosine is the integers' product times both scales. The products are exact in float64.

    Args:
        rows: (n, D) floating, finite.

    Returns:
        (n, D) and (n,) float64.
    """
    exact = rows.double()
    norm = torch.linalg.vector_norm(exact, dim=1, keepdim=True)
    units = (exact * (2.0**UNIT_BITS / torch.where(norm > 0, norm, 1.0))).round_()
    square = units.square().sum(dim=1)
    return units, torch.where(square > 0, 1.0 / square.sqrt(), 0.0)


def _copies(distance: torch.Tensor) -> torch.Tensor:
    """Return the first token of each token's copies, (n,) int64."""
    first = (distance <= COPY).to(torch.uint8).argmax(dim=1)
    for _ in range(len(first).bit_length()):
        first = first[first]
    return first


def _join(distance: torch.Tensor, ward_exponent: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return parent (n,) int64 and height (n,) float32 of one window's tokens, on their device.

    The rounds run on the host, in NumPy: most are small, and PyTorch takes several times longer
    for small operations.
    """
    copy_of = _copies(distance)
    parent = copy_of.numpy(force=True).copy()
    count = np.bincount(parent, minlength=len(parent))
    height = np.where(parent < np.arange(len(parent)), 0.0, np.inf).astype(np.float32)
    groups = _Groups(distance.numpy(force=True), count, ward_exponent)
    while groups.num > 1:
        left, right, at = groups.join_nearest()
        parent[right], height[right] = left, at
    device = distance.device
    return torch.from_numpy(parent).to(device), torch.from_numpy(height).to(device)


class _Groups:
    """The groups of a window, and the sums of distances between them.

    It keeps the nearest group of every group, and the height of the second nearest as a bound.
    Joining two groups brings neither nearer to a third, so a bound holds until it is renewed.
    """

    def __init__(self, distance: Floats, count: Integers, ward_exponent: float) -> None:
        """Take one group for each token of a count above 0, which is its number of copies.

        Args:
            distance: (n, n) float32. It may be overwritten.
            count: (n,) int64.
            ward_exponent: in [0, 1].
        """
        weights = pair_weights(ward_exponent, torch.device("cpu"))
        self._single, self._together = weights.single.numpy(), weights.together.numpy()
        self._is_average = weights.is_average
        self._id = np.flatnonzero(count)
        self._size = count[self._id]
        self.num = len(self._id)
        if self.num < len(count):
            distance = distance[np.ix_(self._id, self._id)]
            distance *= np.multiply.outer(self._size, self._size).astype(np.float32)
        # A group is infinitely far from itself and from what is no group any more.
        np.fill_diagonal(distance, np.inf)
        self._sums = distance
        self._is_group = np.ones(self.num, dtype=bool)
        self._nearest = np.zeros(self.num, dtype=np.int64)
        self._least = np.zeros(self.num, dtype=np.float32)
        self._others_least = np.zeros(self.num, dtype=np.float32)
        self._find_nearest(np.arange(self.num))

    def join_nearest(self) -> tuple[Integers, Integers, Floats]:
        """Join all pairs that are each other's nearest; return lower and higher token, height."""
        place = np.arange(len(self._id))
        mutual = self._is_group & (self._nearest[self._nearest] == place)
        left = np.flatnonzero(mutual & (place < self._nearest))
        if len(left) == 0:
            # Rounding let a pair's height fall below what was its least: renew all.
            self._find_nearest(np.flatnonzero(self._is_group))
            return left, left, self._least[left]
        right = self._nearest[left]
        joined = self._id[left], self._id[right], self._least[left]
        self._add_up(left, right)
        self._size[left] += self._size[right]
        self._is_group[right] = False
        self.num -= len(left)
        self._follow_nearest(np.flatnonzero(self._is_group & ~mutual & mutual[self._nearest]))
        stale = self._is_group & (self._least >= self._others_least)
        stale[left] = True
        if 2 * self.num < len(self._id):
            stale = self._without_joined(stale)
        self._find_nearest(np.flatnonzero(stale))
        return joined

    def _add_up(self, left: Integers, right: Integers) -> None:
        """Add the sums of the right groups to those of the left ones.

        Between two new groups the lower one's rows are added first, so the sums stay symmetric.
        """
        rows = self._sums[left] + self._sums[right]
        both = rows[:, left] + rows[:, right]
        rows[:, left] = np.where(np.tri(len(left), k=-1, dtype=bool), both.T, both)
        rows[:, right] = np.inf
        self._sums[left] = rows
        self._sums[:, left] = rows.T
        self._sums[:, right] = np.inf

    def _follow_nearest(self, rows: Integers) -> None:
        """Replace the nearest group of some groups, which was joined, by what it was joined to."""
        nearest = self._nearest[rows]
        nearest = np.where(self._is_group[nearest], nearest, self._nearest[nearest])
        self._nearest[rows] = nearest
        factors = self._factors(self._size[rows], self._size[nearest])
        self._least[rows] = self._sums[rows, nearest] * factors

    def _without_joined(self, stale: Mask) -> Mask:
        """Drop what is no group any more; return what is left of a mask."""
        kept = np.flatnonzero(self._is_group)
        place = np.cumsum(self._is_group) - 1
        self._nearest = place[self._nearest[kept]]
        self._id, self._size, self._least = self._id[kept], self._size[kept], self._least[kept]
        self._others_least = self._others_least[kept]
        self._sums = self._sums[np.ix_(kept, kept)]
        self._is_group = self._is_group[kept]
        return stale[kept]

    def _find_nearest(self, rows: Integers) -> None:
        """Find the nearest group of some groups.

        Of equally near groups it is the one whose token number differs from the group's own in the
        lowest bits. Groups that are all equally near so join in pairs, not one by one.
        """
        heights = self._sums[rows]
        heights *= self._factors(self._size[rows, None], self._size)
        turn = np.arange(len(rows))
        nearest = heights.argmin(axis=1)
        least = heights[turn, nearest]
        heights[turn, nearest] = np.inf
        others_least = heights.min(axis=1)
        tied = np.flatnonzero((others_least == least) & (least < np.inf))
        if len(tied):
            heights[tied, nearest[tied]] = least[tied]
            apart = self._id[rows[tied], None] ^ self._id
            apart[heights[tied] > least[tied, None]] = 1 << INDEX_BITS
            nearest[tied] = apart.argmin(axis=1)
        self._nearest[rows] = nearest
        self._least[rows] = least
        self._others_least[rows] = others_least

    def _factors(self, size: Integers, other: Integers) -> Floats:
        """Return what makes heights of sums of distances, for pairs of groups of these sizes."""
        factors: Floats = self._single[size] * self._single[other]
        return factors if self._is_average else factors * self._together[size + other]


@dataclass(frozen=True)
class PairWeights:
    """What makes a pair's height of its sum of distances, from tables by number of tokens.

    All devices take the same tables: their own powers differ in last bits.
    """

    single: torch.Tensor
    """(sizes,) float32: n ** (exponent - 1), a factor for either group."""
    together: torch.Tensor
    """(sizes,) float32: n ** -exponent, a factor for both together."""
    is_average: bool
    """Whether the factors for both are all 1."""


@functools.cache
def pair_weights(ward_exponent: float, device: torch.device) -> PairWeights:
    """Return the weights of an exponent."""
    number = torch.arange(2 * MAX_WINDOW_TOKENS + 1, dtype=torch.float64, device="cpu").clamp(min=1)
    single, together = number.pow(ward_exponent - 1), number.pow(-ward_exponent)
    return PairWeights(single.float().to(device), together.float().to(device), ward_exponent == 0)
