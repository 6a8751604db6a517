"""What a selection reports to the callbacks that listen to it."""

from dataclasses import dataclass

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor


@dataclass
class Choice:
    """The rows that were chosen from a candidate batch.

    Attributes:
        size: Number of candidates, ``B``.
        k: Rows to keep; fewer are kept where ``B < k``.
        rows: int64 ``[min(k, B)]``, the kept rows; None where all are kept.
        weights: fp32 ``[min(k, B)]``, weights of the kept rows; None where they are equal.
        has_scores: Whether ``scores`` describe the samples; they are random numbers otherwise.
        scores: floating ``[B]``; None where all rows are kept without scoring.
        sample_ids: int64 ``[B]``; None where the samples have no ids.
        lengths: fp32 ``[B]``, scored positions of sequences; None where the samples are no sequences.
        candidate_loss: fp32 scalar, mean loss of the candidates; None except on logging steps.
    """

    size: int
    k: int
    rows: Tensor | None = None
    weights: Tensor | None = None
    has_scores: bool = True
    scores: Tensor | None = None
    sample_ids: Tensor | None = None
    lengths: Tensor | None = None
    candidate_loss: Tensor | None = None

    @property
    def trained(self) -> int:
        """Number of rows that are trained on."""
        return min(self.k, self.size)


class SelectionListener:
    """A callback that gets every choice once it is trained on, on every rank; it may hold a collective."""

    def on_selection(self, trainer: Trainer, pl_module: LightningModule, step: int, choice: Choice) -> None:
        """Called with a choice once its rows are trained on.

        Args:
            trainer: The trainer.
            pl_module: The module that is trained.
            step: Candidate batches of this rank that were trained on before.
            choice: The choice of this rank.
        """
