"""The order of an epoch that begins after the batches trained on."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from curation.callbacks.runs.random_streams import RandomStreams


@dataclass
class Position:
    """How far a fit is.

    Attributes:
        batches: Batches trained on in the fit.
        epoch: The epoch, 0 the first.
        batches_in_epoch: Batches trained on in the epoch.
        batches_per_epoch: Length of the training data loader; None where it has no length.
        skip: Batches of the next order that were trained on before the fit was resumed.
        joined: Batches of the data loader in each that is trained on.
        first: Samples of the epoch that another number of processes trained on; 0 where there was none.
        first_batch: What ``batches_in_epoch`` was after them: the batches of an epoch less those of what is left.
    """

    batches: int = 0
    epoch: int = 0
    batches_in_epoch: int = 0
    batches_per_epoch: int | None = None
    skip: int = 0
    joined: int = 1
    first: int = 0
    first_batch: int = 0

    @property
    def loaded(self) -> int:
        """Batches of the data loader before the one that is loaded next, as its random stream counts them."""
        return self.batches * self.joined

    @property
    def inside(self) -> bool:
        """Whether the epoch has begun."""
        return self.batches_in_epoch > 0 or self.first > 0

    def samples(self, rows: int) -> int:
        """Samples of the epoch that were trained on, given the rows of a batch of all data loaders."""
        return self.first + (self.batches_in_epoch - self.first_batch) * self.joined * rows

    def count_batch(self) -> None:
        """Count a batch that was trained on."""
        self.batches += 1
        self.batches_in_epoch += 1

    def end_epoch(self) -> None:
        """Go to the next epoch, once."""
        if self.batches_in_epoch:
            self.epoch += 1
            self.batches_in_epoch = self.first = self.first_batch = 0

    def take_skip(self) -> int:
        """The number of batches to skip, for one order."""
        skip, self.skip = self.skip, 0
        return skip


class ResumedOrder:
    """A sampler whose order is drawn from a stream of its own, and begins after the batches trained on.

    Args:
        sampler: The sampler, or batch sampler, of the training data loader; all other attributes are its own.
        streams: The random streams of the process.
        position: The counters of the fit.
        number: Number of the data loader; 0 for the one that is curated.
        cycles: Whether the data loader begins again where it ends before the epoch.
    """

    def __init__(
        self, sampler: Any, streams: RandomStreams, position: Position, number: int = 0, cycles: bool = False
    ) -> None:
        vars(self).update(_sampler=sampler, _streams=streams, _position=position, _number=number, _cycles=cycles)

    @property
    def inner(self) -> Any:
        """The sampler."""
        return self._sampler

    def __len__(self) -> int:
        return len(self._sampler)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._sampler, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._sampler, name, value)

    def __iter__(self) -> Iterator[Any]:
        streams, position, number = self._streams, self._position, self._number
        joined = 1 if number else position.joined  # others than the curated data loader are not
        skip, cycle = position.batches_in_epoch if number else position.take_skip(), 0
        if self._cycles:
            cycle = position.batches_in_epoch * joined // len(self)
            skip %= len(self)
        streams.begin_order(position.epoch, number, cycle)
        order = iter(self._sampler)
        first = list(itertools.islice(order, 1))
        loaded = position.batches * joined
        streams.begin_load(loaded, number)
        remaining = itertools.islice(itertools.chain(first, order), skip, None)
        for batch, indices in enumerate(remaining, loaded):
            streams.begin_load(batch, number)  # again, since a loader may fetch batches in advance
            yield indices


class ResumedStream:
    """A data loader of an iterable data set that reads on after the batches trained on.

    Those are read again and left out, which takes the time of reading them. What is read is the same where it depends
    on the data set, its epoch and the random streams alone; they are set as in an epoch that is not interrupted. All
    other attributes are those of the data loader.

    Args:
        loader: The training data loader.
        streams: The random streams of the process.
        position: The counters of the fit.
    """

    loader: Any

    def __init__(self, loader: Any, streams: RandomStreams, position: Position) -> None:
        vars(self).update(loader=loader, _streams=streams, _position=position)

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        if name == "loader" or name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.loader, name, value)  # such as what Lightning seeds workers with

    def __iter__(self) -> Iterator[Any]:
        streams, position = self._streams, self._position
        first, skip = position.loaded, position.take_skip()
        if callable(getattr(self.loader.dataset, "set_epoch", None)):
            self.loader.dataset.set_epoch(position.epoch)
        streams.begin_order(position.epoch)  # a loader with workers draws their seed as its iteration begins
        batches = iter(self.loader)
        for number in itertools.count(first - skip):
            streams.begin_load(number)
            try:
                batch = next(batches)
            except StopIteration:
                return
            if number >= first:
                yield batch
