"""Samples that are nearly the same and have different labels."""

import numpy as np
import torch

from curation.checks import check_integer, check_number
from curation.instances.hashing import multi_view

CAPACITY, VIEWS = 256, 4  # of the graph


def conflicting_pairs(
    features: np.ndarray, labels: np.ndarray, neighbours: int = 5, quantile: float = 0.01, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Near-duplicates with different labels, the nearest first.

    Near are the shortest edges of the graph of nearest neighbours by hashing
    (:func:`~curation.instances.hashing.multi_view`), which is approximate.

    Args:
        features: fp32 ``[N, D]``, finite.
        labels: int64 ``[N]``.
        neighbours: Neighbours of a sample in the graph.
        quantile: Share of the edges that count as near, in (0, 1].
        seed: Seed of the hashes.

    Returns:
        Pairs int64 ``[P, 2]``, the smaller index first, each once, and their distances ``[P]``.

    Raises:
        ValueError: If the shapes do not fit together, or an argument is out of its range.

    Example:
        >>> x = np.array([[0.0], [0.01], [9.0], [9.5]], np.float32)
        >>> conflicting_pairs(x, np.array([0, 1, 0, 0]), neighbours=1)[0]
        array([[0, 1]])
    """
    check_integer("neighbours", neighbours, 1)
    check_number("quantile", quantile, "(0, 1]")
    if features.ndim != 2 or len(features) != len(labels):
        raise ValueError(f"Argument `features` must be [{len(labels)}, D], but got {list(features.shape)}.")
    x, generator = torch.from_numpy(np.ascontiguousarray(features)).float(), torch.Generator().manual_seed(seed)
    graph = multi_view(x, min(neighbours, len(x) - 1), VIEWS, CAPACITY, generator).closest(quantile)
    ids, distances = graph.ids.numpy(), graph.distances.numpy()
    samples, columns = np.nonzero(ids >= 0)
    others = ids[samples, columns]
    differ = labels[samples] != labels[others]
    pairs = np.sort(np.stack([samples[differ], others[differ]], 1), 1)
    lengths = distances[samples, columns][differ]
    pairs, first = np.unique(pairs, axis=0, return_index=True)
    order = np.argsort(lengths[first], kind="stable")
    return pairs[order], np.sqrt(lengths[first][order])
