"""Prompts of a task, by number: sized, so that nothing is generated before it is trained on."""

from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from curation.recipes.rollouts.tasks import Task


class Prompts(LightningDataModule):
    """Batches of question numbers ``{"ids": int64 [P], "questions": [P]}``; rollouts are made from them in the step.

    The first questions of the task are for training, the last for validation, and so are some of the first, to tell
    what is learnt from what carries over.

    Args:
        task: The questions and their scores.
        batch_size: Prompts of a step, per process.
        holdout: Share of the questions that are held out.
        seen: Training questions that are evaluated too; 0 for none.
        eval_batch_size: Prompts of a validation batch.
        warmup: What a policy is warmed up on; None for the questions for training.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        task: Task,
        batch_size: int = 32,
        holdout: float = 0.25,
        seen: int = 0,
        eval_batch_size: int = 64,
        warmup: Task | None = None,
    ) -> None:
        super().__init__()
        if not 0 < holdout < 1:
            raise ValueError(f"Argument `holdout` must be in (0, 1), but got {holdout!r}.")
        self.task = task
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.train_size = len(task) - max(1, round(holdout * len(task)))
        if not 0 <= seen <= self.train_size:
            raise ValueError(f"Argument `seen` must be in [0, {self.train_size}], but got {seen!r}.")
        if not 1 <= batch_size <= self.train_size:
            raise ValueError(f"Argument `batch_size` must be in [1, {self.train_size}], but got {batch_size!r}.")
        self.seen = seen
        self.warmup = warmup

    def solved(self, i: int) -> tuple[str, str]:
        """A question to warm up on, any number, and its solution.

        Raises:
            ValueError: If its task has no solutions.
        """
        task, size = (self.task, self.train_size) if self.warmup is None else (self.warmup, len(self.warmup))
        if not hasattr(task, "solution"):
            raise ValueError(f"Argument `warmup_steps` must be 0 for {type(task).__name__}, which has no `solution`.")
        return task.question(i % size), task.solution(i % size)

    def _loader(self, ids: range, size: int, **options: Any) -> DataLoader:
        return DataLoader(ids, size, collate_fn=self._collate, **options)  # type: ignore[arg-type]

    def _collate(self, ids: list[int]) -> dict[str, Any]:
        return {"ids": torch.tensor(ids), "questions": [self.task.question(i) for i in ids]}

    def train_dataloader(self) -> DataLoader:
        """Shuffled; a last batch with fewer prompts is left out.

        Raises:
            ValueError: If there are fewer prompts than the batches of all processes take.
        """
        processes = 1 if self.trainer is None else self.trainer.world_size
        if self.batch_size * processes > self.train_size:
            raise ValueError(
                f"Argument `batch_size` must be in [1, {self.train_size // processes}] on {processes} processes, but "
                f"got {self.batch_size!r}."
            )
        return self._loader(range(self.train_size), self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> list[DataLoader]:
        """What was held out, and what was not."""
        parts = [range(self.train_size, len(self.task)), range(self.seen)]
        return [self._loader(part, self.eval_batch_size) for part in parts if len(part)]
