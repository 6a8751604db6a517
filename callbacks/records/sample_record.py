"""The last score of every sample, and how often it was seen and kept."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from curation.callbacks.lightning.collectives import gather_rows
from curation.callbacks.lightning.fit_callback import FitCallback
from curation.callbacks.lightning.loggers import log_histogram, not_essential, takes_histograms
from curation.callbacks.lightning.loop import logs_now
from curation.callbacks.online.choice import Choice, SelectionListener
from curation.callbacks.records.entries import candidate_entries, check_selection
from curation.checks import check_integer
from curation.records.score_store import ScoreStore


class SampleRecord(FitCallback, SelectionListener):
    """Remembers the last score of every sample, and how often it was seen and kept.

    The record is equal on all ranks: the candidates of each step are gathered in rank order. A score is as old as the
    last step in which the sample was a candidate (see :class:`~curation.records.score_store.ScoreStore`). The record
    is saved with checkpoints. Logs ``curation/never_kept_fraction``, and at the end of the fit the histogram
    ``curation/times_kept`` to W&B and TensorBoard. Needs sample ids.

    Args:
        size: Number of samples, more than the largest id; None for the length of the training data set. Compared with
            the ids of the first batch.

    Attributes:
        store: The record; None before the first batch was trained on.

    Raises:
        TypeError: If the samples have no ids.
        ValueError: If ``size`` is no positive integer, or not more than every id of the first batch; if the trainer
            has no online selection.

    Example:
        >>> from curation.callbacks import UniformSelection
        >>> record = SampleRecord(size=50_000)
        >>> callbacks = [UniformSelection(keep=0.5), record]  # Trainer(callbacks=callbacks).fit(module, loader)
        >>> record.store is None  # after the fit: record.store.scores, record.store.kept
        True
    """

    def __init__(self, size: int | None = None) -> None:
        self.size: int | None = check_integer("size", size, 1, optional=True)
        self.store: ScoreStore | None = None
        self._state: dict[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier fit."""
        super().setup(trainer, pl_module, stage)
        if self.fitting:
            check_selection(self, trainer)
            self.store = self._state = None

    def on_selection(self, trainer: Trainer, pl_module: LightningModule, step: int, choice: Choice) -> None:
        """Enter the candidates of all ranks."""
        ids, scores, kept = candidate_entries(self, choice)
        if trainer.world_size > 1:
            # One collective of integers: a float would round an id.
            rows = gather_rows(trainer, torch.stack([ids, scores.view(torch.int32).long(), kept], dim=1))
            ids, scores, kept = rows[:, 0], rows[:, 1].int().view(torch.float32), rows[:, 2]
        if self.store is None:
            size = self.size or len(trainer.train_dataloader.dataset)  # type: ignore[union-attr]
            if int(ids.max()) >= size:  # only of the first batch, since this waits for the device
                raise ValueError(
                    f"Argument `size` must be more than every sample id, but {int(ids.max())} >= {size}."
                )
            self.store = ScoreStore(size, ids.device)
            if self._state is not None:
                self.store.load_state_dict(self._state)
        self.store.update(ids, scores, kept, step)
        if logs_now(trainer):
            never = self.store.kept.eq(0).float().mean()
            pl_module.log("curation/never_kept_fraction", never, on_step=True, on_epoch=False, batch_size=1)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log how often samples were kept."""
        if self.store is not None and takes_histograms(trainer):
            with not_essential("The histogram 'curation/times_kept'"):
                log_histogram(trainer, "curation/times_kept", self.store.kept.tolist())

    def state_dict(self) -> dict[str, Any]:
        """The record; equal on all ranks."""
        return {"store": self._state if self.store is None else self.store.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        """Keep the record of the checkpoint until the first batch makes the store."""
        self._state = state["store"]
