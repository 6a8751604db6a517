"""Base class of the samplers whose rounds depend on the losses of the training steps before."""

import warnings
from abc import abstractmethod
from collections import deque
from collections.abc import Iterator
from itertools import chain
from typing import Any

from torch import Tensor

from curation.checks import check_integer, check_seed
from curation.samplers.global_batch import GlobalBatchSampler


class RoundSampler(GlobalBatchSampler):
    """Draws global batches in rounds, which go on across epochs and are planned from the losses of trained batches.

    An epoch stays ``ceil(N / (batch_size * processes))`` steps long, whatever the length of a round, so that progress
    bar, schedules and validation keep their meaning. Batches that were drawn and not trained on yet, which loader
    workers fetch ahead, belong to the state, so nothing is drawn again after a resume.

    Args:
        dataset: The data set, or anything else with its length.
        batch_size: Samples of a batch, per process.
        seed: Seed, in [0, 2^63); equal on all ranks.

    Raises:
        ValueError: If an argument has the wrong type or is out of its range.
    """

    def __init__(self, dataset: Any, batch_size: int, seed: int) -> None:
        batch_size, seed = check_integer("batch_size", batch_size, 1), check_seed(seed)
        if not hasattr(dataset, "__len__"):
            raise ValueError(
                f"Argument `dataset` must have a length, so that its samples can be drawn by index, but got a "
                f"{type(dataset).__name__}."
            )
        if batch_size > len(dataset):
            raise ValueError(
                f"Argument `batch_size` must be at most {len(dataset)}, the size of the data set, but got "
                f"{batch_size!r}."
            )
        super().__init__(dataset, seed)
        self.batch_size: int = batch_size
        self._iteration: object = None  # the one that was begun last
        self.reset()

    def reset(self) -> None:
        """Forget every loss; the next round is the first."""
        self._drawn: deque[Any] = deque()  # batches that are drawn, and not trained on yet
        self._in_epoch = 0  # steps of this epoch that were trained on

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        samples, processes = len(self.dataset), self._place[1]  # type: ignore[arg-type]
        if self.batch_size * processes > samples:
            raise ValueError(
                f"Argument `batch_size` times {processes} processes must be at most {samples}, the size of the data "
                f"set, but got {self.batch_size}."
            )
        return -(-samples // (self.batch_size * processes))

    def __len__(self) -> int:
        return self.steps * self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Nothing: rounds go on across epochs."""

    def __iter__(self) -> Iterator[int]:
        rank, processes = self._place
        remaining = self.steps - self._in_epoch
        drawn = list(self._drawn)[:remaining]  # by an iteration that was cut off, maybe in another process
        if len(drawn) == self.steps:
            warnings.warn(
                f"A {type(self).__name__} yields the batches of an epoch again, since nobody said that they were "
                "trained on. If this is no trial of a tuner, add its callback to the trainer.",
                stacklevel=2,
            )
        self._iteration = iteration = object()
        for batch in chain(drawn, (self._draw_next() for _ in range(remaining - len(drawn)))):
            if self._iteration is not iteration:
                raise RuntimeError(
                    f"A {type(self).__name__} was iterated while a fit iterates it, so the order of its batches is "
                    "lost. Give validation a data loader with another sampler."
                )
            yield from self._indices(batch)[rank::processes].tolist()

    def _draw_next(self) -> Any:
        self._drawn.append(self._draw())
        return self._drawn[-1]

    @abstractmethod
    def _draw(self) -> Any:
        """The next batch, in a form that can be saved; plans a round where one is due."""

    @abstractmethod
    def _indices(self, batch: Any) -> Tensor:
        """Indices of a batch of all processes, int64 ``[batch_size * processes]``."""

    def end_epoch(self) -> None:
        """Record that an epoch has ended, maybe before its last batch."""
        self._in_epoch = 0

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Losses and the place in the round, the same in every process."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
