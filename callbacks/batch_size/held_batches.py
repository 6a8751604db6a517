"""Batches that a process holds until the last of an optimizer step, which trains on the rows of all."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Trainer

from curation.callbacks.experts.global_batch_load_balancing import GlobalBatchLoadBalancing
from curation.callbacks.lightning.joined_loader import join
from curation.callbacks.lightning.loop import is_trained_on, training_loaders
from curation.callbacks.online.online_selection import OnlineSelection
from curation.callbacks.online.weighted_loss import WeightedLoss
from curation.callbacks.records.training_dynamics import TrainingDynamics
from curation.callbacks.rollouts.difficulty_adaptive_rollouts import DifficultyAdaptiveRollouts
from curation.callbacks.samplers.concept_coverage import ConceptCoverageMonitor
from curation.callbacks.samplers.round_training import RoundTraining
from curation.replace import replace_attribute

# What needs a training step for every batch of the data loader.
PER_BATCH = (
    DifficultyAdaptiveRollouts,
    GlobalBatchLoadBalancing,
    OnlineSelection,
    RoundTraining,
    TrainingDynamics,
    WeightedLoss,
)


class HeldBatches:
    """Calls ``training_step`` for the last batch of every optimizer step alone, with the rows of all its batches.

    For the others Lightning gets a loss of zero without weights, since several processes may not skip a batch.

    Args:
        trainer: The trainer.
        ends: Whether the current batch is the last of its step.

    Raises:
        TypeError: Beside a callback that needs a training step for every batch.
    """

    def __init__(self, trainer: Trainer, ends: Callable[[], bool]) -> None:
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        for other in callbacks:
            of_losses = isinstance(other, ConceptCoverageMonitor) and other.losses
            if of_losses or isinstance(other, PER_BATCH):
                raise TypeError(
                    f"{type(other).__name__} needs a training step for every batch: set `grow='accumulation'`, or "
                    "leave it out."
                )
        self._trainer, self._ends, self._batches = trainer, ends, list[Any]()
        self._step = trainer.strategy.training_step
        self._undo = replace_attribute(trainer.strategy, "training_step", self)

    def __bool__(self) -> bool:
        return bool(self._batches)

    def __call__(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Hold the batch, or train on it and those that are held."""
        if not is_trained_on(self._trainer):
            return self._step(batch, *args, **kwargs)
        self._batches.append(batch)
        if not self._ends():
            module = self._trainer.lightning_module
            zero = torch.zeros((), device=module.device, requires_grad=True)
            return zero if module.automatic_optimization else None
        (loader,) = training_loaders(self._trainer)
        batches, self._batches = self._batches, []
        return self._step(join(batches, loader), *args, **kwargs)

    def forget(self) -> None:
        """Leave out what is held: a hook has ended the epoch."""
        self._batches = []

    def remove(self) -> None:
        """Leave the strategy as it was."""
        self.forget()
        self._undo()
