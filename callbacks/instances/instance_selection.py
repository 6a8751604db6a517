"""Training on the selected samples of a data set, with any map-style data loader."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from curation import rng
from curation.callbacks.instances.feature_pass import features_and_labels
from curation.callbacks.instances.subset_loader import draw_from_subset, warn_of_other_data
from curation.callbacks.lightning.collectives import agree
from curation.callbacks.lightning.loop import (
    ends_before,
    forget_training_loader,
    logs_now,
    muted,
    next_epoch,
    reload_training_loader,
    restart_epoch,
)
from curation.callbacks.lightning.seam import BatchSeam, SeamClient, check_one_loader, refuse_strategies
from curation.checks import check_integer, check_text
from curation.instances.selection import Selection, check_selection, read_selection
from curation.instances.selection_index import Selector
from curation.samplers.subset import SubsetSampler
from curation.scoring import side_effect_free


class InstanceSelection(SeamClient):
    """Trains on a part of the training samples: those of an index, or those that a selector keeps.

    For the fit, a copy of the data loader takes its place that draws from a
    :class:`~curation.samplers.subset.SubsetSampler`, shuffled if the sampler of the loader shuffles. Sample ids are
    those of the whole data set. Validation is never curated. Logs ``instances/kept`` and ``instances/kept_fraction``
    once for every selection.

    A selector gets the features of the whole training set from a pass that changes nothing, divided between the
    processes; the first process selects while the others wait (more than 10 minutes need a strategy with a longer
    ``timeout``). A checkpoint holds what is kept: a resumed run does not select again. A schedule made from
    ``estimated_stepping_batches`` takes every epoch to be as long as the first.

    Args:
        index: The samples: integers ``[n]``, a mask bool ``[N]``, a fitted selector, a
            :class:`~curation.instances.selection_index.SelectionIndex`, or a file of one
            (:func:`~curation.instances.selection.check_selection`).
        selector: Any object with ``fit(X, y)`` and then ``sample_indices_``; in the place of ``index``. Labels are
            ``y`` of batches ``(x, y)``, or ``labels``, ``label`` or ``y`` of mappings. A selector with
            ``needs_classes = False`` gets numbers, too, and None of batches without one label for each sample.
        layer: Path of the submodule whose outputs are the features, such as ``"net.5"``, averaged as in
            :func:`~curation.callbacks.instances.embed.embed`; None for the inputs themselves.
        warmup_epochs: Epochs on all samples before the first selection.
        every_n_epochs: Number of epochs after which to select again; None to select once.

    Attributes:
        indices: int64 ``[n]``, the samples that are trained on, equal on all ranks; None for all samples.
        seconds: Seconds that the selections of this fit took.

    Raises:
        ValueError: If an argument is out of its range, ``index`` is for another number of samples, there is another
            data loader later in the fit, or the trainer overfits batches.
        TypeError: If the training data are not one map-style ``DataLoader`` that is shuffled, sequential or has a
            ``SubsetSampler``, the batches hold no labels for a selector, or the strategy is not supported.

    Example:
        >>> from curation.instances import CoverageInstanceSelector
        >>> once = InstanceSelection(selector=CoverageInstanceSelector(budget=0.1))
        >>> again = InstanceSelection(selector=CoverageInstanceSelector(budget=0.1), layer="net.5", every_n_epochs=5)
        >>> callbacks = [InstanceSelection(index="kept.parquet")]  # Trainer(callbacks=callbacks).fit(module, loader)
    """

    def __init__(
        self,
        index: Selection | None = None,
        selector: Selector | None = None,
        layer: str | None = None,
        warmup_epochs: int = 0,
        every_n_epochs: int | None = None,
    ) -> None:
        self.index = None if index is None else check_selection("index", index)
        self.selector = selector
        self.layer: str | None = check_text("layer", layer, optional=True)
        self.warmup_epochs: int = check_integer("warmup_epochs", warmup_epochs, 0)
        self.every_n_epochs: int | None = check_integer("every_n_epochs", every_n_epochs, 1, optional=True)
        if (index is None) == (selector is None):
            raise ValueError(
                f"Argument `index` must be given or else `selector`, but got {index!r} and {selector!r}."
            )
        if index is not None and (layer, warmup_epochs, every_n_epochs) != (None, 0, None):
            raise ValueError(
                "Argument `selector` must be given for `layer`, `warmup_epochs` and `every_n_epochs`, but got None."
            )
        self._reset()

    def _reset(self) -> None:
        self.indices: Tensor | None = None
        self.seconds = 0.0
        self._selected_for: int | None = None  # the epoch
        self._samples: int | None = None
        self._seed: int | None = None
        self._logged = True
        self._leave()

    def _leave(self) -> None:
        self._trainer: Trainer | None = None
        self._original_loader: Any = None
        self._loader: Any = None  # the copy in its place
        self._sampler: SubsetSampler | None = None
        self._candidates = np.zeros(0, np.int64)

    # ------------------------------------------------------------------ the data loader

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier fit; watch for the training data loader."""
        super().setup(trainer, pl_module, stage)
        if not self.fitting:
            return
        if trainer.overfit_batches:  # type: ignore[attr-defined]
            raise ValueError("InstanceSelection cannot choose samples where `overfit_batches` does.")
        if self.layer is not None:
            refuse_strategies(trainer, self, FSDPStrategy)
        self._reset()
        self._trainer = trainer
        seam = BatchSeam.of(trainer)
        assert seam is not None
        seam.clients.sort(key=lambda client: client is not self)  # first: others wrap or ask for the sampler

    def watch(self, dataloader: Any) -> Any:
        """A copy of the data loader that draws from a subset, after selecting if that is due."""
        assert self._trainer is not None
        if dataloader is not self._original_loader:
            self._take_over(dataloader, self._trainer.world_size)
        assert self._sampler is not None
        if self.indices is not None:
            self._sampler.indices = self.indices
        epoch = next_epoch(self._trainer)
        self._sampler.set_epoch(epoch)  # Lightning does so after loader workers have begun
        self._select(self._trainer, epoch)
        return self._loader

    def _take_over(self, loader: Any, processes: int) -> None:
        sampler = getattr(loader, "sampler", None)
        self._original_loader = loader
        self._loader, self._sampler = draw_from_subset(loader, self._seed)
        if not isinstance(sampler, SubsetSampler) and getattr(sampler, "num_replicas", 1) != processes:
            raise TypeError(
                f"InstanceSelection needs samples that are divided between all {processes} processes; "
                "`use_distributed_sampler=False` and tensor parallelism are not supported."
            )
        self._candidates, self._seed = self._sampler.indices, self._sampler.seed
        samples = len(loader.dataset)
        if self._samples not in (None, samples):
            raise ValueError(
                "InstanceSelection needs one training data loader, always of as many samples: "
                f"{self._samples} before, and now {samples}."
            )
        self._samples = samples

    # ------------------------------------------------------------------ when

    def _select(self, trainer: Trainer, epoch: int) -> bool:
        """Select for an epoch, if that is due and the epoch will be trained."""
        since = epoch - self.warmup_epochs
        due = epoch - (since % self.every_n_epochs if self.every_n_epochs else since)
        if since < 0 or (self._selected_for is not None and self._selected_for >= due) or ends_before(trainer, epoch):
            return False
        began = time.perf_counter()
        kept = self._run_selector(trainer, epoch) if self.index is None else self._read(self.index)
        self.seconds += time.perf_counter() - began
        assert self._sampler is not None
        self._sampler.indices = kept
        self.indices = torch.from_numpy(kept)
        self._selected_for, self._logged = due, False
        if not len(self._loader):
            raise ValueError(
                f"InstanceSelection keeps {len(kept)} samples, which with `drop_last` make no batch of "
                f"{self._loader.batch_size}."
            )
        return True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse several data loaders; select if the checkpoint was saved after the last batch of an epoch."""
        check_one_loader(trainer, self, named=True)
        if self._select(trainer, next_epoch(trainer)):
            restart_epoch(trainer)  # before the length changes, else a longer epoch would be cut
            reload_training_loader(trainer)
        elif self._sampler is not None and self._sampler.epoch != next_epoch(trainer):
            reload_training_loader(trainer)  # `configure_optimizers` asked for it before the epoch was restored

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Select for the next epoch."""
        if self._select(trainer, next_epoch(trainer)):
            reload_training_loader(trainer)

    # ------------------------------------------------------------------ what

    def _read(self, selection: Any) -> np.ndarray:
        assert self._samples is not None
        index = read_selection("index", selection, self._samples)
        if not np.isin(index.indices, self._candidates).all():
            raise ValueError("Argument `index` must hold samples of the loader's SubsetSampler only, but has others.")
        warn_of_other_data(index, self._loader.dataset)
        return index.indices

    def _run_selector(self, trainer: Trainer, epoch: int) -> np.ndarray:
        selector, name, count = self.selector, type(self.selector).__name__, len(self._candidates)
        assert selector is not None
        began = time.perf_counter()
        rank_zero_info(f"InstanceSelection: {name} selects of {count} samples.")
        with self._without_a_trace(trainer):
            rng.seed(0, epoch)  # for augmentations and selectors without a seed, resumed or not
            classes = getattr(selector, "needs_classes", True)
            features, y = features_and_labels(trainer, self._loader, np.sort(self._candidates), self.layer, classes)
            labels = None if y.isnan().all() else y.numpy()
            if labels is None:
                rank_zero_info(f"InstanceSelection: {name} selects without labels.")

            def fit() -> Any:
                if not trainer.is_global_zero:
                    return None
                selector.fit(features.numpy(), labels)
                if not hasattr(selector, "sample_indices_"):
                    raise TypeError(
                        f"Argument `selector` must have `sample_indices_` after `fit`, but {name} has not."
                    )
                return np.unique(selector.sample_indices_)

            kept = trainer.strategy.broadcast(agree(trainer, fit))
        if not (len(kept) and kept.dtype.kind in "iu" and 0 <= kept.min() <= kept.max() < count):
            raise ValueError(f"`{name}.sample_indices_` must hold integers in [0, {count}), but holds {kept}.")
        seconds = time.perf_counter() - began
        rank_zero_info(f"InstanceSelection: {name} keeps {len(kept)} of {count} samples, after {seconds:.1f} s.")
        return np.sort(self._candidates)[kept]

    @staticmethod
    @contextmanager
    def _without_a_trace(trainer: Trainer) -> Iterator[None]:
        """A pass of the module that changes nothing, and that hooks and callbacks take for validation."""
        with ExitStack() as stack:
            stack.enter_context(muted(trainer.lightning_module))
            stack.enter_context(trainer.profiler.profile("[Callback]InstanceSelection.select"))  # type: ignore[attr-defined]
            stack.enter_context(side_effect_free(trainer.lightning_module))
            trainer.validating = True  # so that transfer hooks do not augment, and other callbacks leave the batches
            stack.callback(setattr, trainer, "training", True)
            yield

    # ------------------------------------------------------------------ Lightning's other hooks

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log how many samples are kept, once."""
        if self._logged or not logs_now(trainer):
            return
        self._logged = True
        assert self.indices is not None
        kept = float(len(self.indices))
        for name, value in (("kept", kept), ("kept_fraction", kept / len(self._candidates))):
            pl_module.log(f"instances/{name}", value, on_step=True, on_epoch=False, batch_size=1)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the strategy and the data loader as they were."""
        super().teardown(trainer, pl_module, stage)
        self._leave()

    def state_dict(self) -> dict[str, Any]:
        """What is kept; equal on all ranks."""
        return {
            "indices": self.indices,
            "selected_for": self._selected_for,
            "samples": self._samples,
            "seed": self._seed,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on with what was kept."""
        self.indices = state["indices"]
        self._selected_for = state["selected_for"]
        self._samples = state["samples"]
        self._seed = state["seed"]
        if self._trainer is not None and self._sampler is not None:  # a tuner or `configure_optimizers` asked for it
            forget_training_loader(self._trainer)
            self._original_loader = None
