"""The data module of the questions of a task; it holds prompts alone, and nothing is generated ahead of its step."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader, Sampler

from curation.checks import check_integer, check_number
from curation.instances.selection_index import fingerprint
from curation.recipes.rollouts.tasks import SomeQuestions, Task
from curation.recipes.sources import sampled


class Questions:
    """The numbers of the first questions of a task, 0 to N - 1, as a data set.

    Args:
        task: The task.
        size: ``N``.
    """

    def __init__(self, task: Task, size: int) -> None:
        self.task, self._numbers = task, range(size)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, i: int) -> int:
        return self._numbers[i]

    @property
    def fingerprint(self) -> str:
        """What tells the questions from others, by which a memory of their outcomes is known again."""
        return fingerprint([self.task.question(i) for i in self._numbers])


class Prompts(LightningDataModule):
    """Batches ``{"ids": int64 [P], "questions": [P]}`` of prompts, from which rollouts are made in the step.

    The first questions of the task are for training, the last ones for validation. Some of the first are evaluated,
    too, to tell what is memorised from what generalises. A question that is repeated counts once, where it comes
    first, and the warm-up leaves out all questions that are held out.

    Args:
        task: The questions and their scores; without repeats it is the attribute ``task``, numbered anew.
        batch_size: Number of prompts of a step, per process.
        holdout: Fraction of the questions that is held out, in (0, 1).
        seen: Number of training questions that are evaluated, too; 0 for none.
        eval_batch_size: Number of prompts of a validation batch.
        warmup: The task that a policy is warmed up on; None for the questions for training.
        sampler: Makes the sampler of the training prompts from these and ``batch_size``; None reshuffles every epoch.

    Raises:
        ValueError: If an argument is out of its range, or no question is left for training or for the warm-up.
    """

    def __init__(
        self,
        task: Task,
        batch_size: int = 32,
        holdout: float = 0.25,
        seen: int = 0,
        eval_batch_size: int = 64,
        warmup: Task | None = None,
        sampler: Callable[[Any, int], Sampler] | None = None,
    ) -> None:
        super().__init__()
        check_number("holdout", holdout, "(0, 1)")
        check_integer("seen", seen, 0)
        check_integer("batch_size", batch_size, 1)
        first = list({task.question(i): i for i in reversed(range(len(task)))}.values())[::-1]
        if len(first) == 1 < len(task):
            rank_zero_warn("Prompts: all questions of the task are equal, so that the one held out is trained on.")
            first = list(range(len(task)))
        self.task = task if len(first) == len(task) else SomeQuestions(task, first)
        self.train_size = len(first) - max(1, round(holdout * len(first)))
        if self.train_size < 1:
            raise ValueError(f"Argument `task` must have 2 different questions or more, but has {len(first)}.")
        self.seen: int = check_integer("seen", seen, 0, self.train_size + 1)
        self.batch_size: int = check_integer("batch_size", batch_size, 1, self.train_size + 1)
        self.eval_batch_size: int = check_integer("eval_batch_size", eval_batch_size, 1)
        self.sampler = sampler
        self.warmup = None if warmup is None else self._not_held_out(warmup)

    def _not_held_out(self, task: Task) -> Task:
        """The questions of another task that are not among those held out."""
        held_out = {self.task.question(i) for i in range(self.train_size, len(self.task))}
        ids = [i for i in range(len(task)) if task.question(i) not in held_out]
        if not ids:
            raise ValueError("Argument `warmup` must have questions that are not held out, but has none.")
        return task if len(ids) == len(task) else SomeQuestions(task, ids)

    def solved(self, i: int) -> tuple[str, str]:
        """A question to warm up on, and its solution.

        Args:
            i: Any integer >= 0; questions repeat after the last.

        Raises:
            ValueError: If the task has no solutions.
        """
        task, size = (self.task, self.train_size) if self.warmup is None else (self.warmup, len(self.warmup))
        if not hasattr(task, "solution"):
            raise ValueError(f"Argument `warmup_steps` must be 0 for {type(task).__name__}, which has no `solution`.")
        return task.question(i % size), task.solution(i % size)

    def _loader(self, ids: range | Questions, size: int, **options: Any) -> DataLoader:
        return DataLoader(ids, size, collate_fn=self._collate, **options)  # type: ignore[arg-type]

    def _collate(self, ids: list[int]) -> dict[str, Any]:
        return {"ids": torch.tensor(ids), "questions": [self.task.question(i) for i in ids]}

    @property
    def prompts(self) -> Questions:
        """The training prompts, without repeats."""
        return Questions(self.task, self.train_size)

    def predict_dataloader(self) -> DataLoader:
        """Training prompts, in order."""
        return self._loader(self.prompts, self.eval_batch_size)

    def train_dataloader(self) -> DataLoader:
        """Training prompts, shuffled; a last batch with fewer prompts is left out.

        Raises:
            ValueError: If there are fewer prompts than the batches of all processes take.
        """
        processes = 1 if self.trainer is None else self.trainer.world_size
        if self.batch_size * processes > self.train_size:
            raise ValueError(
                f"Argument `batch_size` must be in [1, {self.train_size // processes}] on {processes} processes, but "
                f"got {self.batch_size!r}."
            )
        prompts = self.prompts
        how = sampled(self, prompts, self.sampler)
        return self._loader(prompts, self.batch_size, drop_last=True, **how)

    def val_dataloader(self) -> list[DataLoader]:
        """Held-out prompts, and the prompts that are seen in training."""
        parts = [range(self.train_size, len(self.task)), range(self.seen)]
        return [self._loader(part, self.eval_batch_size) for part in parts if len(part)]
