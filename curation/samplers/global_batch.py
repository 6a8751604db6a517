"""Base class of the samplers that choose the global batch of all processes."""

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DistributedSampler

from curation.checks import check_integer
from curation.samplers.fit_epoch import fit_epoch
from curation.samplers.recut import every_nth
from curation.settings import Configured


class GlobalBatchSampler(Configured, DistributedSampler):
    """Base class of samplers that choose the global batch, of which each process takes its part.

    It is a ``DistributedSampler`` of one process, so that Lightning does not replace it.

    Args:
        samples: The data set, or anything else with its length.
        seed: Seed of the order; equal on all ranks.

    Raises:
        ValueError: If ``seed`` is no integer >= 0.
    """

    def __init__(self, samples: Any, seed: int) -> None:
        check_integer("seed", seed, 0)
        super().__init__(samples, num_replicas=1, rank=0, seed=seed)
        self._epoch_is_set = False  # since the last iteration

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that is iterated next; Lightning does."""
        super().set_epoch(epoch)
        self._epoch_is_set = True

    def _take_epoch(self) -> None:
        """Choose the epoch of the fit that begins to iterate, if nobody has chosen one since the last iteration."""
        epoch = None if self._epoch_is_set else fit_epoch()
        if epoch is not None:
            self.set_epoch(epoch)
        self._epoch_is_set = False

    @property
    def _place(self) -> tuple[int, int]:
        """Rank and number of processes, looked up late: the process group may be made after the sampler."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1


class SequenceSampler(GlobalBatchSampler):
    """Base class of samplers whose epochs are one sequence of samples, however many processes share it.

    The sequence depends on seed, epoch and :attr:`sizes` only. So another number of processes can go on with it, with
    the sizes that it was planned with (:class:`curation.callbacks.ExactResume`).
    """

    @property
    def sizes(self) -> list[int]:
        """Rows of all processes that the sequence is planned in; none where it does not depend on them."""
        return []

    @abstractmethod
    def samples(self, sizes: list[int]) -> int:
        """Samples of an epoch, given :attr:`sizes` of this or of another number of processes."""

    @abstractmethod
    def global_batches(self, epoch: int, sizes: list[int]) -> Iterator[np.ndarray]:
        """The sequence of an epoch in parts, integers ``[n]`` each."""

    def share(self, batch: np.ndarray, rank: int, processes: int) -> np.ndarray:
        """A process's part of a global batch, ``[ceil(n / W)]``: every ``W``-th, filled up with its first samples."""
        return every_nth(batch, rank, processes)

    def __iter__(self) -> Iterator[int]:
        self._take_epoch()
        rank, processes = self._place
        for batch in self.global_batches(self.epoch, self.sizes):
            yield from self.share(batch, rank, processes).tolist()
