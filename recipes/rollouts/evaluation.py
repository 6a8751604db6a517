"""pass@1 and pass@k of a policy, over all prompts and over the hardest quarter."""

import warnings

import numpy as np
import torch
from torch import Tensor, nn

from curation.metrics.rollouts import PassAtK
from curation.recipes.rollouts.tasks import Task

PARTS = ("val", "seen")  # held-out prompts, and some that are trained on


class SolvedPrompts(nn.Module):
    """pass@1 and pass@k of held-out prompts and of some that are trained on, and of the hardest of both.

    Args:
        k: Number of rollouts of every prompt, of which one is to succeed.
    """

    def __init__(self, k: int) -> None:
        super().__init__()
        self.ks = sorted({1, k})
        names = [f"{part}{suffix}_{k}" for part in PARTS for suffix in ("", "_hard") for k in self.ks]
        self.metrics = nn.ModuleDict({name: PassAtK(int(name.rpartition("_")[2])) for name in names})
        self._hard: Tensor | None = None  # bool [T], the hardest quarter of the task's questions

    def update(self, part: str, ids: Tensor, rewards: Tensor, task: Task) -> None:
        """Enter the prompts of a batch.

        Args:
            part: ``"val"`` or ``"seen"``.
            ids: int64 ``[P]``, the questions.
            rewards: ``[P, k]``.
            task: The task of the questions; without ``difficulty`` none of them is hard.
        """
        if self._hard is None:
            self._hard = hardest_quarter(task)
        hard = self._hard[ids.cpu()].to(rewards.device)
        for k in self.ks:
            self.metrics[f"{part}_{k}"].update(rewards)  # type: ignore[operator]
            if hard.any():
                self.metrics[f"{part}_hard_{k}"].update(rewards[hard])  # type: ignore[operator]

    def compute(self) -> dict[str, Tensor]:
        """``PART_pass_at_K`` of the parts that have prompts; all processes must call it."""
        rates = {}
        for name, metric in self.metrics.items():
            assert isinstance(metric, PassAtK)
            with warnings.catch_warnings():  # a process may have had no such prompt
                warnings.simplefilter("ignore")
                rate = metric.compute()
            if not rate.isnan():
                part, _, k = name.rpartition("_")
                rates[f"{part}_pass_at_{k}"] = rate
            metric.reset()
        return rates


def hardest_quarter(task: Task) -> Tensor:
    """Which questions of a task are of its highest difficulties: bool ``[T]``, none where all are alike."""
    levels = np.array([task.difficulty(i) if hasattr(task, "difficulty") else 0 for i in range(len(task))])
    return torch.from_numpy((levels >= np.quantile(levels, 0.75)) & (levels > levels.min()))
