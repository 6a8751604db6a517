"""The concepts and samples that a fit trained on."""

from collections.abc import Sized
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from curation.batch import batch_size
from curation.callbacks.lightning.collectives import gather_rows, gather_samples
from curation.callbacks.lightning.loggers import log_image, not_essential, picture_folder, save_figure
from curation.callbacks.lightning.loop import curated_loader, logs_now, skips_backward
from curation.callbacks.lightning.seam import SeamClient, check_one_loader
from curation.callbacks.online.choice import Choice, SelectionListener
from curation.callbacks.online.online_selection import OnlineSelection
from curation.callbacks.online.training_losses import TrainingLosses
from curation.checks import check_flag
from curation.metrics.concept_coverage import ConceptCoverage, plot_concepts
from curation.samplers.concept_aware import ConceptAwareSampler
from curation.samplers.concept_choice import MovingTargets, Targets, target_counts
from curation.samplers.concept_index import ConceptIndex

LOSSES = 100  # concepts whose losses are logged, at most
SAMPLES_AT_A_TIME = 2**20  # to count the concepts of


class ConceptCoverageMonitor(SeamClient, SelectionListener):
    """Logs which concepts and samples are trained on; chooses nothing.

    Every ``log_every_n_steps`` it logs, for the batch of all processes, ``concepts/coverage``, ``concepts/entropy``
    and ``concepts/target_distance`` (:class:`~curation.metrics.concept_coverage.ConceptCoverage`); for the fit so
    far, ``concepts/distinct_seen``, the fraction of the samples trained on at least once, and ``concepts/repeats``,
    how often these were trained on, on average. At the end of the fit it draws the concepts of the corpus and of the
    samples trained on: ``concepts.png`` in the folder of the logger, and in W&B. With ``losses`` it also logs
    ``concepts/loss/NAME`` of each concept: the mean training loss of the rows that have it, of all processes, since
    the last time it was logged. Needs sample ids, which it strips. Costs 4 bytes a sample on the device, and a gather
    of ids, and of losses, per step where there are several processes.

    Args:
        concepts: Concepts of every sample, or the file of
            :meth:`~curation.samplers.concept_index.ConceptIndex.save`. None for the concepts of the
            ``ConceptAwareSampler`` of the training data loader, else for the attribute ``concepts`` of the data
            module.
        targets: Target distribution for ``concepts/target_distance``. None for that of the sampler, else
            ``"uniform"``.
        losses: Whether to log the loss of each concept, of at most 100. Losses are those that the training step
            computes (:class:`~curation.callbacks.online.training_losses.TrainingLosses`).

    Attributes:
        visits: int32 ``[N]``, how often each sample was trained on; equal on all ranks.

    Raises:
        ValueError: If there are no concepts, or not one row for each sample, or the data loader has another batch
            size than its sampler; or more than 100 concepts with ``losses``.
        TypeError: If the samples have no ids, or the training data no length; or the losses of the rows are not
            known.

    Example:
        >>> index = ConceptIndex.from_lists([["cat"], ["dog", "cat"], ["dog"], []])
        >>> callbacks = [ConceptCoverageMonitor(index)]  # Trainer(callbacks=callbacks).fit(module, loader)
    """

    def __init__(
        self,
        concepts: ConceptIndex | str | Path | None = None,
        targets: Targets | None = None,
        losses: bool = False,
    ) -> None:
        check_concepts(concepts)
        self.losses = check_flag("losses", losses)
        self.concepts = concepts
        self.targets = targets
        self.visits: Tensor | None = None
        self._index: ConceptIndex | None = None
        self._weights: np.ndarray | None = None
        self._ids: Tensor | None = None
        self._folder: str | None = None
        self._selected = False
        self._moving: MovingTargets | None = None  # those of the sampler
        self._forget_losses()

    def _forget_losses(self) -> None:
        self._step: TrainingLosses | None = None
        self._rows: int | None = None  # of the batch of this step; None where it is not trained on
        self._trained: Tensor | None = None  # ids of its rows, as soon as they are known
        self._values: Tensor | None = None  # their losses, as soon as the step has made them
        self._unlogged: list[tuple[Tensor, Tensor]] = []  # ids and losses of all processes

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier fit; install the seam."""
        super().setup(trainer, pl_module, stage)
        if self.fitting:
            self.visits = self._ids = self._moving = None
            self._forget_losses()
            self._index = loaded(self.concepts)
            self._selected = any(isinstance(c, OnlineSelection) for c in trainer.callbacks)  # type: ignore[attr-defined]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the concepts of the sampler or the data module."""
        check_one_loader(trainer, self, named=not self.losses)
        batches = getattr(curated_loader(trainer), "batch_sampler", None)
        sampler = getattr(batches, "sampler", None)
        targets = self.targets
        if isinstance(sampler, ConceptAwareSampler):
            if batches.batch_size != sampler.batch_size:  # type: ignore[union-attr]
                raise ValueError(
                    f"The data loader must have the `batch_size` of its sampler, {sampler.batch_size}, but has "
                    f"{batches.batch_size!r}."  # type: ignore[union-attr]
                )
            self._index = self._index or sampler.concepts
            targets = self._of_sampler(sampler.targets) if targets is None else targets
        self._index = self._index or getattr(trainer.datamodule, "concepts", None)  # type: ignore[attr-defined]
        if self._index is None:
            raise ValueError(
                "Argument `concepts` must be given where neither the sampler is a ConceptAwareSampler nor the data "
                "module has `concepts`, but got None. (`overfit_batches` takes samplers away; and it is an argument "
                "`sampler` of the data loader, not `batch_sampler`.)"
            )
        check_length(self._index, trainer)
        if self.losses and len(self._index.names) > LOSSES:
            raise ValueError(
                f"Argument `losses` must be False for more than {LOSSES} concepts, but there are "
                f"{len(self._index.names)}."
            )
        self._folder = picture_folder(trainer)
        # Only the ratios of the targets matter here.
        self._weights = target_counts(self._index, "uniform" if targets is None else targets, 1)
        visits = torch.zeros(len(self._index), dtype=torch.int32) if self.visits is None else self.visits
        if len(visits) != len(self._index):
            raise ValueError(f"The checkpoint counts {len(visits)} samples, but now there are {len(self._index)}.")
        self.visits = visits.to(pl_module.device)

    def _of_sampler(self, targets: Targets | MovingTargets) -> Targets:
        if not isinstance(targets, MovingTargets):
            return targets
        if self._selected:
            raise ValueError(
                "Argument `targets` must be given where the targets of the sampler move and a selection leaves "
                "samples out, which are not counted, but got None."
            )
        self._moving = targets
        return next(iter(targets.points.values()))

    def curate(self, trainer: Trainer, pl_module: LightningModule, batch: Any, sample_ids: Tensor | None) -> Any:
        """Remember the ids."""
        self._ids = sample_ids
        if self.losses and self in trainer.callbacks:  # type: ignore[attr-defined]  # not in a tuner's step
            self._rows, self._trained, self._values = batch_size(batch), None, None
        return batch

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Watch the losses of the batch as all callbacks have left it."""
        if self._rows is None:
            return
        self._step = self._step or TrainingLosses(pl_module, batch)
        self._rows = batch_size(batch)
        self._step.watch(batch, self._rows)

    def on_selection(self, trainer: Trainer, pl_module: LightningModule, step: int, choice: Choice) -> None:
        """Count what an online selection kept."""
        ids = choice.sample_ids
        self._count(trainer, pl_module, ids if ids is None or choice.rows is None else ids[choice.rows])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch."""
        if self._rows is not None and self._step is not None:
            self._values = self._step.take_of_step(self._rows, outputs)
            if self._values is None:
                self._values = torch.full((self._rows,), torch.nan, device=pl_module.device)
            self._rows = None
            self._enter(trainer, pl_module)
        # Lightning trains on no batch that is None, nor in the last pass of weight averaging.
        if not self._selected and batch is not None and not skips_backward(trainer):
            self._count(trainer, pl_module, self._ids)

    def _count(self, trainer: Trainer, pl_module: LightningModule, ids: Tensor | None) -> None:
        if ids is None:
            raise TypeError(
                "ConceptCoverageMonitor needs sample ids: wrap the training data set in "
                "`curation.sample_ids.SampleIds`, "
                "and keep its key `sample_id` in a `collate_fn` of your own."
            )
        assert self.visits is not None
        if self.losses:
            self._trained = ids
            self._enter(trainer, pl_module)
        ids = gather_rows(trainer, ids)
        self.visits.index_add_(0, ids, torch.ones_like(ids, dtype=torch.int32))
        if logs_now(trainer):
            self._log(pl_module, ids)

    def _log(self, pl_module: LightningModule, ids: Tensor) -> None:
        assert self._index is not None
        assert self.visits is not None
        # The ids are of all ranks already, and NCCL could not add up counts on the host.
        if self._moving is not None:
            before = int(self.visits.sum()) - len(ids)
            self._weights = self._moving.at(self._moving.counts(self._index, 1), before)
        metric = ConceptCoverage(len(self._index.names), torch.from_numpy(self._weights), sync_on_compute=False)
        metric.update(torch.from_numpy(self._index.take(ids.cpu().numpy()).ids))
        seen = self.visits.gt(0).sum()
        values = {
            **metric.compute(),
            "distinct_seen": seen / len(self.visits),
            "repeats": self.visits.sum() / seen,
        }
        for name, value in values.items():
            pl_module.log(f"concepts/{name}", value, on_step=True, on_epoch=False, batch_size=1)

    def _enter(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the losses of a step, and log those of all steps since the last time."""
        if self._trained is None or self._values is None:
            return
        assert self._index is not None
        ids, values = self._trained.to(self._values.device, non_blocking=True), self._values
        ids, values = gather_samples(trainer, ids, values[:, None])
        self._unlogged.append((ids, values[:, 0]))
        self._trained = self._values = None
        if logs_now(trainer):
            ids, values = map(torch.cat, zip(*self._unlogged, strict=True))
            self._unlogged = []
            means = mean_by_concept(self._index, ids.cpu().numpy(), values.cpu().numpy())
            for name, mean in means.items():
                pl_module.log(f"concepts/loss/{name}", mean, on_step=True, on_epoch=False, batch_size=1)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Release the module."""
        super().teardown(trainer, pl_module, stage)
        if self._step is not None:
            self._step.stop()
        self._step = None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the picture."""
        with not_essential("The picture of the concepts"):
            self._draw(trainer)

    def _draw(self, trainer: Trainer) -> None:
        if self.visits is None or self._index is None or self._folder is None or not trainer.is_global_zero:
            return
        visits = self.visits.cpu().numpy()
        seen = np.flatnonzero(visits)
        if not len(seen):
            return
        trained = np.zeros(len(self._index.names))
        for start in range(0, len(seen), SAMPLES_AT_A_TIME):
            samples = seen[start : start + SAMPLES_AT_A_TIME]
            rows = self._index.take(samples)
            trained += np.bincount(rows.ids, np.repeat(visits[samples], rows.sizes), len(trained))
        figure = plot_concepts(self._index.frequencies, trained, self._weights, self._index.names)
        save_figure(figure, f"{self._folder}/concepts.png")
        log_image(trainer, "concepts/picture", figure)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the seam and draw: Lightning calls neither ``teardown`` nor ``on_fit_end`` after an exception."""
        super().on_exception(trainer, pl_module, exception)
        self.on_fit_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The visits, and losses that were not logged yet; equal on all ranks."""
        return {"visits": self.visits, "losses": self._unlogged}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on counting."""
        self.visits = state["visits"]
        self._unlogged = state.get("losses", []) if self.losses else []


def mean_by_concept(index: ConceptIndex, ids: np.ndarray, losses: np.ndarray) -> dict[Any, float]:
    """The mean loss of the rows that have a concept, by its name; rows without a finite loss do not count.

    Args:
        index: Concepts of all samples.
        ids: Samples int64 ``[n]``.
        losses: Floating ``[n]``.

    Example:
        >>> index = ConceptIndex.from_lists([["cat"], ["dog", "cat"], []])
        >>> mean_by_concept(index, np.array([0, 1, 2]), np.array([1.0, 3.0, 9.0]))
        {'cat': 2.0, 'dog': 3.0}
    """
    finite = np.isfinite(losses)
    rows = index.take(ids[finite])
    counts = np.bincount(rows.ids, minlength=len(index.names))
    sums = np.bincount(rows.ids, np.repeat(losses[finite].astype(np.float64), rows.sizes), len(index.names))
    return {index.names[int(c)]: float(sums[c] / counts[c]) for c in np.flatnonzero(counts)}


def loaded(concepts: Any) -> ConceptIndex | None:
    """The index in the argument ``concepts`` of a callback.

    Args:
        concepts: The index, its file, or None.

    Raises:
        TypeError: If it is something else.
        ValueError: If there is no such file.
    """
    check_concepts(concepts)
    if isinstance(concepts, (str, Path)):
        try:
            return ConceptIndex.load(concepts)
        except FileNotFoundError as error:
            raise ValueError(f"Argument `concepts` must name a file, but there is no {str(concepts)!r}.") from error
    return concepts


def check_concepts(concepts: Any) -> None:
    """Refuse what is neither an index, nor a path, nor None.

    Raises:
        TypeError: If it is something else.
    """
    if concepts is not None and not isinstance(concepts, (ConceptIndex, str, Path)):
        raise TypeError(f"Argument `concepts` must be a ConceptIndex or a file, but got {concepts!r}.")


def check_length(index: ConceptIndex, trainer: Trainer) -> None:
    """Refuse an index that has not one row for each training sample.

    Raises:
        ValueError: If it has another number of rows.
        TypeError: If the training data have no length.
    """
    dataset = getattr(curated_loader(trainer), "dataset", None)
    if not isinstance(dataset, Sized):
        raise TypeError("Concepts need a training `DataLoader` of a data set with a length.")
    samples = len(dataset)
    if len(index) != samples:
        raise ValueError(
            f"Argument `concepts` must have a row for each of the {samples} samples, but got {len(index)}."
        )
