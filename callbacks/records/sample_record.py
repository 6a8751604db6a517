"""The last score of every sample, and how often it was seen and kept."""

import torch
from lightning.pytorch import LightningModule, Trainer

from curation.callbacks.lightning.collectives import gather_samples
from curation.callbacks.lightning.loggers import log_histogram, not_essential, takes_histograms
from curation.callbacks.lightning.loop import logs_now
from curation.callbacks.online.choice import Choice, SelectionListener
from curation.callbacks.records.entries import candidate_entries, check_selection
from curation.callbacks.records.store_record import StoreRecord
from curation.records.score_store import ScoreStore


class SampleRecord(StoreRecord[ScoreStore], SelectionListener):
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

    store_type = ScoreStore

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a trainer without a selection; forget an earlier fit."""
        super().setup(trainer, pl_module, stage)
        if self.fitting:
            check_selection(self, trainer)

    def on_selection(self, trainer: Trainer, pl_module: LightningModule, step: int, choice: Choice) -> None:
        """Enter the candidates of all ranks."""
        ids, scores, kept = candidate_entries(self, choice)
        ids, values = gather_samples(trainer, ids, torch.stack([scores, kept.float()], 1))
        store = self.store_for(trainer, ids)
        store.update(ids, values[:, 0], values[:, 1].int(), step)
        if logs_now(trainer):
            never = store.kept.eq(0).float().mean()
            pl_module.log("curation/never_kept_fraction", never, on_step=True, on_epoch=False, batch_size=1)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log how often samples were kept."""
        if self.store is not None and takes_histograms(trainer):
            with not_essential("The histogram 'curation/times_kept'"):
                log_histogram(trainer, "curation/times_kept", self.store.kept.tolist())
