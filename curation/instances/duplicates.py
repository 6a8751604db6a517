"""Rows that are nearly the same as an earlier one, by the graph of nearest neighbours."""

from typing import Any

import numpy as np
import torch

from curation.checks import check_integer, check_number
from curation.instances.hashing import multi_view

CAPACITY, VIEWS, NEIGHBOURS = 256, 4, 5  # of the graph


def near_duplicates(features: Any, similarity: float = 0.95, seed: int = 0) -> np.ndarray:
    """Whether an earlier row is nearly the same, be that one a near-duplicate itself.

    What is left has no near-duplicates in the graph of nearest neighbours by hashing
    (:func:`~curation.instances.hashing.multi_view`), which is approximate. The graph is made anew of what is left
    until it has none, since a row of many equal ones may have later ones alone for neighbours. All features are in
    memory.

    Args:
        features: Floating ``[N, D]``, finite.
        similarity: Cosine similarity from which rows are nearly the same, in (0, 1].
        seed: Seed of the hashes.

    Returns:
        bool ``[N]``.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> near_duplicates(np.array([[1, 0], [0, 1], [2, 0.01]], np.float32)).tolist()
        [False, False, True]
    """
    check_number("similarity", similarity, "(0, 1]")
    check_integer("seed", seed, 0)
    x = torch.as_tensor(features).float()
    if x.dim() != 2:
        raise ValueError(f"Argument `features` must be [N, D], but got {list(x.shape)}.")
    x = torch.nn.functional.normalize(x, dim=1)
    generator = torch.Generator().manual_seed(seed)
    left, found = torch.arange(len(x)), True
    while found and len(left) > 1:
        graph = multi_view(x[left], min(NEIGHBOURS, len(left) - 1), VIEWS, CAPACITY, generator)
        near = graph.distances <= 2 - 2 * similarity + 1e-6  # of unit vectors; what rounding makes of equal rows
        repeats = (near & (graph.ids >= 0) & (graph.ids < torch.arange(len(left))[:, None])).any(1)
        found, left = bool(repeats.any()), left[~repeats]
    return ~np.isin(np.arange(len(x)), left.numpy())
