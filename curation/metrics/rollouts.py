"""Metrics of how often prompts are solved."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from curation.checks import check_integer
from curation.rollouts.pass_at_k import pass_at_k


class PassAtK(Metric):
    """pass@k: the probability that one of ``k`` rollouts succeeds, mean over prompts (arXiv 2107.03374).

    Args:
        k: Number of rollouts of which one is to succeed.
        **kwargs: Options of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If ``k`` is not a positive integer. In ``update``, if the number of rollouts is below ``k`` or
            differs between prompts: with adaptive rollouts the estimate would be too low.

    Example:
        >>> metric = PassAtK(k=2)
        >>> metric.update(torch.tensor([[0.0, 0, 1, 0], [1, 1, 1, 1]]))
        >>> metric.compute()
        tensor(0.7500)
    """

    total: Tensor
    prompts: Tensor
    higher_is_better = True
    full_state_update = False

    def __init__(self, k: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.k: int = check_integer("k", k, 1)
        self._n: int | None = None
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("prompts", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, rewards: Tensor) -> None:
        """Enter prompts.

        Args:
            rewards: ``[P, n]``, above 0.5 where a rollout succeeds; the same ``n`` in every call.
        """
        n = rewards.size(1)
        if self._n not in (None, n):
            raise ValueError(f"Every prompt must have as many rollouts, but some have {self._n} and others {n}.")
        self._n = n
        # Not in place: a state may have been made in inference mode.
        self.total = self.total + pass_at_k((rewards > 0.5).sum(1), n, self.k).sum()
        self.prompts = self.prompts + len(rewards)

    def compute(self) -> Tensor:
        """The mean over prompts, an fp32 scalar."""
        return (self.total / self.prompts).float()

    def reset(self) -> None:
        """Remove all prompts."""
        super().reset()
        self._n = None


class SolveRate(Metric):
    """Fractions of prompts of which no rollout, some rollouts and all rollouts succeed.

    Args:
        **kwargs: Options of :class:`torchmetrics.Metric`.

    Example:
        >>> metric = SolveRate()
        >>> metric.update(torch.tensor([0.0, 1, 2, 2]), torch.tensor([2, 2, 2, 2]))
        >>> {name: float(value) for name, value in metric.compute().items()}
        {'solve_none': 0.25, 'solve_partial': 0.25, 'solve_all': 0.5}
    """

    counts: Tensor
    full_state_update = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("counts", torch.zeros(3, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, successes: Tensor, n: Tensor) -> None:
        """Enter prompts.

        Args:
            successes: ``[P]``, the sum of the rewards of each prompt's rollouts.
            n: ``[P]``, the number of rollouts of each prompt.
        """
        unsolved, solved = successes <= 0, successes >= n
        self.counts = self.counts + torch.stack([unsolved.sum(), (~unsolved & ~solved).sum(), solved.sum()])

    def compute(self) -> dict[str, Tensor]:
        """The fractions ``solve_none``, ``solve_partial`` and ``solve_all``, fp32 scalars."""
        names = ("solve_none", "solve_partial", "solve_all")
        return dict(zip(names, (self.counts / self.counts.sum().clamp(min=1)).unbind(), strict=True))
