"""The forward pass over the candidates."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from curation.batch import batch_size
from curation.callbacks.lightning.loop import logs_now
from curation.scoring import (
    IGNORED,
    Criterion,
    Route,
    find_criterion,
    find_route,
    head_as_identity,
    per_sample_from_hidden,
    per_sample_loss,
    step_route,
)


@dataclass
class Scoring:
    """The result of scoring one candidate batch.

    Attributes:
        scores: floating ``[B]``, what the rule's ``score`` returned; None before it did.
        lengths: fp32 ``[B]``, scored positions of sequences; None where the samples are no sequences, or the rule
            asks for no outputs.
        losses: fp32 ``[B]``, losses of the candidates; None except on logging steps.
    """

    scores: Tensor | None = None
    lengths: Tensor | None = None
    losses: Tensor | None = None

    @staticmethod
    def joined(parts: "list[Scoring]", places: Tensor) -> "Scoring":
        """The result for a candidate batch of those for its parts, and of the places int64 ``[B]`` of its rows."""

        def join(values: list[Tensor | None]) -> Tensor | None:
            known = [value for value in values if value is not None]
            return torch.cat(known)[places] if len(known) == len(values) else None

        return Scoring(lengths=join([part.lengths for part in parts]), losses=join([part.losses for part in parts]))


class ScoringPass:
    """Runs the module on the candidates by the route that :func:`curation.scoring.find_route` finds once.

    Attributes:
        name: Name of the route, for the log line at the start of the fit; None before the first pass.
        route: The route; None before the first pass.
        criterion: Settings of the module's cross-entropy, as far as they are known.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.route: Route | None = None
        self.criterion = Criterion()

    def run(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        head: nn.Linear | None,
        context: AbstractContextManager[None],
        check: bool = False,
    ) -> tuple[Tensor, Any, Scoring]:
        """Outputs and targets of the candidates, and what they say of the lengths and the loss.

        Args:
            trainer: The trainer.
            pl_module: The module that is trained.
            batch: The candidate batch, on the device.
            head: Output head whose input is returned in place of the logits; None for logits.
            context: Context in which the module runs without side effects.
            check: Check the targets on an accelerator, too, for which the host waits; done of the first batch.

        Returns:
            ``[B, T, V]`` with int64 ``[B, T]``, or ``[B, C]`` with ``[B]``, or losses ``[B]`` with None; and a
            :class:`Scoring` without scores.

        Raises:
            TypeError: If the module gives no per-sample outputs, or targets that are no classes of its logits
                (checked of the first batch, and on a CPU); the message names the method to add.
            ValueError: If it gives another number of rows than the batch has.
        """
        first = self.route is None
        if self.route is None:
            check = True
            self.route = find_route(pl_module, batch)
            self.criterion = find_criterion(pl_module)
        scoring = Scoring()
        with context:
            with head_as_identity(head):
                try:
                    outputs, targets = self._outputs(batch, head is None, check)
                except TypeError as error:
                    route = step_route(pl_module) if first else None
                    if route is None:
                        raise
                    try:
                        outputs, targets = route(batch)
                    except TypeError as uncertain:
                        if uncertain.__cause__ is None:
                            raise uncertain from error
                        raise error from uncertain.__cause__
                    self.route = route
            if first:
                self.name = self.route.name + ("" if targets is None else self.criterion.describe())
            if logs_now(trainer):
                loss = self.criterion.bind(per_sample_loss)
                scoring.losses = (
                    loss(outputs, targets)
                    if head is None or targets is None
                    else per_sample_from_hidden(loss, outputs, targets, head)
                )
        if len(outputs) != batch_size(batch):
            raise ValueError(f"The scored outputs have {len(outputs)} rows for a batch of {batch_size(batch)}.")
        if targets is not None and targets.dim() == 2:
            scoring.lengths = targets.ne(IGNORED).sum(1).float()
        return outputs, targets, scoring

    def _outputs(self, batch: Any, logits: bool, check: bool) -> tuple[Tensor, Tensor | None]:
        assert self.route is not None
        outputs, targets = self.route(batch)
        if targets is None:
            return outputs, None
        targets = self.criterion.mask(targets)
        if logits and (check or targets.device.type == "cpu"):
            _check_classes(outputs, targets)
        return outputs, targets

    def forget(self) -> None:
        """Release the module; the name of the route stays."""
        self.route = None
        self.criterion = Criterion()


def _check_classes(logits: Tensor, targets: Tensor) -> None:
    classes = logits.size(-1)
    wrong = targets[targets.ne(IGNORED) & (targets.lt(0) | targets.ge(classes))]
    if len(wrong):
        raise TypeError(
            f"The outputs to score must have a logit for every class, but {classes} logits came with a target "
            f"{int(wrong[0])}. Add a method `score_step(self, batch)` that returns the `(logits, targets)` of the "
            "loss; target -100 marks positions to ignore."
        )
