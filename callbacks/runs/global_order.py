"""The order of an epoch over all processes, for a run that another number of processes goes on with."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from curation import rng
from curation.callbacks.runs.random_streams import ORDER, RandomStreams
from curation.callbacks.runs.resumed_order import Position, ResumedOrder
from curation.samplers.global_batch import SequenceSampler
from curation.samplers.recut import batches_left, every_nth, recut
from curation.samplers.rounds import RoundSampler

# Kinds of orders that another number of processes can go on with: what its own data loader may be.
DIVIDED = {"random": "torch", "shuffled": "torch", "sequential": "sequential", "sequence": "own", "rounds": "rounds"}


def describe_order(loader: Any, processes: int) -> dict[str, Any]:
    """What decides the order of the epochs of a data loader over all processes, for a checkpoint.

    Args:
        loader: The training data loader, as Lightning prepared it.
        processes: Number of processes.

    Returns:
        ``kind``: ``"random"`` (drawn from the stream of rank 0), ``"shuffled"`` (by ``seed`` and epoch),
        ``"sequential"``, ``"sequence"`` (a :class:`~curation.samplers.global_batch.SequenceSampler`), ``"rounds"`` (a
        :class:`~curation.samplers.rounds.RoundSampler`), or the name of what cannot be divided anew. ``batch``: rows
        of a batch of all processes.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return {"kind": type(loader.dataset if isinstance(loader, DataLoader) else loader).__name__}
    if stateful(loader):
        return {"kind": type(loader).__name__}
    batches: Any = loader.batch_sampler
    batches = batches.inner if isinstance(batches, ResumedOrder) else batches
    if isinstance(batches, GlobalOrder):
        return batches.order
    sampler: Any = getattr(batches, "sampler", None)
    if isinstance(sampler, RoundSampler):
        return {"kind": "rounds"}
    if type(batches) is not BatchSampler:
        return {"kind": type(loader.sampler if batches is None else batches).__name__}
    samples: int = len(loader.dataset)  # type: ignore[arg-type]
    order: dict[str, Any] = {"batch": batches.batch_size * processes, "samples": samples}
    if isinstance(sampler, SequenceSampler):
        return {**order, "kind": "sequence", "samples": sampler.samples(sampler.sizes), "sizes": sampler.sizes}
    drawn = type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == samples
    if drawn and processes == 1:
        return {**order, "kind": "random", "generator": sampler.generator is not None}
    if type(sampler) is SequentialSampler and processes == 1:
        return {**order, "kind": "sequential"}
    if type(sampler) is DistributedSampler and sampler.num_replicas == processes:
        return (
            {**order, "kind": "shuffled", "seed": sampler.seed}
            if sampler.shuffle
            else {**order, "kind": "sequential"}
        )
    return {"kind": type(sampler).__name__}


def stateful(loader: Any) -> bool:
    """Whether a data loader resumes itself, as the ``StatefulDataLoader`` of torchdata."""
    return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")


class GlobalOrder:
    """The batches of a process, cut from an order that does not depend on the number of processes.

    It takes the place of the ``BatchSampler`` of a data loader. What is left of the epoch in which the number changed
    is cut into batches of the new number, of which each process takes its part. The last batch may be smaller, and is
    filled up with its first samples to be divided. With ``drop_last`` it is left out, but where nothing else is left.

    Args:
        order: What :func:`describe_order` gave where the run began.
        loader: The data loader, with a ``BatchSampler``.
        streams: The random streams of the process.
        position: The counters of the fit.

    Attributes:
        order: Where the run began; ``batch`` and ``samples`` are those of this run.
    """

    def __init__(self, order: dict[str, Any], loader: DataLoader, streams: RandomStreams, position: Position) -> None:
        batches: Any = loader.batch_sampler
        self.sampler, self.batch_size, self.drop_last = batches.sampler, batches.batch_size, batches.drop_last
        self._loader, self._streams, self._position = loader, streams, position
        self._order = {**order, "batch": self.batch_size * len(streams.seeds)}

    @property
    def order(self) -> dict[str, Any]:  # noqa: D102 - see Attributes
        sized = self._order["kind"] == "sequence"
        samples = self.sampler.samples(self._order["sizes"]) if sized else len(self._loader.dataset)  # type: ignore[arg-type]
        return {**self._order, "samples": samples}

    def left(self, trained: int) -> int:
        """Batches of an epoch of which so many samples were trained on."""
        processes = len(self._streams.seeds)
        return batches_left(self.order["samples"] - trained, self.batch_size, processes, self.drop_last, trained > 0)

    def __len__(self) -> int:
        return self.left(0)

    def __iter__(self) -> Iterator[list[int]]:
        position, rank, processes = self._position, self._streams.rank, len(self._streams.seeds)
        batches = recut(self._epoch(position.epoch), self.batch_size * processes, position.first)
        share = self.sampler.share if self._order["kind"] == "sequence" else every_nth
        for batch in itertools.islice(batches, self.left(position.first)):
            yield share(batch, rank, processes).tolist()

    def _epoch(self, epoch: int) -> Iterator[np.ndarray]:
        order, samples = self.order, self.order["samples"]
        if order["kind"] == "sequence":
            yield from self.sampler.global_batches(epoch, order["sizes"])
        elif order["kind"] == "sequential":
            yield np.arange(samples)
        elif order["kind"] == "shuffled":  # as a DistributedSampler
            yield torch.randperm(samples, generator=torch.Generator().manual_seed(order["seed"] + epoch)).numpy()
        else:
            seed = self._streams.seeds[0]
            rng.seed(seed, epoch, ORDER)
            own = torch.Generator().manual_seed(seed ^ epoch) if order["generator"] else None
            yield np.fromiter(RandomSampler(range(samples), generator=own), np.int64, samples)
