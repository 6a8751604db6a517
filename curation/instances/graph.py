"""Graphs of nearest neighbours, on which instances are selected.

Every approximate graph is made of groups: an ordering cuts the samples into groups of equal size, and the neighbours
of a sample are the nearest of its group, exactly. Graphs differ in the ordering: by hashing
(:mod:`curation.instances.hashing`) or random.

Cost: ``O(N S D)`` with groups of ``S``, in batched matrix products on the device of ``x``.
"""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curation.checks import check_integer, check_number
from curation.compiled import compiled

BLOCK = 2**24  # distances in memory at a time; few blocks, since the threads of torch wait busily after a product


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
        """The graph on another device."""
        return Graph(self.ids.to(device), self.distances.to(device))

    def similarities(self) -> Tensor:
        """``exp(-d / mean d)`` of the squared distances ``d``: fp32 ``[N, k]``, 0 for no neighbour."""
        present = self.ids >= 0
        total = torch.where(present, self.distances, 0).sum()
        return torch.exp(-self.distances / (total / present.sum().clamp(min=1)).clamp(min=1e-12)) * present

    def closest(self, quantile: float) -> "Graph":
        """The graph without the edges that are longer than a quantile, in (0, 1], of all edges."""
        check_number("quantile", quantile, "(0, 1]")
        lengths = self.distances[self.ids >= 0].sort().values
        if not len(lengths):
            return self
        long = self.distances > lengths[round(quantile * (len(lengths) - 1))]
        return Graph(self.ids.masked_fill(long, -1), self.distances.masked_fill(long, torch.inf))

    def homophily(self, y: Tensor) -> Tensor:
        """Fraction of the edges between samples of one class, a scalar, for classes ``y`` int64 ``[N]``."""
        present = self.ids >= 0
        of_class = (y[self.ids.clamp(min=0)] == y[:, None]) & present
        return of_class.sum() / present.sum().clamp(min=1)


