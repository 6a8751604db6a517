"""Coverage of a data set by a subset: greedy maximisation of a facility-location function on a graph."""

import functools
import heapq
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curation.checks import check_integer
from curation.compiled import compiled
from curation.instances.graph import Graph


def cover(graph: Graph, weights: Tensor, m: int) -> tuple[np.ndarray, np.ndarray]:
    """The ``m`` samples that cover all samples best, in the order of their choice.

    Maximises ``sum_i w_i max_j s_ij`` over the chosen ``j``, where a sample covers itself and its neighbours in the
    graph as far as they are similar, ``s_ij`` of :meth:`~curation.instances.graph.Graph.similarities`. The greedy
    choice is within ``1 - 1/e`` of the best (Nemhauser et al. 1978), and exact here: gains only fall, so an old one
    is a bound (Minoux 1978). ``O(N k)`` memory and about as much time.

    Args:
        graph: Graph of ``N`` samples.
        weights: Floating ``[N]``, >= 0, the weight of covering each sample.
        m: Number of samples to choose, in [0, N].

    Returns:
        The samples, int64 ``[m]``, and their gains, fp64 ``[m]``, which fall.

    Raises:
        ImportError: If numba is missing.
        ValueError: If ``m`` is not an integer in [0, N], the graph names samples that it does not have, or the
            weights are not ``[N]`` finite numbers >= 0.

    Example:
        >>> far = torch.inf
        >>> line = Graph(torch.tensor([[1, -1], [0, 2], [1, -1]]), torch.tensor([[1, far], [1, 1], [1, far]]))
        >>> cover(line, torch.ones(3), 1)[0].tolist()
        [1]
    """
    return cover_and_count(graph, weights, m)[:2]


def cover_and_count(graph: Graph, weights: Tensor, m: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As :func:`cover`, and what each choice stands for: the weight of the samples that it covers best, itself too.

    Of equal similarities that of the first choice counts. A sample that no choice covers is not counted.

    Returns:
        The samples, int64 ``[m]``, their gains, fp64 ``[m]``, and what they stand for, fp64 ``[m]``.

    Example:
        >>> far = torch.inf
        >>> line = Graph(torch.tensor([[1, -1], [0, 2], [1, -1]]), torch.tensor([[1, far], [1, 1], [1, far]]))
        >>> cover_and_count(line, torch.ones(3), 2)[2].tolist()
        [2.0, 1.0]
    """
    n = len(graph.ids)
    check_integer("m", m, 0, n + 1)
    if graph.distances.shape != graph.ids.shape or (
        graph.ids.numel() and not -1 <= graph.ids.min() <= graph.ids.max() < n
    ):
        raise ValueError(f"Argument `graph` must have neighbours in [-1, {n}) and as many distances, but has not.")
    if weights.shape != (n,) or not ((weights >= 0) & (weights < torch.inf)).all():
        raise ValueError(f"Argument `weights` must be [{n}] finite numbers >= 0, but got {weights}.")
    chosen, gains, owners = np.empty(m, np.int64), np.empty(m), np.full(n, -1)
    of = weights.to(torch.float64).cpu().numpy()
    _greedy()(graph.ids.cpu().numpy(), graph.similarities().cpu().numpy(), of, chosen, gains, owners)
    owned = owners >= 0
    return chosen, gains, np.bincount(owners[owned], of[owned], minlength=m)


def _cover(ids: Any, similarities: Any, weights: Any, chosen: Any, gains: Any, owners: Any) -> None:
    covered = np.zeros(len(ids))

    def gain(j):  # type: ignore[no-untyped-def]
        total = weights[j] * (1 - covered[j])
        for e in range(ids.shape[1]):
            i = ids[j, e]
            if i >= 0 and similarities[j, e] > covered[i]:
                total += weights[i] * (similarities[j, e] - covered[i])
        return total

    heap = [(-gain(j), j) for j in range(len(ids))]
    heapq.heapify(heap)
    for step in range(len(chosen)):
        while True:
            _, j = heapq.heappop(heap)
            entry = (-gain(j), j)
            if len(heap) == 0 or entry <= heap[0]:
                break
            heapq.heappush(heap, entry)
        chosen[step], gains[step] = j, -entry[0]
        covered[j], owners[j] = 1, step
        for e in range(ids.shape[1]):
            if ids[j, e] >= 0 and similarities[j, e] > covered[ids[j, e]]:
                covered[ids[j, e]], owners[ids[j, e]] = similarities[j, e], step


@functools.cache
def _greedy() -> Callable[..., Any]:
    try:
        return compiled(_cover)
    except ImportError as error:
        raise ImportError("Coverage needs numba: `pip install 'lightning-curation[select]'`.") from error
