"""Connected components and maximum spanning trees of similarity graphs, vectorised in torch.

Node i of set b has the index ``b * n + i``. The label of a component is its lowest node.
"""

from dataclasses import dataclass

import torch

from scissor_vllm.compression.similarity import Similarity, WindowedSimilarity

AnySimilarity = Similarity | WindowedSimilarity


@dataclass(frozen=True)
class Components:
    """A partition of nodes, its parts numbered in the paper's order."""

    part: torch.Tensor
    """(nodes,) int64: the part of each node."""
    num_parts: int


@dataclass(frozen=True)
class SpanningTrees:
    """The maximum spanning trees, strongest edge first, equal ones by (lower, higher)."""

    weight: torch.Tensor
    """(edges,) float32: cosines, descending."""
    left: torch.Tensor
    """(edges,) int64: the edge's lower node."""
    right: torch.Tensor
    """(edges,) int64: its higher node."""


def threshold_labels(similarity: AnySimilarity, threshold: float) -> torch.Tensor:
    """Return the component of every node where edges are cosines above the threshold.

    (B*n,) int64: the lowest node of the component. One pass over the similarities.
    """
    labels = torch.arange(similarity.num_sets * similarity.size, device=similarity.device)
    for left, right in similarity.pairs_above(threshold):
        labels = _union(labels, left, right)
    return labels


def forest_labels(num_nodes: int, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return the component of every node where the edges are (left, right).

    (num_nodes,) int64: the lowest node of the component.
    """
    return _union(torch.arange(num_nodes, device=left.device), left, right)


def _union(labels: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return labels after joining the components at both ends of every edge."""
    while True:
        label, other_label = labels[left], labels[right]
        apart = label != other_label
        if not apart.any():
            return labels
        left, right, label, other_label = (
            left[apart],
            right[apart],
            label[apart],
            other_label[apart],
        )
        lower = torch.minimum(label, other_label)
        labels = _join(labels, torch.cat([label, other_label]), torch.cat([lower, lower]))


def _join(labels: torch.Tensor, which: torch.Tensor, lower: torch.Tensor) -> torch.Tensor:
    """Return labels after each one in ``which`` was joined to a lower and chains collapsed."""
    parent = labels.scatter_reduce(0, which, lower, "amin")
    while True:
        grandparent = parent[parent]
        if torch.equal(grandparent, parent):
            return parent
        parent = grandparent


def count_components(labels: torch.Tensor) -> int:
    """Return the number of components. One host synchronization."""
    return int((labels == torch.arange(len(labels), device=labels.device)).sum())


def by_lowest_node(labels: torch.Tensor, num_parts: int) -> Components:
    """Return the parts by their lowest node, given their number."""
    is_root = labels == torch.arange(len(labels), device=labels.device)
    return Components((torch.cumsum(is_root, 0) - 1)[labels], num_parts)


def degrees(similarity: AnySimilarity, threshold: float) -> torch.Tensor:
    """Return the number of neighbours of every node, (B*n,) int64."""
    result = torch.empty(
        similarity.num_sets, similarity.size, dtype=torch.int64, device=similarity.device
    )
    for sets, rows, _, cosines in similarity.blocks():
        result[sets, rows] = (cosines > threshold).sum(dim=2)
    return result.view(-1)


def in_order(labels: torch.Tensor, degree: torch.Tensor, num_parts: int) -> Components:
    """Return the parts in the paper's order: by their lowest node among those of highest degree.

    Args:
        labels: (n,) int64, equal for the nodes of a part, in 0..n-1.
        degree: (n,) int64.
        num_parts: how many there are.
    """
    nodes = torch.arange(len(labels), device=labels.device)
    highest = torch.zeros_like(degree).scatter_reduce(0, labels, degree, "amax")
    leads = degree == highest[labels]
    candidate = torch.where(leads, nodes, len(nodes))
    # A label without a part has no lead token and sorts last.
    lead = torch.full_like(nodes, len(nodes)).scatter_reduce(0, labels, candidate, "amin")
    number = torch.empty_like(nodes).scatter(0, torch.argsort(lead, stable=True), nodes)
    return Components(number[labels], num_parts)


def maximum_spanning_trees(similarity: AnySimilarity) -> SpanningTrees:
    """Return the maximum spanning tree of every set, of every window in it, by Boruvka's rounds.

    Edges are ordered by weight, then by their nodes, so the trees are unique and every cut of them
    is that of Kruskal's algorithm. One host synchronization a round, at most log2(n) + 1.
    """
    size, num_nodes = similarity.size, similarity.num_sets * similarity.size
    nodes = torch.arange(num_nodes, device=similarity.device)
    first_of_set = nodes // size * size
    labels = nodes
    no_edge = num_nodes**2
    weights = [torch.empty(0, dtype=torch.float32, device=similarity.device)]
    edges = [nodes[:0]]
    while True:
        weight, neighbor = _strongest_outgoing(similarity, labels)
        neighbor = neighbor + first_of_set
        edge = torch.minimum(nodes, neighbor) * num_nodes + torch.maximum(nodes, neighbor)
        best = torch.full_like(weight, -torch.inf).scatter_reduce(0, labels, weight, "amax")
        growing = (labels == nodes) & (best > -torch.inf)
        if not growing.any():
            break
        tied = torch.where(weight == best[labels], edge, no_edge)
        chosen = torch.full_like(nodes, no_edge).scatter_reduce(0, labels, tied, "amin")
        chosen = torch.where(growing, chosen, nodes * (num_nodes + 1))
        left, right = chosen // num_nodes, chosen % num_nodes
        beyond = labels[left] + labels[right] - nodes
        # Two components may choose the same edge; the lower component keeps it.
        brings = growing & ((chosen[beyond] != chosen) | (nodes < beyond))
        weights.append(torch.where(brings, best, -torch.inf))
        edges.append(torch.where(brings, chosen, no_edge))
        labels = _union(labels, left, right)
    edge, by_node = torch.sort(torch.cat(edges))
    weight, by_weight = torch.sort(torch.cat(weights)[by_node], descending=True, stable=True)
    num_edges = num_nodes - similarity.num_trees
    edge = edge[by_weight][:num_edges]
    return SpanningTrees(weight[:num_edges], edge // num_nodes, edge % num_nodes)


def _strongest_outgoing(
    similarity: AnySimilarity, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each node's strongest edge out of its component: weight, and the node in its set.

    (B*n,) float32 and int64; -inf where a component fills its set or window. Of equal edges the
    first.
    """
    by_set = labels.view(similarity.num_sets, similarity.size)
    weight = torch.empty(by_set.shape, dtype=torch.float32, device=similarity.device)
    neighbor = torch.empty_like(by_set)
    for sets, rows, columns, cosines in similarity.blocks():
        inside = by_set[sets, rows, None] == by_set[sets, None, columns]
        strongest, column = cosines.masked_fill(inside, -torch.inf).max(dim=2)
        weight[sets, rows], neighbor[sets, rows] = strongest, column + columns.start
    return weight.view(-1), neighbor.view(-1)
