"""Batches from the best rows of a ranking, whose share falls over a fit: broad at first, narrow at the end."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from curation.checks import check_integer, check_number
from curation.samplers.global_batch import GlobalBatchSampler


class NarrowingSampler(GlobalBatchSampler):
    """Draws each batch at random from the first rows of a ranking, of which fewer and fewer count.

    At step ``t`` of ``T`` these are the share ``first (last / first)^(t / (T - 1))`` of the ranking, at least one
    global batch. Rows of a batch are different; an epoch has ``T`` batches, which are a function of seed, epoch and
    step.

    Args:
        ranking: Samples int64 ``[n]``, best first, each once, as ``TargetedSelector(...).fit(pool).ranking_``; others
            are not drawn.
        batch_size: Rows in a batch, per process.
        steps: Batches of an epoch, ``T``: as many as the fit has.
        first: Share of the ranking at the first step, in (0, 1].
        last: Share at the last step, in (0, 1].
        seed: Seed of the draws; equal on all ranks.

    Raises:
        ValueError: If an argument is out of its range, the ranking repeats a sample, or it is shorter than a batch.

    Example:
        >>> sampler = NarrowingSampler([7, 3, 5, 1], batch_size=1, steps=3, first=1.0, last=0.25)
        >>> len(sampler), list(sampler)[-1]
        (3, 7)
    """

    def __init__(
        self, ranking: Any, batch_size: int, steps: int, first: float = 0.3, last: float = 0.03, seed: int = 0
    ) -> None:
        order = np.asarray(ranking)
        if order.ndim != 1 or order.dtype.kind not in "iu" or len(np.unique(order)) < len(order) or not len(order):
            raise ValueError(f"Argument `ranking` must be different samples, int64 [n], but got {ranking!r}.")
        super().__init__(order, seed)
        self.ranking = order.astype(np.int64)
        self.batch_size = check_integer("batch_size", batch_size, 1)
        self.steps = check_integer("steps", steps, 1)
        self.first = check_number("first", first, "(0, 1]")
        self.last = check_number("last", last, "(0, 1]")
        if batch_size > len(order):
            raise ValueError(f"Argument `batch_size` must be in [1, {len(order)} samples], but got {batch_size}.")

    def __len__(self) -> int:
        return self.steps * self.batch_size

    def share(self, step: int) -> float:
        """Share of the ranking at a step, from 0."""
        return float(self.first * (self.last / self.first) ** (step / max(1, self.steps - 1)))

    def __iter__(self) -> Iterator[int]:
        self._take_epoch()
        rank, processes = self._place
        size = self.batch_size * processes
        if size > len(self.ranking):
            raise ValueError(
                f"Argument `ranking` must have {size} samples for the batch of {processes} processes, but has "
                f"{len(self.ranking)}."
            )
        for step in range(self.steps):
            best = max(size, round(self.share(step) * len(self.ranking)))
            rows = np.random.default_rng((self.seed, self.epoch, step)).choice(best, size, replace=False)
            yield from self.ranking[rows[rank::processes]].tolist()