def group_neighbours(x: Tensor, groups: Tensor, k: int, graph: Graph | None = None) -> Graph:
    """The nearest ``k`` samples of the same group, or of the neighbours in a graph, by exact distances.

    Args:
        x: Floating ``[N, D]``.
        groups: int64 ``[G, S]``, every sample once; -1 for an empty place.
        k: Most neighbours of a sample, >= 0; a sample is no neighbour of itself.
        graph: Neighbours that are known, ``[N, k]``; None for none.
    """
    check_integer("k", k, 0)
    n, size = len(x), groups.shape[1]
    kept = min(k, size - 1)
    if graph is None:
        ids, distances = torch.full((n, k), -1, device=x.device), torch.full((n, k), torch.inf, device=x.device)
    else:
        ids, distances = graph.ids.clone(), graph.distances.clone()
    insert = _insertion() if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) else _insert_sorted
    for part in groups.split(max(1, BLOCK // size**2)) if kept else []:
        empty = part < 0
        rows = _centred(x[part.clamp(min=0)], ~empty)
        squares = rows.square().sum(-1)
        partial = torch.baddbmm(squares[:, None], rows, rows.mT, alpha=-2)  # without the square of the row's sample
        if x.device.type != "cpu" or empty.any():
            partial.masked_fill_(empty[:, None], torch.inf)
        insert(partial, squares, part, ids, distances)
    return Graph(ids, distances)


def _insert_sorted(partial: Tensor, squares: Tensor, part: Tensor, ids: Tensor, distances: Tensor) -> None:
    """Enter the samples of groups into the lists of their neighbours, on any device.

    Args:
        partial: Squared distances ``[G, S, S]`` without the square of the row's sample; infinite to empty places.
        squares: The squares ``[G, S]``.
        part: The samples ``[G, S]``; -1 for an empty place.
        ids: ``[N, k]``, neighbours so far; changed in place.
        distances: ``[N, k]``, their squared distances, in ascending order; changed in place.
    """
    empty, size, k = part < 0, part.shape[1], ids.shape[1]
    partial.masked_fill_(torch.eye(size, dtype=torch.bool, device=part.device), torch.inf)
    nearest, places = partial.topk(min(k, size - 1), largest=False)
    neighbours = part.gather(1, places.flatten(1)).view_as(places).masked_fill_(nearest.isinf(), -1)
    there, samples = ~empty, part[~empty]
    found = Graph(neighbours[there], (nearest + squares[..., None]).clamp_(min=0)[there].to(distances.dtype))
    best = nearest_of(Graph(ids[samples], distances[samples]), found)
    ids[samples], distances[samples] = best.ids, best.distances


@functools.cache
def _insertion() -> Callable[..., None]:
    """As :func:`_insert_sorted`, by a compiled loop where numba is installed: several times as fast on a CPU."""
    try:
        insert = compiled(_insert)
    except ImportError:
        return _insert_sorted

    def threaded(partial: Tensor, squares: Tensor, part: Tensor, ids: Tensor, distances: Tensor) -> None:
        lists = ids.numpy(), distances.numpy()  # of samples that stand in one group only
        threads = min(torch.get_num_threads(), len(part))
        cuts = zip(*(values.tensor_split(threads) for values in (partial, squares, part)), strict=True)
        if threads == 1:
            insert(partial.numpy(), squares.numpy(), part.numpy(), *lists)
            return
        with ThreadPoolExecutor(threads) as pool:
            for done in [pool.submit(insert, *(values.numpy() for values in cut), *lists) for cut in cuts]:
                done.result()

    return threaded


def _insert(partial: Any, squares: Any, part: Any, ids: Any, distances: Any) -> None:
    size, last, lanes = part.shape[1], ids.shape[1] - 1, 16
    while lanes < 1.5 * last:
        lanes *= 2
    least, picked = np.empty(lanes, partial.dtype), np.empty(size, np.int64)
    for g in range(part.shape[0]):
        for i in range(size):
            sample, square, row = part[g, i], squares[g, i], partial[g, i]
            if sample < 0:
                continue
            near, lengths = ids[sample], distances[sample]
            row[i] = np.inf
            # What is farther than the k-th so far, or than the k-th of the least of as many parts, is passed over.
            bound = lengths[last] - square + (abs(lengths[last]) + abs(square)) * np.float32(1e-6)  # it is rounded
            if size >= 2 * lanes:
                least[:] = np.inf
                for start in range(0, size - lanes + 1, lanes):
                    for lane in range(lanes):
                        least[lane] = min(least[lane], row[start + lane])
                for a in range(1, lanes):
                    value, b = least[a], a
                    while b > 0 and least[b - 1] > value:
                        least[b] = least[b - 1]
                        b -= 1
                    least[b] = value
                bound = min(bound, least[last])
            count = 0
            for j in range(size):
                picked[count] = j
                count += row[j] <= bound
            for j in picked[:count]:
                distance, other = max(row[j] + square, np.float32(0)), part[g, j]
                if not distance < lengths[last]:
                    continue
                known = False
                for e in range(last + 1):
                    known |= near[e] == other
                if known:
                    continue
                e = last
                while e > 0 and lengths[e - 1] > distance:
                    near[e], lengths[e] = near[e - 1], lengths[e - 1]
                    e -= 1
                near[e], lengths[e] = other, distance


def _centred(rows: Tensor, present: Tensor) -> Tensor:
    """Groups ``[G, S, D]``, less their means where these are so large that squares would cancel in the distances."""
    counts = present.sum(1)[:, None, None].clamp(min=1)
    shown = rows * present[..., None]
    centre = shown.sum(1, keepdim=True) / counts
    spread = shown.square().sum((1, 2), keepdim=True) / counts - centre.square().sum(2, keepdim=True)
    return rows - centre * (centre.square().sum(2, keepdim=True) > 100 * spread)


def nearest_of(a: Graph, b: Graph) -> Graph:
    """The nearest ``k`` of the neighbours in either graph, each once."""
    k = a.ids.shape[1]
    repeated = (b.ids[:, :, None] == a.ids[:, None]).any(2)
    distances, places = torch.cat([a.distances, b.distances.masked_fill(repeated, torch.inf)], 1).topk(
        k, largest=False
    )
    return Graph(torch.cat([a.ids, b.ids.masked_fill(repeated, -1)], 1).gather(1, places), distances)


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

    Every ``n``-th sample of it, from any start, has the classes in the same proportions. The generator is on the CPU.
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
        k: Most neighbours of a sample.
        size: Most samples in a batch.
        generator: Generator of the order, on the CPU.
    """
    ordered = by_class(y, generator)
    batches = -(-len(x) // size)
    width = -(-len(x) // batches)
    order = torch.nn.functional.pad(ordered, (0, batches * width - len(x)), value=-1)
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
    itself[~itself.any(1), -1] = True  # among duplicates it may be missing; then the last one is left out
    order = np.where(itself, np.inf, distances).argsort(1, kind="stable")[:, :k]
    neighbours = np.take_along_axis(ids, order, 1)
    lengths = np.where(neighbours < 0, np.inf, np.take_along_axis(distances, order, 1)).astype(np.float32)
    return Graph(torch.from_numpy(neighbours).to(x.device), torch.from_numpy(lengths).clamp_(min=0).to(x.device))


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
