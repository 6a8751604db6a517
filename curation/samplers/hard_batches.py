"""The delta rule of hard-sample training (arXiv 2304.03486): go back to the mini-batches with the largest losses."""

from collections import deque
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from curation.checks import check_integer, check_number
from curation.samplers.rounds import RoundSampler


class HardBatchSampler(RoundSampler):
    """Yields the indices of fixed mini-batches, the hardest ones more often.

    The data set is cut once, by the seed, into ``b`` mini-batches of ``batch_size`` samples for each process, which
    takes its part of every mini-batch. The first round visits all of them; every later round ranks them by the last
    loss each had and visits the ``max(1, int(delta b))`` hardest, in the order of the cut. An epoch stays ``b`` steps
    long, whatever the length of a round, so that progress bar, schedules and validation keep their meaning; rounds go
    on across epochs.

    Give it to a ``DataLoader`` as ``sampler``, with the same ``batch_size``, and add
    :class:`curation.callbacks.HardBatchTraining`, which pushes the losses, to the trainer. If the data set does not
    divide, the last mini-batch is filled up with the first samples of the cut. With loader workers a round is ranked
    before the last losses of the round before are known, by as many batches as the loader fetches ahead; a mini-batch
    without a loss yet ranks last.

    Args:
        dataset: The data set, or anything else with its length.
        batch_size: Samples of a mini-batch, per process.
        delta: Fraction of the mini-batches in a round, in (0, 1]; 1 is plain training on fixed mini-batches.
        max_age: Number of rounds in a row after which a mini-batch that was left out is visited again; None for the
            paper's rule, which has no such limit.
        seed: Seed of the cut, in [0, 2^63); equal on all ranks.

    Attributes:
        losses: fp32 ``[b]``, the last loss of every mini-batch; NaN before the first.

    Raises:
        ValueError: If an argument has the wrong type or is out of its range, or, when the processes are known, the
            data set is smaller than a mini-batch.

    Example:
        >>> sampler = HardBatchSampler(range(4), batch_size=1, delta=0.5)
        >>> for _ in sampler:  # the first round
        ...     sampler.trained(torch.rand(()))
        >>> len(sampler.hardest())
        2
    """

    def __init__(
        self, dataset: Any, batch_size: int, delta: float = 0.5, max_age: int | None = None, seed: int = 0
    ) -> None:
        check_number("delta", delta, "(0, 1]")
        check_integer("max_age", max_age, 1, optional=True)
        super().__init__(dataset, batch_size, seed)
        self.delta: float = delta
        self.max_age: int | None = max_age

    @property
    def count(self) -> int:
        """Number of mini-batches, ``b``."""
        return len(self._cut)

    @cached_property
    def _cut(self) -> Tensor:
        """Indices ``[b, batch_size * processes]``, made late: the process group may be made after the sampler."""
        count, size = self.steps, self.batch_size * self._place[1]
        order = torch.randperm(len(self.dataset), generator=torch.Generator().manual_seed(self.seed))  # type: ignore[arg-type]
        return torch.cat([order, order])[: count * size].view(count, size)

    @cached_property
    def losses(self) -> Tensor:  # noqa: D102 - see Attributes
        return torch.full((self.count,), torch.nan)

    @cached_property
    def _ages(self) -> list[int]:
        return [0] * self.count

    def reset(self) -> None:
        """Forget every loss; the next round is the first."""
        for cached in ("_cut", "losses", "_ages"):  # the number of processes may have changed since
            vars(self).pop(cached, None)
        super().reset()
        self._warm = True
        self._round: deque[int] = deque()  # mini-batches of the round that are still to be drawn

    # ------------------------------------------------------------------ called by the loader

    def _draw(self) -> int:
        if not self._round:
            self._round.extend(self.hardest())
        return self._round.popleft()

    def _indices(self, batch: int) -> Tensor:
        return self._cut[batch]

    def hardest(self) -> list[int]:
        """The mini-batches of the next round, in the order of the cut. Costs one host synchronisation."""
        if self._warm:
            self._warm = False
            return list(range(self.count))
        k = max(1, int(self.delta * self.count))
        losses = self.losses.masked_fill(~self.losses.isfinite(), -torch.inf)
        chosen = set(losses.argsort(descending=True, stable=True)[:k].tolist())
        if self.max_age is not None:
            chosen |= {batch for batch, age in enumerate(self._ages) if age >= self.max_age}
        self._ages = [0 if batch in chosen else age + 1 for batch, age in enumerate(self._ages)]
        return sorted(chosen)

    # ------------------------------------------------------------------ called by the callback

    def trained(self, loss: Tensor) -> None:
        """Record that the next mini-batch was trained on.

        Args:
            loss: Scalar, the mean loss over all processes before the update.
        """
        batch = self._drawn.popleft()
        self.losses = self.losses.to(loss.device)
        self.losses[batch] = loss.float()
        self._in_epoch += 1

    def _key(self) -> list[int]:
        return [len(self.dataset), self._cut.size(1), self.seed]  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, Any]:
        """Losses and the place in the round, the same in every process."""
        return {
            "cut": self._key(),
            "losses": self.losses,
            "ages": self._ages,
            "warm": self._warm,
            "round": list(self._round),
            "drawn": list(self._drawn),
            "in_epoch": self._in_epoch,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`.

        Raises:
            ValueError: If the state belongs to another cut.
        """
        self.reset()
        if state["cut"] != self._key():
            raise ValueError(
                "The mini-batches of the checkpoint are others: samples, global batch size and seed were "
                f"{state['cut']} and now are {self._key()}."
            )
        self.losses = state["losses"]
        self._ages, self._warm, self._in_epoch = state["ages"], state["warm"], state["in_epoch"]
        self._round, self._drawn = deque(state["round"]), deque(state["drawn"])
