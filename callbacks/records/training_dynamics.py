"""What training shows of every sample, from the forward pass that it runs anyway."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import IterableDataset

from curation.batch import batch_size
from curation.callbacks.lightning.collectives import agree, gather_samples
from curation.callbacks.lightning.loggers import not_essential
from curation.callbacks.lightning.seam import BatchSeam, SeamClient, check_one_loader
from curation.callbacks.online.choice import Choice, SelectionListener
from curation.callbacks.online.loss_check import LossCheck
from curation.callbacks.online.online_selection import OnlineSelection
from curation.callbacks.online.training_losses import TrainingOutcomes, step_loss
from curation.callbacks.records.entries import no_sample_ids, sample_ids_of
from curation.callbacks.records.store_record import StoreRecord
from curation.callbacks.samplers.dynamic_data_pruning import DynamicDataPruning
from curation.checks import check_flag, check_path
from curation.instances.selection_index import fingerprint
from curation.records.dynamics import SampleDynamics
from curation.records.dynamics_store import DynamicsStore
from curation.scoring import OUTCOMES


class TrainingDynamics(StoreRecord[DynamicsStore], SeamClient, SelectionListener):
    """Records loss, margin and probability of the label of every sample over its visits, for an audit of the data.

    The values are those of the logits that ``training_step`` makes; nothing is forwarded for them. Of a module that
    leaves its losses in ``sample_losses`` only the losses are known. Rows that are trained on are entered, from all
    ranks in one collective a step, so the record is equal on all ranks, and is saved with checkpoints. 61 bytes a
    sample on the device (:class:`~curation.records.dynamics_store.DynamicsStore`). When the fit ends, on an error or
    an interruption too, rank 0 writes :class:`~curation.records.dynamics.SampleDynamics`, which ``curation audit``
    reads. Needs sample ids, unless ``DynamicDataPruning`` draws the samples.

    Args:
        path: The Parquet file; an earlier one is replaced.
        size: Number of samples, more than the largest id; None for the length of the training data set. Compared with
            the ids of the first batch.
        every_epoch: Whether the record is also written at the end of every epoch, to ``NAME-epoch=0.parquet`` and so
            on: the values of one epoch are the differences of two of them.

    Attributes:
        store: The record; None before the first batch was trained on.

    Raises:
        TypeError: If the samples have no ids, or the outputs of the rows are not known.
        ValueError: If an argument is of the wrong type, ``size`` is not more than every id of the first batch, or the
            file cannot be written.

    Example:
        >>> dynamics = TrainingDynamics("runs/dynamics.parquet")
        >>> callbacks = [dynamics]  # Trainer(callbacks=callbacks).fit(module, loader), then
        >>> dynamics.path  # curation audit runs/dynamics.parquet --output audit.csv
        'runs/dynamics.parquet'
    """

    store_type = DynamicsStore

    def __init__(self, path: str | Path, size: int | None = None, every_epoch: bool = False) -> None:
        super().__init__(size)
        self.path: str = check_path("path", path)
        self.every_epoch = check_flag("every_epoch", every_epoch)
        self._reset()

    def _reset(self) -> None:
        self._outcomes: TrainingOutcomes | None = None
        self._check = LossCheck()
        self._listens = False
        self._rows: int | None = None  # of the batch of this step; None where it is not trained on
        self._ids: Tensor | None = None  # of its rows, as soon as they are known
        self._values: Tensor | None = None  # as soon as the step has made them
        self._fingerprint = ""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier fit; find out whether another callback chooses the rows."""
        super().setup(trainer, pl_module, stage)
        if self.fitting:
            self._reset()
            callbacks = trainer.callbacks  # type: ignore[attr-defined]
            self._listens = any(isinstance(c, (OnlineSelection, DynamicDataPruning)) for c in callbacks)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse several data loaders, and a file that cannot be written."""
        check_one_loader(trainer, self)
        super().on_train_start(trainer, pl_module)
        agree(trainer, self._check_file)
        dataset: Any = getattr(trainer.train_dataloader, "dataset", None)
        if (
            hasattr(dataset, "__getitem__")
            and hasattr(dataset, "__len__")
            and not isinstance(dataset, IterableDataset)
        ):
            self._fingerprint = fingerprint(dataset)

    def _check_file(self) -> None:
        try:
            Path(self.path).parent.mkdir(parents=True, exist_ok=True)
            if Path(self.path).is_dir():
                raise IsADirectoryError("that is a folder")
        except OSError as error:
            raise ValueError(f"Argument `path` must name a file, but got {self.path!r}: {error}") from error

    # ------------------------------------------------------------------ a step

    def curate(self, trainer: Trainer, pl_module: LightningModule, batch: Any, sample_ids: Tensor | None) -> Any:
        """The batch as it is; its ids are remembered."""
        if self not in trainer.callbacks:  # type: ignore[attr-defined]  # a tuner's step, which must leave no trace
            return batch
        if sample_ids is None and not self._listens:
            raise no_sample_ids(self)
        self._ids, self._values = None if self._listens else sample_ids, None
        self._rows = batch_size(batch)
        return batch

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Watch the logits of the batch as all callbacks have left it."""
        if self._rows is None:  # one that is not trained on, as at the end of stochastic weight averaging
            return
        BatchSeam.check(trainer, batch)
        if self._outcomes is None:
            self._outcomes = TrainingOutcomes(pl_module, batch)
            rank_zero_info(f"TrainingDynamics: losses by {self._outcomes.name}.")
        self._rows = batch_size(batch)
        self._outcomes.watch(batch, self._rows)
        if not (self._listens or self._check.done):  # a selection has a check of its own
            self._check.watch(self._outcomes.route, self._outcomes.criterion, batch, self._rows)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the values of the step, and enter them."""
        if self._rows is None or self._outcomes is None:
            return
        values = self._outcomes.take_of_step(self._rows, outputs)
        if values is None:
            values = torch.full((self._rows, len(OUTCOMES)), torch.nan, device=pl_module.device)
        if not (self._listens or self._check.done or hasattr(pl_module, "sample_weights")):
            loss = step_loss(outputs)
            whole = loss * trainer.accumulate_grad_batches if isinstance(loss, Tensor) else None
            self._check.compare(pl_module, whole, f"`{self._outcomes.name}`", "leave the losses in `sample_losses`")
        self._rows, self._values = None, values
        self._enter(trainer)

    def on_selection(self, trainer: Trainer, pl_module: LightningModule, step: int, choice: Choice) -> None:
        """Learn which rows were trained on, before or after the values are there."""
        ids = sample_ids_of(self, choice)
        self._ids = ids if choice.rows is None else ids[choice.rows.to(ids.device, non_blocking=True)]
        self._enter(trainer)

    def _enter(self, trainer: Trainer) -> None:
        if self._ids is None or self._values is None:
            return
        ids = self._ids.to(self._values.device, non_blocking=True)
        ids, values = gather_samples(trainer, ids, self._values)
        self.store_for(trainer, ids).update(ids, values)
        self._ids = self._values = None

    # ------------------------------------------------------------------ the file

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the record of this epoch and those before, where asked for."""
        if self.every_epoch:
            path = Path(self.path)
            self._write(trainer, path.with_name(f"{path.stem}-epoch={trainer.current_epoch}{path.suffix}"))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the record."""
        self._write(trainer, Path(self.path))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write the record, and clean up."""
        with not_essential("The record of TrainingDynamics"):  # the error that ended the fit is the one to raise
            self._write(trainer, Path(self.path))
        super().on_exception(trainer, pl_module, exception)

    def _write(self, trainer: Trainer, path: Path) -> None:
        if self.store is not None and trainer.is_global_zero:
            SampleDynamics.of_store(self.store, self._fingerprint).save(path)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Release the module."""
        super().teardown(trainer, pl_module, stage)
        self._check.stop()
        if self._outcomes is not None:
            self._outcomes.stop()
        self._outcomes = None
