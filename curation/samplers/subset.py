"""Sampler of a subset of a data set, over any number of processes."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from curation.checks import check_flag
from curation.samplers.global_batch import SequenceSampler


class SubsetSampler(SequenceSampler):
    """Yields some of the indices of a data set, each of ``W`` processes every ``W``-th of them.

    The order depends on ``seed`` and epoch (``set_epoch``) only. It is filled up from its beginning, as torch's
    ``DistributedSampler`` does, so that all processes have equally many. Lightning does not replace this sampler.

    Args:
        samples: The data set, or anything else with its length.
        indices: Integers ``[n]`` in [0, N), a tensor, an array or a list; None for all.
        shuffle: Whether to draw a random order in every epoch; otherwise the order is that of ``indices``.
        seed: Seed of the order; equal on all ranks.

    Raises:
        ValueError: If ``indices`` is empty, has an index twice or one outside [0, N), or another argument has the
            wrong type or is out of its range.

    Example:
        >>> list(SubsetSampler("abcdef", [1, 3, 5], shuffle=False))
        [1, 3, 5]
    """

    def __init__(self, samples: Any, indices: Any = None, shuffle: bool = True, seed: int = 0) -> None:
        super().__init__(samples, seed)
        self.shuffle = check_flag("shuffle", shuffle)
        self.indices = indices

    @property
    def indices(self) -> np.ndarray:
        """The indices that are yielded, in the order in which they were given: int64 ``[n]``."""
        return self._indices

    @indices.setter
    def indices(self, indices: Any) -> None:
        size = len(self.dataset)  # type: ignore[arg-type]
        array = np.arange(size) if indices is None else np.asarray(indices)
        if array.ndim != 1 or array.dtype.kind not in "iu" or not len(array):
            raise ValueError(
                "Argument `indices` must hold integers in one dimension, at least one, but got "
                f"{array.dtype} {list(array.shape)}."
            )
        if not 0 <= array.min() <= array.max() < size:
            raise ValueError(f"Argument `indices` must be in [0, {size}), but got {array.min()} to {array.max()}.")
        if len(np.unique(array)) < len(array):
            raise ValueError("Argument `indices` must have each index once, but has one several times.")
        self._indices = array.astype(np.int64)

    def __len__(self) -> int:
        return -(-len(self._indices) // self._place[1])

    def samples(self, sizes: list[int]) -> int:
        """Number of the indices."""
        return len(self._indices)

    def global_batches(self, epoch: int, sizes: list[int]) -> Iterator[np.ndarray]:
        """The whole order of an epoch."""
        order = self._indices
        yield np.random.default_rng((self.seed, epoch)).permutation(order) if self.shuffle else order
