"""Orders that put near samples side by side: hierarchical hashing by random projections (arXiv 2502.20293).

A hash of ``b`` bits splits the samples ``b`` times in two by the sign of a random projection, here less its median
within each part. So the ``2^b`` buckets are equally full whatever the data, duplicates and constants included, a
shorter hash is a prefix of a longer one, and all buckets fit one batched product. Costs ``O(N (D + log N) b)``.
"""

import math

import torch
from torch import Tensor

from curation.instances.graph import Graph, group_neighbours


def bits(n: int, capacity: int) -> int:
    """The length of the hash that leaves at most ``capacity`` of ``n`` samples in a bucket.

    Example:
        >>> bits(1000, 256)
        2
    """
    return max(0, math.ceil(math.log2(n / capacity)))


def buckets(x: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """The buckets of one hash: int64 ``[2^length, S]``, every sample once, -1 for empty places.

    Buckets that share their first bits are neighbours, so the rows flattened are an order of all samples by locality.

    Args:
        x: Floating ``[N, D]``.
        length: Bits, with ``2^length <= N``.
        generator: Generator of the projections, on the CPU, so that all devices have the same projections.
    """
    n, width = len(x), -(-len(x) // 2**length)
    directions = torch.randn(x.shape[1], max(length, 1), generator=generator).to(x)
    projected = torch.cat([x @ directions, x.new_full((1, max(length, 1)), torch.inf)])  # empty places come last
    order = torch.nn.functional.pad(torch.arange(n, device=x.device), (0, width * 2**length - n), value=-1)
    for bit in range(length):
        parts = order.view(2**bit, -1)
        order = parts.gather(1, projected[:, bit][parts].argsort(dim=1, stable=True)).flatten()
    return order.view(2**length, width)


def single_level(x: Tensor, k: int, capacity: int, generator: torch.Generator) -> Graph:
    """The nearest ``k`` in the bucket of one hash."""
    return group_neighbours(x, buckets(x, bits(len(x), capacity), generator), k)


def multi_view(x: Tensor, k: int, views: int, capacity: int, generator: torch.Generator) -> Graph:
    """The nearest ``k`` in the union of the buckets of ``views`` independent hashes."""
    graph = single_level(x, k, capacity, generator)
    for _ in range(views - 1):
        graph = group_neighbours(x, buckets(x, bits(len(x), capacity), generator), k, graph)
    return graph


def multi_level(x: Tensor, k: int, capacity: int, generator: torch.Generator, levels: int = 3) -> Graph:
    """The ``k`` most alike by ``sum_l 2^l [h_l equal]``, of hashes ``h_l`` each a bit longer than the one before.

    Candidates are the nearest ``k`` of each level, and distances break ties.
    """
    shortest = bits(len(x), capacity)
    lengths = [length for length in range(shortest, shortest + levels) if 2**length <= len(x)]
    ids: list[Tensor] = []
    distances, hashes = [], []
    for length in lengths:
        groups = buckets(x, length, generator)
        graph = group_neighbours(x, groups, k)
        seen = torch.zeros_like(graph.ids, dtype=torch.bool)
        for earlier in ids:
            seen |= (graph.ids[:, :, None] == earlier[:, None]).any(2)
        ids.append(graph.ids.masked_fill(seen, -1))
        distances.append(graph.distances.masked_fill(seen, torch.inf))
        bucket = torch.empty(len(x), dtype=torch.int64, device=x.device)
        numbers = torch.arange(len(groups), device=x.device)[:, None].expand_as(groups)
        bucket[groups[groups >= 0]] = numbers[groups >= 0]
        hashes.append(bucket)
    candidates, near_distances = torch.cat(ids, 1), torch.cat(distances, 1)
    alike = sum(2**level * (h[candidates.clamp(min=0)] == h[:, None]) for level, h in enumerate(hashes))
    by_distance = near_distances.argsort(dim=1, stable=True)
    alike = torch.where(candidates < 0, -1, alike).gather(1, by_distance)
    best = by_distance.gather(1, alike.argsort(dim=1, descending=True, stable=True)[:, :k])
    distances_of_best, order = near_distances.gather(1, best).sort(dim=1, stable=True)
    return Graph(candidates.gather(1, best.gather(1, order)), distances_of_best)
