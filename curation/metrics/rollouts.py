"""How often prompts are solved, over many rollouts."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from curation.rollouts.pass_at_k import pass_at_k


class PassAtK(Metric):
    """Mean over prompts of the chance that one of ``k`` rollouts is right.

    Args:
        k: Rollouts.
        **kwargs: Of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If ``k`` is not a positive integer, or groups are of different sizes: of adaptive ones it would be
            too low.

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
        if not (hasattr(k, "__index__") and k >= 1):
            raise ValueError(f"Argument `k` must be an integer >= 1, but got {k!r}.")
        self.k = int(k)
        self._n: int | None = None
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("prompts", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, rewards: Tensor) -> None:
        """Enter prompts.

        Args:
            rewards: ``[P, n]``, above 0.5 where a rollout is right; the same ``n`` in every call.
        """
        n = rewards.size(1)
        if self._n not in (None, n):
            raise ValueError(f"Every prompt must have as many rollouts, but some have {self._n} and others {n}.")
        self._n = n
        # Not in place: a state may have been made in inference mode.
        self.total = self.total + pass_at_k((rewards > 0.5).sum(1), n, self.k).sum()
        self.prompts = self.prompts + len(rewards)

    def compute(self) -> Tensor:
        """fp32 scalar."""
        return (self.total / self.prompts).float()

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._n = None


class SolveRate(Metric):
    """Shares of the prompts of which no rollout, some and all are right.

    Args:
        **kwargs: Of :class:`torchmetrics.Metric`.

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
            successes: ``[P]``, sum of the rewards of its rollouts.
            n: ``[P]``, number of these.
        """
        none, every = successes <= 0, successes >= n
        self.counts = self.counts + torch.stack([none.sum(), (~none & ~every).sum(), every.sum()])

    def compute(self) -> dict[str, Tensor]:
        """fp32 scalars ``solve_none``, ``solve_partial`` and ``solve_all``."""
        names = ("solve_none", "solve_partial", "solve_all")
        return dict(zip(names, (self.counts / self.counts.sum().clamp(min=1)).unbind(), strict=True))
