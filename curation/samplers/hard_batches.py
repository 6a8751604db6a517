"""The delta rule of hard-sample training (arXiv 2304.03486): go back to the mini-batches with the largest losses."""

from collections import deque
from collections.abc import Iterator
from functools import cached_property
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from curation.samplers.global_batch import GlobalBatchSampler


class HardBatchSampler(GlobalBatchSampler):
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
        dataset: Anything with a length.
        batch_size: Samples of a mini-batch, per process.
        delta: Fraction of the mini-batches in a round, in (0, 1]; 1 is plain training on fixed mini-batches.
        max_age: A mini-batch that was left out of so many rounds in a row is in the next; None for the paper's rule.
        seed: Of the cut.

    Attributes:
        losses: fp32 ``[b]``, the last loss of every mini-batch; NaN before the first.

    Raises:
        ValueError: If ``delta`` is outside (0, 1], ``max_age`` or ``batch_size`` is no integer from 1 on, ``seed`` is
            none in [0, 2^63), or, when the processes are known, the data set is smaller than a mini-batch.
    """

    def __init__(
        self, dataset: Any, batch_size: int, delta: float = 0.5, max_age: int | None = None, seed: int = 0
    ) -> None:
        if not (isinstance(delta, Real) and 0 < delta <= 1):
            raise ValueError(f"Argument `delta` must be in (0, 1], but got {delta!r}.")
        if not (hasattr(batch_size, "__index__") and 1 <= batch_size <= len(dataset)):
            raise ValueError(
                f"Argument `batch_size` must be in [1, {len(dataset)}], the size of the data set, but got "
                f"{batch_size!r}."
            )
        if max_age is not None and not (hasattr(max_age, "__index__") and max_age >= 1):
            raise ValueError(f"Argument `max_age` must be >= 1 or None, but got {max_age!r}.")
        if not (hasattr(seed, "__index__") and 0 <= seed < 2**63):
            raise ValueError(f"Argument `seed` must be an integer in [0, 2^63), but got {seed!r}.")
        super().__init__(dataset, seed)
        self.batch_size: int = batch_size
        self.delta: float = delta
        self.max_age: int | None = max_age
        self.reset()

    @property
    def count(self) -> int:
        """Mini-batches, ``b``."""
        return len(self._cut)

    @cached_property
    def _cut(self) -> Tensor:
        """Indices ``[b, batch_size * processes]``. Asked for late: the process group may come after the sampler."""
        samples, size = len(self.dataset), self.batch_size * self._place[1]  # type: ignore[arg-type]
        if size > samples:
            raise ValueError(
                f"Argument `batch_size` times {self._place[1]} processes must be at most {samples}, the size of the "
                f"data set, but got {self.batch_size}."
            )
        count = -(-samples // size)
        order = torch.randperm(samples, generator=torch.Generator().manual_seed(self.seed))
        return torch.cat([order, order])[: count * size].view(count, size)

    @cached_property
    def losses(self) -> Tensor:  # noqa: D102 - see Attributes
        return torch.full((self.count,), torch.nan)

    @cached_property
    def _ages(self) -> list[int]:
        return [0] * self.count

    def reset(self) -> None:
        """Forget every loss; the next round is the first."""
        for cached in ("_cut", "losses", "_ages"):  # there may be more processes now than when they were asked for
            vars(self).pop(cached, None)
        self._warm = True
        self._round: deque[int] = deque()  # mini-batches of the round that are still to be drawn
        self._drawn: deque[int] = deque()  # drawn, and not trained on yet
        self._in_epoch = 0  # steps of this epoch that were trained on

    # ------------------------------------------------------------------ what the loader asks

    def __len__(self) -> int:
        return self.count * self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Nothing: rounds go on across epochs."""

    def __iter__(self) -> Iterator[int]:
        rank, processes = self._place
        left = self.count - self._in_epoch
        drawn = list(self._drawn)[:left]  # by an iteration that was cut off, maybe in another process
        for batch in drawn:
            yield from self._cut[batch][rank::processes].tolist()
        for _ in range(left - len(drawn)):
            yield from self._cut[self._draw()][rank::processes].tolist()

    def _draw(self) -> int:
        if not self._round:
            self._round.extend(self.hardest())
        batch = self._round.popleft()
        self._drawn.append(batch)
        return batch

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

    # ------------------------------------------------------------------ what the callback tells

    def trained(self, loss: Tensor) -> None:
        """The next mini-batch was trained on, with this mean loss over all processes before its update."""
        batch = self._drawn.popleft()
        self.losses = self.losses.to(loss.device)
        self.losses[batch] = loss.float()
        self._in_epoch += 1

    def end_epoch(self) -> None:
        """An epoch has ended, maybe before its last mini-batch."""
        self._in_epoch = 0

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
            ValueError: If it was cut in another way.
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
