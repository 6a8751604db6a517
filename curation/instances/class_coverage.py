"""Coverage of each class of a data set by its own samples."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from curation.instances import hashing
from curation.instances.coverage import cover_and_count

CAPACITY = 256  # samples of a hash bucket at most


class Covered(NamedTuple):
    """What covers the classes.

    Attributes:
        order: int64 ``[n]``, the samples that stay, best first.
        gains: fp32 ``[N]``, 0 for samples that do not stay.
        stand_for: fp64 ``[n]``, the weight of the samples that each of the order covers best.
    """

    order: np.ndarray
    gains: np.ndarray
    stand_for: np.ndarray


def cover_classes(
    x: Tensor, y: np.ndarray, weights: Tensor, budgets: np.ndarray, seed: int, n_neighbors: int, n_views: int
) -> Covered:
    """:func:`~curation.instances.coverage.cover` of each class by its samples.

    Copies of a sample count as one of their common weight: a graph of few neighbours cannot cover many copies. They
    stay when all samples that differ do, second copies before third ones, and stand for nothing.

    Args:
        x: fp32 ``[N, D]``.
        y: int64 classes ``[N]``.
        weights: Floating ``[N]``, >= 0.
        budgets: int64 ``[C]``, how many samples of each class stay.
        seed: Seed of the hashing; class ``c`` has ``seed + c``.
        n_neighbors: Neighbours in the graph.
        n_views: Number of independent hashes.
    """
    gains, order_of, counts = np.zeros(len(x), np.float32), [], []
    for c, m in enumerate(budgets):
        rows = np.flatnonzero(y == c)
        if not m or not len(rows):
            order_of.append(rows[:0])
            continue
        generator = torch.Generator().manual_seed(seed + c)
        points = x if len(rows) == len(x) else x[torch.from_numpy(rows).to(x.device)]
        share = weights[rows]
        point_of, copy = copies_of(points)
        first = np.flatnonzero(copy == 0)
        if len(first) < len(rows):
            points = points[torch.from_numpy(first).to(x.device)]
            share = torch.zeros(len(first), dtype=share.dtype).index_add_(0, torch.from_numpy(point_of), share.cpu())
        graph = hashing.multi_view(points, n_neighbors, n_views, CAPACITY, generator)
        chosen, gain, stand_for = cover_and_count(graph, share, min(m, len(first)))
        gains[rows[first[chosen]]] = gain
        copies = np.argsort(copy, kind="stable")[len(first) :][: m - len(chosen)]
        order_of.append(rows[np.concatenate([first[chosen], copies])])
        counts += [stand_for, np.zeros(len(copies))]
    mixed = mixture(list(map(len, order_of)))
    return Covered(np.concatenate(order_of)[mixed], gains, np.concatenate([np.zeros(0), *counts])[mixed])


def mixture(sizes: Sequence[int] | np.ndarray) -> np.ndarray:
    """An order of what stands class after class, in which every prefix has the classes in the same proportions.

    Args:
        sizes: Number of samples of each class.

    Example:
        >>> mixture([4, 2]).tolist()
        [0, 4, 1, 2, 5, 3]
    """
    return np.concatenate([(np.arange(m) + 0.5) / m for m in sizes]).argsort(kind="stable")


def reach(budget: float) -> int:
    """Number of neighbours of a covering graph: about the samples per sample that stays."""
    return round(min(max(1 / budget, 10), 25))


def copies_of(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The point of each sample, and the number of the earlier samples at this point: int64 ``[N]`` both.

    Points are numbered by their first samples. Equal rows are found by a hash of their bits, then compared.

    Args:
        x: fp32 ``[N, D]``.
    """
    words = (x + 0.0).view(torch.int32)  # one zero
    hashes = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    for word in words.unbind(1):
        hashes = (hashes ^ word) * -7046029254386353131  # 2^64 over the golden ratio
        hashes ^= (hashes >> 32) & 0xFFFFFFFF
    _, first, group = np.unique(hashes.cpu().numpy(), return_index=True, return_inverse=True)
    if len(first) == len(x):
        return np.arange(len(x)), np.zeros(len(x), np.int64)
    same = (words == words[torch.from_numpy(first[group]).to(x.device)]).all(1).cpu().numpy()
    group = np.where(same, first[group], np.arange(len(x)))  # two points of one hash are no copies
    order = np.argsort(group, kind="stable")
    starts, point_of = np.unique(group[order], return_index=True)[1], np.unique(group, return_inverse=True)[1]
    copy = np.empty(len(x), np.int64)
    copy[order] = np.arange(len(x)) - starts[point_of[order]]
    return point_of, copy
