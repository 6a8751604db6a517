"""Neighbour lists of a data set: the graphs on which instances are selected.

Every approximate graph is made of groups: an ordering cuts the samples into groups of equal size, and the neighbours
of a sample are the nearest of its group, exactly. What differs is the ordering (:mod:`curation.instances.hashing`, or
chance). It costs ``O(N S D)`` with groups of ``S``, in batched matrix products, on whatever device ``x`` is.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

BLOCK = 2**22  # distances held at a time


@dataclass(frozen=True)
class Graph:
    """The ``k`` neighbours of each sample, nearest first.

    Attributes:
        ids: int64 ``[N, k]``; -1 where there are fewer.
        distances: fp32 ``[N, k]``, squared Euclidean; infinite where there are fewer.
    """

    ids: Tensor
    distances: Tensor

    def to(self, device: torch.device | str) -> "Graph":
        """The same on another device."""
        return Graph(self.ids.to(device), self.distances.to(device))

    def similarities(self) -> Tensor:
        """``exp(-d / mean d)`` of the squared distances ``d``: fp32 ``[N, k]``, 0 for no neighbour."""
        known = self.ids >= 0
        total = torch.where(known, self.distances, 0).sum()
        return torch.exp(-self.distances / (total / known.sum().clamp(min=1)).clamp(min=1e-12)) * known

    def closest(self, quantile: float) -> "Graph":
        """Without the edges that are longer than this quantile of all."""
        lengths = self.distances[self.ids >= 0].sort().values
        if not len(lengths):
            return self
        far = self.distances > lengths[round(quantile * (len(lengths) - 1))]
        return Graph(self.ids.masked_fill(far, -1), self.distances.masked_fill(far, torch.inf))

    def homophily(self, y: Tensor) -> Tensor:
        """The share of the neighbours that are of the sample's class ``y``, int64 ``[N]``."""
        known = self.ids >= 0
        same = (y[self.ids.clamp(min=0)] == y[:, None]) & known
        return same.sum() / known.sum().clamp(min=1)


def group_neighbours(x: Tensor, groups: Tensor, k: int) -> Graph:
    """The nearest ``k`` of the same group, by exact distances.

    Args:
        x: Floating ``[N, D]``.
        groups: int64 ``[G, S]``, every sample once; -1 for an empty place.
        k: Neighbours at most; a sample is none of its own.
    """
    n, size = len(x), groups.shape[1]
    kept = min(k, size - 1)
    ids = torch.full((n + 1, k), -1, device=x.device)  # one row more, for the empty places
    distances = torch.full((n + 1, k), torch.inf, device=x.device)
    itself = torch.eye(size, dtype=torch.bool, device=x.device)
    for part in groups.split(max(1, BLOCK // size**2)) if kept else []:
        empty = part < 0
        rows = x[part.clamp(min=0)]
        squares = rows.square().sum(-1)
        near = torch.baddbmm(squares[:, None], rows, rows.mT, alpha=-2)  # less the square of the row's own sample
        near.masked_fill_(itself, torch.inf)
        near.masked_fill_(empty[:, None], torch.inf)
        found, places = near.topk(kept, largest=False)
        neighbours = part.gather(1, places.flatten(1)).view_as(places)
        neighbours.masked_fill_(found.isinf(), -1)
        to = part.where(~empty, n)
        ids[to, :kept] = neighbours
        distances[to, :kept] = (found + squares[..., None]).clamp_(min=0)
    return Graph(ids[:n], distances[:n])


def nearest_of(one: Graph, other: Graph) -> Graph:
    """The nearest ``k`` of the neighbours in either graph, each once."""
    k = one.ids.shape[1]
    twice = (other.ids[:, :, None] == one.ids[:, None]).any(2)
    distances, places = torch.cat([one.distances, other.distances.masked_fill(twice, torch.inf)], 1).topk(
        k, largest=False
    )
    return Graph(torch.cat([one.ids, other.ids.masked_fill(twice, -1)], 1).gather(1, places), distances)


def cut(order: Tensor, size: int) -> Tensor:
    """An order ``[N]`` in groups ``[G, S]`` of at most ``size``, as equal as they can be; -1 for empty places.

    Example:
        >>> cut(torch.arange(5), 3)
        tensor([[ 0,  1,  2],
                [ 3,  4, -1]])
    """
    groups = -(-len(order) // size)
    width = -(-len(order) // groups)
    return torch.nn.functional.pad(order, (0, groups * width - len(order)), value=-1).view(groups, width)


def by_class(y: Tensor, generator: torch.Generator) -> Tensor:
    """All samples, one class ``y`` int64 ``[N]`` after the other and shuffled in each: int64 ``[N]``.

    Dealt out like cards, every hand has the classes in the same proportions. The generator is on the CPU.
    """
    shuffled = torch.randperm(len(y), generator=generator).to(y.device)
    return shuffled[y[shuffled].argsort(stable=True)]


def mini_batch(
    x: Tensor,
    y: Tensor,
    k: int,
    size: int,
    generator: torch.Generator,
) -> Graph:
    """The nearest ``k`` in a random batch that has every class as often as the data set (arXiv 2502.20293).

    Args:
        x: Floating ``[N, D]``.
        y: int64 classes ``[N]``.
        k: Neighbours at most.
        size: Of a batch.
        generator: Of the order, on the CPU.
    """
    of_class = by_class(y, generator)
    batches = -(-len(x) // size)
    width = -(-len(x) // batches)
    order = torch.nn.functional.pad(of_class, (0, batches * width - len(x)), value=-1)
    return group_neighbours(x, order.view(width, batches).T, k)


def faiss_graph(x: Tensor, k: int, index: Any) -> Graph:
    """The nearest ``k`` by an index of faiss, on the CPU.

    Args:
        x: Floating ``[N, D]``.
        k: Neighbours, at most ``N - 1``.
        index: A new index, by Euclidean distance.
    """
    points = x.float().cpu().numpy()
    index.add(points)
    distances, ids = index.search(points, k + 1)
    itself = ids == np.arange(len(points))[:, None]
    itself[~itself.any(1), -1] = True  # among duplicates it may be missing; then the last goes
    rest = np.where(itself, np.inf, distances).argsort(1, kind="stable")[:, :k]
    found = np.take_along_axis(ids, rest, 1)
    near = np.where(found < 0, np.inf, np.take_along_axis(distances, rest, 1)).astype(np.float32)
    return Graph(torch.from_numpy(found).to(x.device), torch.from_numpy(near).clamp_(min=0).to(x.device))


def exact(x: Tensor, k: int) -> Graph:
    """The nearest ``k`` of all, in ``O(N^2 D)``: the reference. Needs faiss."""
    return faiss_graph(x, k, _faiss().IndexFlatL2(x.shape[1]))


def hierarchical_small_world(x: Tensor, k: int) -> Graph:
    """The nearest ``k`` by a hierarchical navigable small world graph of 16 links (arXiv 1603.09320). Needs faiss."""
    return faiss_graph(x, k, _faiss().IndexHNSWFlat(x.shape[1], 16))


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ImportError("This graph needs faiss: `pip install 'lightning-curation[select]'`.") from error
    return faiss
