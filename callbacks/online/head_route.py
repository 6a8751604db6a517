"""Scores from the input of the output head, without forming the logits of every position."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from curation.batch import take_rows
from curation.callbacks.online.online_selection import OnlineSelection
from curation.scoring import IGNORED, find_output_head

HEAD_TOLERANCE = 0.02  # bf16 logits differ by a few 1e-3, a soft cap by far more


class HeadRoute:
    """Finds the output head once, and checks on one sample that it makes the logits of its input.

    Args:
        head: ``"auto"``, ``"none"``, or the path of the ``torch.nn.Linear`` that makes the logits.

    Attributes:
        used: Whether the head's input is used; None before it was tried.
        reason: Reason why it is not, for the log line at the start of the fit; empty where it is.
        of_losses: Whether the module gives losses in place of logits.
    """

    def __init__(self, head: str) -> None:
        self.head = head
        self.used: bool | None = None
        self.reason = ""
        self.of_losses = False
        self._layer: nn.Linear | None = None

    def find(
        self,
        selection: OnlineSelection,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
    ) -> nn.Linear | None:
        """The head whose input is to be scored, or None for logits.

        Args:
            selection: The selection that scores the batch.
            trainer: The trainer.
            pl_module: The module that is trained.
            batch: The candidate batch, on the device.

        Raises:
            ValueError: If ``head`` names a layer without which the module fails, or that is not linear.
        """
        if self._layer is None and self.used is not False:
            self._layer = find_output_head(pl_module, self.head, batch)
            self.used = False if self._layer is None else self.used
        if self._layer is not None and self.used is None:
            self.used = self._try(selection, trainer, pl_module, batch, self._layer)
        return self._layer if self.used else None

    def forget(self) -> None:
        """Release the module."""
        self._layer = None

    def _try(
        self,
        selection: OnlineSelection,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        head: nn.Linear,
    ) -> bool | None:
        """Whether the head makes the logits of the longest sample; None where that has no scored position."""
        try:
            first = take_rows(batch, torch.zeros(1, dtype=torch.int64, device=head.weight.device))
            if (
                selection.outputs(trainer, pl_module, first)[1] is None
            ):  # without logits there is no head to leave out
                self.of_losses = True
                return False
            _, targets = selection.outputs(trainer, pl_module, batch, head)
            scored = targets.ne(IGNORED)
            longest = take_rows(batch, (scored.sum(1) if scored.dim() == 2 else scored.long()).argmax()[None])
            hidden, targets = selection.outputs(trainer, pl_module, longest, head)
            logits, _ = selection.outputs(trainer, pl_module, longest)
            scored = targets.ne(IGNORED)
            with torch.no_grad():
                expected = logits[scored].float()
                difference = head(hidden[scored].to(head.weight.dtype)).float() - expected
                error = difference.norm() / expected.norm()
        except (RuntimeError, IndexError) as failure:  # the module does something to its logits that needs their size
            message = str(failure).splitlines()[0]
            if self.head != "auto":
                raise ValueError(
                    f"Argument `head` must name the layer whose output are the logits, or be 'none', but with "
                    f"{self.head!r} the module fails: {message}"
                ) from failure
            self.reason = f" (the head cannot be left out: {message})"
            return False
        known = expected.isfinite().all() & expected.norm().gt(0)
        error = torch.where(known, error.nan_to_num(nan=torch.inf), 0.0)
        largest, any_known = trainer.strategy.reduce(torch.stack([error, known]).float(), reduce_op="max").tolist()
        if not any_known:
            return None
        if largest >= HEAD_TOLERANCE:
            self.reason = f" (the head's output is {largest:.0%} off the logits)"
        return largest < HEAD_TOLERANCE
