"""Weights of samples that come with the data."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from curation.batch import batch_size
from curation.callbacks.lightning.seam import SeamClient, check_one_loader
from curation.callbacks.online.hard_samples import HardSampleSelection
from curation.callbacks.online.row_weights import RowWeights, WeighsRows
from curation.callbacks.samplers.dynamic_data_pruning import DynamicDataPruning
from curation.checks import check_integer, check_number, check_text
from curation.scoring import IGNORED, find_logits_maker


class WeightedLoss(WeighsRows, SeamClient):
    """Weighs the loss of every sample by a column of its batch, in any module.

    The column is taken out of the batch before ``training_step``. The gradient is weighed row by row
    (:class:`~curation.callbacks.online.row_weights.RowWeights`), which is that of ``sum(w_i loss_i) / B`` where the
    loss is a mean over rows, of ``sum(w_i sum_t loss_it) / sum_i T_i`` where it is a mean over positions, and of any
    mixture of both. Nothing is normalised: weights with a mean of 1 leave the size of the steps. The loss that the
    module logs is unweighted. In evaluation the column is taken out, and weighs nothing.

    A module with ``sample_weights`` multiplies its losses itself; one with ``sample_losses`` leaves them there; of
    any other the logits of ``forward`` are found, as by :class:`~curation.callbacks.DynamicDataPruning`. Where a part
    of the loss is not made of these, the fit stops before the first gradient is used.

    Args:
        column: Key of the weights in a mapping, or their place in a tuple or list (not negative).

    Attributes:
        batches: Batches of this process that were weighed in the fit, or since it was resumed.

    Raises:
        TypeError: If a batch has no such column, or the weights do not reach the loss.
        ValueError: If the weights are not ``[B]``, or on a CPU not finite or negative; if another callback weighs
            rows.

    Example:
        >>> callbacks = [WeightedLoss("weight")]  # batches {"input_ids": ..., "weight": fp32 [B]}
    """

    def __init__(self, column: str | int = "weight") -> None:
        if isinstance(column, str):
            check_text("column", column or None)
        else:
            check_integer("column", column, 0)
        self.column = column
        self.batches = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse two callbacks that weigh rows."""
        super().setup(trainer, pl_module, stage)
        self.batches = 0
        for other in trainer.callbacks if stage == "fit" else ():  # type: ignore[attr-defined]
            importance = isinstance(other, HardSampleSelection) and other.rule == "importance"
            if importance or (isinstance(other, (DynamicDataPruning, WeightedLoss)) and other is not self):
                raise ValueError(f"WeightedLoss cannot weigh rows that {type(other).__name__} weighs, too.")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse several data loaders."""
        check_one_loader(trainer, self)

    def curate(self, trainer: Trainer, pl_module: LightningModule, batch: Any, sample_ids: Tensor | None) -> Any:
        """The batch without its weights, which are set."""
        batch, weights = self._split(batch)
        if weights is None:
            raise TypeError(f"Argument `column` must name weights in the batch, but it has no {self.column!r}.")
        size = batch_size(batch)
        if not (isinstance(weights, Tensor) and weights.shape == (size,)):
            got = list(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
            raise ValueError(
                f"The column {self.column!r} must hold one weight for each of {size} rows, but is {got}."
            )
        weights = weights.float()
        if weights.device.type == "cpu" and not bool((weights.isfinite() & (weights >= 0)).all()):
            raise ValueError(
                f"The column {self.column!r} must be finite and not negative, but is {weights.tolist()}."
            )
        self._set(pl_module, batch, weights)
        return batch

    def _set(self, pl_module: LightningModule, batch: Any, weights: Tensor, ratio: Tensor | None = None) -> None:
        if self.row_weights is None:
            self.row_weights = RowWeights(pl_module, find_logits_maker(pl_module, batch))
        self.row_weights.set(weights, ratio)

    def strip(self, batch: Any) -> Any:
        """The batch without its weights, where it has any."""
        return self._split(batch)[0]

    def _split(self, batch: Any) -> tuple[Any, Any]:
        """The batch without the column, and the column; None where there is none."""
        if isinstance(self.column, str):
            if not isinstance(batch, Mapping) or self.column not in batch:
                return batch, None
            rest = {key: value for key, value in batch.items() if key != self.column}
            return (rest if type(batch) is dict else type(batch)(rest)), batch[self.column]  # type: ignore[call-arg]
        if not isinstance(batch, (tuple, list)) or self.column >= len(batch):
            return batch, None
        if not isinstance(batch[self.column], Tensor):  # a sample, of a list of them
            return batch, None
        others = [value for place, value in enumerate(batch) if place != self.column]
        return others if isinstance(batch, list) else tuple(others), batch[self.column]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The weights are those of one step only."""
        if self.row_weights is not None:
            if not pl_module.automatic_optimization and outputs is not None:  # it may call no hook
                self.row_weights.check()
            self.row_weights.set(None)
            self.batches += 1


class TokenWeightedLoss(WeightedLoss):
    """Weighs every batch by the number of its labels, so that a token weighs the same in each.

    A mean over the tokens of a batch weighs those of a short batch more than those of a long one. Here the gradient
    is multiplied by ``n / tokens``, with ``n`` labels ``labels[:, 1:] != -100`` of this process, which is that of the
    sum of all losses over ``tokens``: over batches, micro-batches and processes, every token has the same weight.
    Otherwise as :class:`WeightedLoss`.

    Args:
        tokens: Labels of a mean batch of a process. Another number scales the gradient, which Adam does not see.

    Raises:
        TypeError: If a batch has no ``labels`` ``[B, T]``, or the loss is a mean over rows in place of tokens.
        ValueError: If ``tokens`` is not in (0, inf); if another callback weighs rows.

    Example:
        >>> callbacks = [TokenWeightedLoss(tokens=300)]  # Trainer(callbacks=callbacks).fit(module, loader)
    """

    def __init__(self, tokens: float) -> None:
        super().__init__()
        self.tokens: float = check_number("tokens", tokens, "(0, inf)")

    def curate(self, trainer: Trainer, pl_module: LightningModule, batch: Any, sample_ids: Tensor | None) -> Any:
        """The batch; its weight is set."""
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if not (isinstance(labels, Tensor) and labels.dim() == 2):
            raise TypeError("TokenWeightedLoss counts `labels` [B, T] of the batch, but it has none.")
        weight = labels[:, 1:].ne(IGNORED).sum() / self.tokens
        self._set(pl_module, batch, weight.float().repeat(len(labels)), torch.ones((), device=labels.device))
        return batch

    def strip(self, batch: Any) -> Any:
        """The batch as it is."""
        return batch

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise if the loss is no mean over tokens."""
        super().on_after_backward(trainer, pl_module)
        if self.row_weights is not None and self.row_weights.positions is False:
            raise TypeError(
                f"TokenWeightedLoss needs a loss that is a mean over tokens, but that of "
                f"{type(pl_module).__name__} is a mean over rows."
            )
