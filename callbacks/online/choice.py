"""What a selection tells the callbacks that listen to it."""

from dataclasses import dataclass

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor


@dataclass
class Choice:
    """What was chosen of a candidate batch.

    Attributes:
        size: Number of candidates, ``B``.
        most: The largest such number over all ranks in the first batch of the fit.
        k: Rows to keep; fewer where ``B < k``.
        rows: int64 ``[min(k, B)]``, the kept rows; None where all are kept.
        weights: fp32 ``[min(k, B)]``, where they do not weigh the same.
        has_scores: Whether ``scores`` say something of the samples; they are random numbers otherwise.
        scores: floating ``[B]``; None where all rows are kept without asking.
        sample_ids: int64 ``[B]``, where the samples have ids.
        lengths: fp32 ``[B]``, scored positions, of sequences.
        candidate_loss: Mean loss of the candidates, on logging steps.
    """

    size: int
    most: int
    k: int
    rows: Tensor | None = None
    weights: Tensor | None = None
    has_scores: bool = True
    scores: Tensor | None = None
    sample_ids: Tensor | None = None
    lengths: Tensor | None = None
    candidate_loss: Tensor | None = None


class SelectionListener:
    """A callback that is told of every choice once it is trained on, on every rank; may hold a collective."""

    def on_selection(self, trainer: Trainer, pl_module: LightningModule, step: int, choice: Choice) -> None:
        """Take note of a choice.

        Args:
            trainer: The trainer.
            pl_module: The module that is trained.
            step: Candidate batches of this rank that were trained on before.
            choice: Of this rank.
        """
