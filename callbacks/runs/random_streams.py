"""The random streams of a process, as functions of seeds and counters."""

from collections.abc import Iterable
from typing import Any

import torch

from curation import rng

ORDER, _LOAD, _STEP = 0, 1, 2


class RandomStreams:
    """Sets the global random generators of one process anew for every order, load and step of a fit.

    Each stream depends on the seed of the rank and on one counter, and on nothing drawn before. So a fit that goes on
    from these counters draws what an uninterrupted fit draws.

    Args:
        seeds: Seed of every rank.
        rank: Rank of this process.

    Example:
        >>> streams = RandomStreams(seeds=[7], rank=0)
        >>> streams.begin_step(batch=3)
        >>> drawn = torch.rand(2)
        >>> streams.begin_load(batch=3)
        >>> torch.equal(drawn, torch.rand(2))
        False
        >>> streams.begin_step(batch=3)
        >>> torch.equal(drawn, torch.rand(2))
        True
    """

    def __init__(self, seeds: list[int], rank: int) -> None:
        self.seeds = seeds
        self.rank = rank
        self.samplers: dict[int, list[Any]] = {}  # of each data loader
        self._generators: dict[int, list[torch.Generator]] = {}

    def follow(self, loader: Any, samplers: Iterable[Any], number: int = 0) -> None:
        """Let :meth:`begin_order` set the generators and epochs of these objects, too.

        Args:
            loader: A training data loader.
            samplers: Its samplers.
            number: Number of the data loader; 0 for the one that is curated.
        """
        self.samplers[number] = list(samplers)
        generators = [getattr(owner, "generator", None) for owner in (loader, *self.samplers[number])]
        self._generators[number] = [g for g in generators if isinstance(g, torch.Generator)]

    def forget(self) -> None:
        """Follow nothing."""
        self.samplers, self._generators = {}, {}

    def begin_order(self, epoch: int, number: int = 0, cycle: int = 0) -> None:
        """Set the streams from which the order of an epoch is drawn.

        Args:
            epoch: The epoch.
            number: Number of the data loader.
            cycle: How often it has ended in the epoch.
        """
        rng.seed(self.seeds[self.rank], epoch, ORDER, *((number, cycle) if number or cycle else ()))
        for generator in self._generators.get(number, []):
            generator.manual_seed(self.seeds[self.rank] ^ epoch ^ (number << 48) ^ (cycle << 32))
        for sampler in self.samplers.get(number, []):
            if callable(getattr(sampler, "set_epoch", None)):
                sampler.set_epoch(epoch)

    def begin_load(self, batch: int, number: int = 0) -> None:
        """Set the stream for loading a batch of a data loader, given its number in the fit."""
        rng.seed(self.seeds[self.rank], batch, _LOAD, *((number,) if number else ()))

    def begin_step(self, batch: int) -> None:
        """Set the stream for the training step on a batch, given its number in the fit."""
        rng.seed(self.seeds[self.rank], batch, _STEP)
