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
        self.samplers: list[Any] = []
        self._generators: list[torch.Generator] = []

    def follow(self, loader: Any, samplers: Iterable[Any]) -> None:
        """Let :meth:`begin_order` set the generators and epochs of these objects, too.

        Args:
            loader: The training data loader.
            samplers: Its samplers.
        """
        self.samplers = list(samplers)
        generators = [getattr(owner, "generator", None) for owner in (loader, *self.samplers)]
        self._generators = [g for g in generators if isinstance(g, torch.Generator)]

    def begin_order(self, epoch: int) -> None:
        """Set the streams from which the order of an epoch is drawn."""
        rng.seed(self.seeds[self.rank], epoch, ORDER)
        for generator in self._generators:
            generator.manual_seed(self.seeds[self.rank] ^ epoch)
        for sampler in self.samplers:
            if callable(getattr(sampler, "set_epoch", None)):
                sampler.set_epoch(epoch)

    def begin_load(self, batch: int) -> None:
        """Set the stream for loading a batch, given its number in the fit."""
        rng.seed(self.seeds[self.rank], batch, _LOAD)

    def begin_step(self, batch: int) -> None:
        """Set the stream for the training step on a batch, given its number in the fit."""
        rng.seed(self.seeds[self.rank], batch, _STEP)
