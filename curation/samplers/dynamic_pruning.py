"""Dynamic data pruning: the losses that training computes anyway decide what the next round visits."""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from curation.checks import check_choice, check_integer, check_number
from curation.samplers.pruning_rules import RULES
from curation.samplers.rounds import RoundSampler


class Batch(NamedTuple):
    """A batch of all processes, of which rank ``r`` of ``R`` has every ``R``-th sample from number ``r`` on.

    Attributes:
        ids: int64 ``[G]``.
        weights: fp32 ``[G]``; None for equal ones.
        share: Share of the samples that the round visits, of which the last of these is.
        first: int64 ``[G]``, the first row of the sample of every row, where the end of a round and the beginning of
            the next may hold a sample twice; None elsewhere.
    """

    ids: Tensor
    weights: Tensor | None
    share: float
    first: Tensor | None = None


class DynamicDataPruningSampler(RoundSampler):
    """Draws rounds of the samples that the losses of the training steps say are worth another visit.

    The first round visits every sample. Each later round is planned by a rule from the last loss of every sample,
    when the first of its samples is drawn; nothing is forwarded for it. Batches are always full: one may hold the end
    of a round and the beginning of the next. An epoch stays ``ceil(N / (batch_size * processes))`` steps long, and
    rounds go on across epochs.

    Give it to a ``DataLoader`` as ``sampler``, with the same ``batch_size``, and add
    :class:`curation.callbacks.DynamicDataPruning`, which pushes the losses, to the trainer. The data set needs no
    sample ids: the sampler knows what it drew. With loader workers a round is planned before the last losses of the
    round before are known, by as many batches as the loader fetches ahead.

    It holds 20 bytes a sample (last loss, round of the last visit, and of a round ids and weights); planning a round
    takes the memory of some copies more.

    Args:
        dataset: The data set, or anything else with its length.
        batch_size: Samples of a batch, per process.
        rule: ``"mean"`` (InfoBatch), ``"window"`` (SeTa), ``"hide"`` (KAKURENBO), ``"drop_high"``, ``"random"``
            (RS2), ``"proportional"``, ``"signal"`` (prompts of rewards), or a function of the same form
            (:mod:`curation.samplers.pruning_rules`), such as one of these with other options:
            ``partial(proportional, weighted=True)``.
        prune: The rule's share that is left out, in [0, 1); None for the rule's own.
        anneal: Progress of the fit, in [0, 1], from which rounds visit every sample, with weight 1.
        max_age: Number of rounds in a row after which a sample that was left out is visited; None for no limit.
        review: Share of the samples, at random, that every round visits whatever their loss, in [0, 1].
        smoothing: Weight of the losses before in an exponential moving average, in [0, 1); 0 for the last loss.
        seed: Seed of the rounds, in [0, 2^63); equal on all ranks.

    Attributes:
        losses: fp32 ``[N]``, the (smoothed) last loss of every sample; NaN before the first.
        round: Number of the round that is drawn from; 0 for the first.
        length: Number of batches of the fit, which the callback sets; infinity where it is not known.
        elapsed: Share of the time of the fit that is over, in [0, 1], which the callback sets.
        statistics: What is known of the round: numbers by name.

    Raises:
        ValueError: If an argument has the wrong type or is out of its range, if the data set has no length, or, when
            the processes are known, is smaller than a batch.

    Example:
        >>> sampler = DynamicDataPruningSampler(range(4), batch_size=1, rule="random")
        >>> for _ in sampler:  # the first round
        ...     sampler.trained(torch.rand(1))
        >>> len(sampler), len(sampler.plan(sampler.losses)[0])
        (4, 2)
    """

    rules: ClassVar[dict[str, Callable[..., Any]]] = RULES

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        rule: str | Callable[..., Any] = "mean",
        prune: float | None = None,
        anneal: float = 0.875,
        max_age: int | None = None,
        review: float = 0.0,
        smoothing: float = 0.0,
        seed: int = 0,
    ) -> None:
        if not callable(rule):
            check_choice("rule", rule, tuple(self.rules))
        check_number("prune", prune, "[0, 1)", optional=True)
        check_number("anneal", anneal, "[0, 1]")
        check_integer("max_age", max_age, 1, optional=True)
        check_number("review", review, "[0, 1]")
        check_number("smoothing", smoothing, "[0, 1)")
        super().__init__(dataset, batch_size, seed)
        self.rule = rule
        self.prune = prune
        self.anneal = anneal
        self.max_age = max_age
        self.review = review
        self.smoothing = smoothing

    @property
    def rule_name(self) -> str:
        """Name of the rule."""
        if not callable(self.rule):
            return self.rule
        rule = getattr(self.rule, "func", self.rule)  # that of a partial
        return getattr(rule, "__name__", type(rule).__name__)

    @property
    def size(self) -> int:
        """Number of samples, ``N``."""
        return len(self.dataset)  # type: ignore[arg-type]

    def reset(self) -> None:
        """Forget every loss; the next round is the first."""
        super().reset()
        self.losses = torch.full((self.size,), torch.nan)
        self.round = -1
        self.visited = 0  # samples of the rounds that were planned
        self.batches = 0  # that were drawn
        self.length = torch.inf
        self.elapsed: Tensor | float = 0.0
        self.statistics: dict[str, float] = {}
        self._visits = torch.full((self.size,), -1, dtype=torch.int32)  # round of the last visit
        self._ids = torch.empty(0, dtype=torch.int64)  # of the round, those that are still to be drawn
        self._weights: Tensor | None = None

    # ------------------------------------------------------------------ called by the loader

    def _draw(self) -> Batch:
        size = self.batch_size * self._place[1]
        ids, weights = self._take(size)
        joined = False
        while len(ids) < size:
            joined = len(ids) > 0
            self._begin_round()
            more, of_more = self._take(size - len(ids))
            if weights is not None or of_more is not None:
                weights = torch.cat([_ones(ids, weights), _ones(more, of_more)])
            ids = torch.cat([ids, more])
        self.batches += 1
        return Batch(ids, weights, self.statistics["visited_fraction"], _first_rows(ids) if joined else None)

    def _take(self, n: int) -> tuple[Tensor, Tensor | None]:
        ids, self._ids = self._ids[:n].clone(), self._ids[n:]  # of a slice a checkpoint holds all of the storage
        weights = self._weights
        if weights is not None:
            weights, self._weights = weights[:n].clone(), weights[n:]
        return ids, weights

    def _begin_round(self) -> None:
        """Plan the next round; costs one host synchronisation."""
        self.round += 1
        generator = self._generator(1)
        progress = min(1.0, max(self.batches / self.length, float(self.elapsed)))
        if (self.round == 0 and self._knows_nothing) or progress >= self.anneal:
            ids, weights = torch.arange(self.size), None
        else:
            losses = self.losses.to("cpu", copy=True)  # a rule may write into it
            if self.review:
                must = torch.rand(self.size, generator=generator) < self.review
                losses = losses.masked_fill(must, torch.nan)
            if self.max_age is not None:
                losses = losses.masked_fill(self._visits < self.round - self.max_age, torch.nan)
            ids, weights = self.plan(losses, progress)
        order = torch.randperm(len(ids), generator=generator)
        self._ids, self._weights = ids[order], None if weights is None else weights[order]
        self._visits[ids] = self.round
        self.visited += len(ids)
        self.statistics = {
            "round": float(self.round),
            "visited_fraction": len(ids) / self.size,
            "mean_age": self.round - int(self._visits.sum()) / self.size,
            "work_saved": 1 - self.visited / (self.size * (self.round + 1)),
            "pruning_progress": progress,
        }

    @property
    def _knows_nothing(self) -> bool:
        """Whether the first round visits every sample."""
        return True

    def _generator(self, stream: int) -> torch.Generator:
        """A generator that depends on seed, round and stream only."""
        return torch.Generator().manual_seed((self.seed * 2654435761 + self.round * 2 + stream) % 2**63)

    def plan(self, losses: Tensor, progress: float = 0.0) -> tuple[Tensor, Tensor | None]:
        """What the rule visits in the current round.

        Args:
            losses: fp32 ``[N]`` on the CPU; NaN for samples that must be visited.
            progress: Share of the fit that is done, in [0, 1].

        Returns:
            Distinct ids int64 ``[n]``, and weights fp32 ``[n]`` or None for equal ones.

        Raises:
            ValueError: If a rule of the user's own gives something else.
        """
        rule = self.rule if callable(self.rule) else self.rules[self.rule]
        if self.prune is not None:
            rule = partial(rule, prune=self.prune)
        choice = self._choose(rule, losses, progress)
        return self._checked(choice) if callable(self.rule) else choice

    def _choose(self, rule: Callable[..., Any], losses: Tensor, progress: float) -> Any:
        """Ids and weights by a rule."""
        return rule(losses, self._generator(0), progress=progress, round=self.round)

    def _checked(self, choice: Any) -> tuple[Tensor, Tensor | None]:
        name = f"Argument `rule` ({self.rule_name})"
        if not (isinstance(choice, tuple) and len(choice) == 2):
            raise ValueError(f"{name} must give ids, and weights or None, but gave {choice!r}.")
        ids, weights = choice
        if not (isinstance(ids, Tensor) and ids.dtype == torch.int64 and ids.dim() == 1 and len(ids)):
            got = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
            raise ValueError(f"{name} must give ids, int64 [n] with n >= 1, but gave {got}.")
        ordered = ids.sort().values
        if ordered[0] < 0 or ordered[-1] >= self.size or (ordered[1:] == ordered[:-1]).any():
            raise ValueError(
                f"{name} must give distinct ids of 0 to {self.size - 1}, but gave {ids.tolist()[:10]}..."
            )
        if weights is None:
            return ids, None
        shape = list(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        if shape != [len(ids)] or not (weights.isfinite() & (weights >= 0)).all():
            raise ValueError(
                f"{name} must give weights [{len(ids)}] finite and not negative, or None, but gave {weights}."
            )
        return ids, weights.detach().float()

    def _indices(self, batch: Batch) -> Tensor:
        return batch.ids

    # ------------------------------------------------------------------ called by the callback

    @property
    def next(self) -> Batch:
        """The batch that is trained on next."""
        return self._drawn[0]

    def trained(self, losses: Tensor) -> None:
        """Record that the next batch was trained on.

        Args:
            losses: Floating ``[G]``, the losses of its samples in the order of :attr:`next`, on any device; NaN for
                one that is not known, of which the last loss stays. If a sample occurs twice, the larger is stored.
        """
        batch = self._drawn.popleft()
        ids = batch.ids.to(losses.device, non_blocking=True)
        self.losses = self.losses.to(losses.device)
        before, losses = self.losses[ids], of_samples(batch, losses)
        if self.smoothing:
            mixed = self.smoothing * before + (1 - self.smoothing) * losses
            losses = torch.where(before.isfinite(), mixed, losses)
        self.losses[ids] = torch.where(losses.isnan(), before, losses)
        self._in_epoch += 1

    def _key(self) -> list[int]:
        return [self.size, self.batch_size * self._place[1], self.seed]

    def state_dict(self) -> dict[str, Any]:
        """Losses, the place in the round, and what is left of it, the same in every process."""
        return {
            "samples": self._key(),
            "losses": self.losses,
            "visits": self._visits,
            "round": self.round,
            "visited": self.visited,
            "batches": self.batches,
            "elapsed": self.elapsed,
            "statistics": self.statistics,
            "ids": self._ids.clone(),  # of a slice all of the storage would be saved
            "weights": None if self._weights is None else self._weights.clone(),
            "drawn": [tuple(batch) for batch in self._drawn],
            "in_epoch": self._in_epoch,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`.

        Raises:
            ValueError: If the state is of other samples, another global batch or seed.
        """
        if state["samples"] != self._key():
            raise ValueError(
                "The rounds of the checkpoint are others: samples, global batch size and seed were "
                f"{state['samples']} and now are {self._key()}."
            )
        self.reset()
        self.losses, self._visits = state["losses"].clone(), state["visits"].clone()
        self.round, self.visited, self._in_epoch = state["round"], state["visited"], state["in_epoch"]
        self.batches, self.elapsed, self.statistics = state["batches"], state["elapsed"], state["statistics"]
        self._ids, self._weights = state["ids"], state["weights"]
        self._drawn.extend(Batch(*batch) for batch in state["drawn"])


def of_samples(batch: Batch, losses: Tensor) -> Tensor:
    """The losses of the rows, fp32 ``[G]``: of a sample that occurs twice the larger known one, in both rows."""
    losses = losses.float()
    if batch.first is None:
        return losses
    first = batch.first.to(losses.device, non_blocking=True)  # or which of the two is stored would be left to it
    known = losses.where(~losses.isnan(), -torch.inf)
    larger = known.scatter_reduce(0, first, known, "amax")[first]
    return larger.where(larger > -torch.inf, torch.nan)


def _ones(ids: Tensor, weights: Tensor | None) -> Tensor:
    return torch.ones(len(ids)) if weights is None else weights


def _first_rows(ids: Tensor) -> Tensor:
    _, first, inverse = np.unique(ids.numpy(), return_index=True, return_inverse=True)
    return torch.from_numpy(first[inverse])
