"""Whether the loss that is scored is the loss of the training step."""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from curation.callbacks.online.training_losses import WatchedLogits
from curation.scoring import IGNORED, Criterion, Route, per_sample_loss

TOLERANCE = 0.05  # relative; a small auxiliary loss changes no ranking
REMEDY = "add a method `score_step(self, batch)` that returns `(logits, targets)`"
STEPS = 8  # class weights do not show in rows of one class


class LossCheck:
    """Compares the losses of the first training steps with the cross-entropy of the logits that they make.

    They differ where ``forward`` returns embeddings, or where the step's loss weights classes, ignores another index
    or is another loss. One warning then says what is scored. A ``score_step`` is not checked.

    Attributes:
        done: Whether enough losses were compared.
    """

    def __init__(self) -> None:
        self.done = False
        self._steps = 0
        self._logits = WatchedLogits()

    def watch(self, route: Route | None, criterion: Criterion, batch: Any, rows: int) -> None:
        """Compute the losses of the logits of the next training step.

        Args:
            route: The route of the scores; None where the rule scores no outputs.
            criterion: The criterion of the scores.
            batch: The batch that is trained on.
            rows: Number of its rows.
        """

        def compute(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            return mean_losses(logits, criterion.mask(targets), criterion)

        self._logits.watch(route, batch, rows, compute)

    def compare(self, module: LightningModule, loss: Any, name: str, remedy: str = REMEDY) -> None:
        """Warn if the loss of a step is neither the mean over rows nor that over scored positions.

        Args:
            module: The module that is trained.
            loss: Loss of the step, before it is divided for accumulation; anything but a tensor is left out.
            name: Name of the route of the scores.
            remedy: What the warning tells to do.
        """
        losses = self._logits.take()
        if not isinstance(loss, Tensor):  # the step skipped its batch
            return
        if losses is None:  # the step makes its logits in another way
            self._end()
            return
        step, rows, positions = torch.stack([loss.detach().float().mean(), *losses]).tolist()
        if not all(value < float("inf") for value in (step, rows, positions)):  # a batch without labels
            return
        self._steps += 1
        if self._steps == STEPS:
            self._end()
        if min(abs(step - rows), abs(step - positions)) > TOLERANCE * abs(step) + 1e-3:
            self._end()
            step_name = f"{type(module).__name__}.training_step"
            rank_zero_warn(
                f"The loss of `{step_name}` is {step:.4g}, but the cross-entropy of {name} of the same rows, which "
                f"is scored, is {rows:.4g}. If the outputs are no logits, or the loss has class weights, another "
                f"`ignore_index`, label smoothing or further terms, {remedy}; the settings of the module's only "
                "`torch.nn.CrossEntropyLoss` are used."
            )

    def _end(self) -> None:
        self.done = True
        self.stop()

    def stop(self) -> None:
        """Remove the hook."""
        self._logits.stop()


def mean_losses(logits: Tensor, targets: Tensor, criterion: Criterion) -> tuple[Tensor, Tensor]:
    """Mean losses over rows, and over scored positions: two fp32 scalars.

    Args:
        logits: ``[B, T, V]`` or ``[B, C]``.
        targets: int64 ``[B, T]`` or ``[B]``; -100 is not scored.
        criterion: Weights of the classes and label smoothing.
    """
    losses = criterion.bind(per_sample_loss)(logits, targets)
    scored = targets.ne(IGNORED)
    counts = scored.sum(1) if targets.dim() == 2 else scored.long()
    total = counts.sum() if criterion.weight is None else (criterion.weight[targets.clamp(min=0)] * scored).sum()
    return losses.nanmean(), (losses.nan_to_num() * counts).sum() / total
