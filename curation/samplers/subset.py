"""A part of a data set, in every process."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from curation.samplers.global_batch import GlobalBatchSampler


class SubsetSampler(GlobalBatchSampler):
    """Yields some of the indices of a data set, each process every W-th of them.

    The order depends on ``seed`` and epoch (``set_epoch``) only. So that all of ``W`` processes have equally many,
    the order is filled up from its beginning, as torch's ``DistributedSampler`` does. Lightning leaves it alone.

    Args:
        samples: Anything with a length.
        indices: Integers ``[n]``, a tensor, an array or a list; None for all.
        shuffle: Draw an order; otherwise it is that of ``indices``.
        seed: Of the order.

    Raises:
        ValueError: If ``indices`` is empty, has one twice or one that is of no sample, or ``seed`` is negative.

    Example:
        >>> list(SubsetSampler("abcdef", [1, 3, 5], shuffle=False))
        [1, 3, 5]
    """

    def __init__(self, samples: Any, indices: Any = None, shuffle: bool = True, seed: int = 0) -> None:
        if not (hasattr(seed, "__index__") and seed >= 0):
            raise ValueError(f"Argument `seed` must be an integer >= 0, but got {seed!r}.")
        super().__init__(samples, seed)
        self.shuffle = shuffle
        self.indices = indices

    @property
    def indices(self) -> np.ndarray:
        """What is yielded, in no order: int64 ``[n]``."""
        return self._indices

    @indices.setter
    def indices(self, indices: Any) -> None:
        size = len(self.dataset)  # type: ignore[arg-type]
        found = np.arange(size) if indices is None else np.asarray(indices)
        if found.ndim != 1 or found.dtype.kind not in "iu" or not len(found):
            raise ValueError(
                "Argument `indices` must hold integers in one dimension, at least one, but got "
                f"{found.dtype} {list(found.shape)}."
            )
        if not 0 <= found.min() <= found.max() < size:
            raise ValueError(f"Argument `indices` must be in [0, {size}), but got {found.min()} to {found.max()}.")
        if len(np.unique(found)) < len(found):
            raise ValueError("Argument `indices` must have each index once, but has one several times.")
        self._indices = found.astype(np.int64)

    def __len__(self) -> int:
        return -(-len(self._indices) // self._place[1])

    def __iter__(self) -> Iterator[int]:
        rank, processes = self._place
        order = self._indices
        if self.shuffle:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(order)
        yield from np.resize(order, processes * len(self))[rank::processes].tolist()
