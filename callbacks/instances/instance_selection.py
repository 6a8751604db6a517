"""Training on the instances that stay of a data set, whatever data loader it is in."""

import copy
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TypeVar

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader

from curation import rng
from curation.callbacks.instances.embed import flat, inputs_and_labels, row_vectors
from curation.callbacks.instances.subset_loader import draw_from_subset, warn_of_other_data
from curation.callbacks.lightning.seam import BatchSeam, SeamClient, check_one_loader, refuse_strategies
from curation.callbacks.online.online_selection import logs_now
from curation.instances.selection_index import InstanceSelector, SelectionIndex
from curation.replace import replace_attribute
from curation.samplers.subset import SubsetSampler
from curation.scoring import find_route, side_effect_free

LOADER_OPTIONS = (
    "num_workers",
    "collate_fn",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "prefetch_factor",
    "multiprocessing_context",
)
T = TypeVar("T")


class InstanceSelection(SeamClient):
    """Trains on a part of the training samples: those of an index file, or those that a selector keeps.

    In the place of the data loader a copy of it draws from a :class:`~curation.samplers.subset.SubsetSampler`,
    shuffled if its own sampler shuffles. Sample ids are those of the whole data set. Validation is never curated.
    Logs ``instances/kept`` and ``instances/kept_fraction`` once for every selection.

    A selector gets the features of the whole training set by a pass that changes nothing, divided between the
    processes; the first process selects while the others wait (more than 10 minutes need a strategy with a longer
    ``timeout``). A checkpoint holds what is kept: a resumed run does not select again. A schedule made from
    ``estimated_stepping_batches`` takes every epoch to be as long as the first.

    Args:
        index: File of :meth:`~curation.instances.selection_index.SelectionIndex.save`.
        selector: Anything with ``fit(X, y)`` and then ``sample_indices_``; in the place of ``index``. Labels are
            ``y`` of batches ``(x, y)``, or ``labels``, ``label`` or ``y`` of mappings.
        layer: Path of the submodule whose output are the features, such as ``"net.5"``, averaged as in
            :func:`~curation.callbacks.instances.embed.embed`; None for the inputs themselves.
        warmup_epochs: Epochs on all samples before the first selection.
        every_n_epochs: Select again after so many epochs; None for once.

    Attributes:
        indices: int64 ``[n]``, what is trained on, the same on every rank; None for everything.
        seconds: That selecting has taken in this fit.

    Raises:
        ValueError: If an argument is out of its range, ``index`` is for another number of samples, there is another
            data loader later in the fit, or the trainer overfits batches.
        TypeError: If the training data are not one map-style ``DataLoader`` that is shuffled, sequential or has a
            ``SubsetSampler``, the batches hold no labels for a selector, or the strategy is not supported.
    """

    def __init__(
        self,
        index: str | None = None,
        selector: InstanceSelector | None = None,
        layer: str | None = None,
        warmup_epochs: int = 0,
        every_n_epochs: int | None = None,
    ) -> None:
        if not (hasattr(warmup_epochs, "__index__") and warmup_epochs >= 0):
            raise ValueError(f"Argument `warmup_epochs` must be an integer >= 0, but got {warmup_epochs!r}.")
        if every_n_epochs is not None and not (hasattr(every_n_epochs, "__index__") and every_n_epochs >= 1):
            raise ValueError(
                f"Argument `every_n_epochs` must be an integer >= 1 or None, but got {every_n_epochs!r}."
            )
        if (index is None) == (selector is None):
            raise ValueError(
                f"Argument `index` must be given or else `selector`, but got {index!r} and {selector!r}."
            )
        if index is not None and (layer, warmup_epochs, every_n_epochs) != (None, 0, None):
            raise ValueError(
                "Argument `selector` must be given for `layer`, `warmup_epochs` and `every_n_epochs`, but got None."
            )
        self.index = index
        self.selector = selector
        self.layer = layer
        self.warmup_epochs = warmup_epochs
        self.every_n_epochs = every_n_epochs
        self._reset()

    def _reset(self) -> None:
        self.indices: Tensor | None = None
        self.seconds = 0.0
        self._selected_for: int | None = None  # the epoch
        self._samples: int | None = None
        self._seed: int | None = None
        self._told = True
        self._leave()

    def _leave(self) -> None:
        self._trainer: Trainer | None = None
        self._given: Any = None  # the data loader that was, and the one in its place
        self._loader: Any = None
        self._sampler: SubsetSampler | None = None
        self._candidates = np.zeros(0, np.int64)

    # ------------------------------------------------------------------ the data loader

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier fit; watch for the training data loader."""
        BatchSeam.attach(trainer, self)
        self.fitting = stage == "fit"
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
        """Give a data loader that draws from a subset, and select it if that is due."""
        assert self._trainer is not None
        if dataloader is not self._given:
            self._take_over(dataloader, self._trainer.world_size)
        assert self._sampler is not None
        if self.indices is not None:
            self._sampler.indices = self.indices
        epoch = next_epoch(self._trainer)
        self._sampler.set_epoch(epoch)  # Lightning does so after loader workers have begun
        self._select(self._trainer, epoch)
        return self._loader

    def _take_over(self, loader: Any, processes: int) -> None:
        own = getattr(loader, "sampler", None)
        self._given = loader
        self._loader, self._sampler = draw_from_subset(loader, self._seed)
        if not isinstance(own, SubsetSampler) and getattr(own, "num_replicas", 1) != processes:
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
        """Select for an epoch, if that is due and the epoch will be."""
        since = epoch - self.warmup_epochs
        due = epoch - (since % self.every_n_epochs if self.every_n_epochs else since)
        if since < 0 or (self._selected_for is not None and self._selected_for >= due) or ends(trainer, epoch):
            return False
        began = time.perf_counter()
        chosen = self._read() if self.index is not None else self._run_selector(trainer, epoch)
        self.seconds += time.perf_counter() - began
        assert self._sampler is not None
        self._sampler.indices = chosen
        self.indices = torch.from_numpy(chosen)
        self._selected_for, self._told = due, False
        if not len(self._loader):
            raise ValueError(
                f"InstanceSelection keeps {len(chosen)} samples, which with `drop_last` make no batch of "
                f"{self._loader.batch_size}."
            )
        return True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse several data loaders; select if the checkpoint was saved after the last batch of an epoch."""
        check_one_loader(trainer, self)
        if self._select(trainer, next_epoch(trainer)):
            loop = trainer.fit_loop.epoch_loop
            loop.reset()  # while the length is that of the epoch that has ended; else a longer one would be cut
            loop.restarting = False
            loop.reset_restart_stage()
            self._reload(trainer)
        elif self._sampler is not None and self._sampler.epoch != next_epoch(trainer):
            self._reload(trainer)  # `configure_optimizers` asked for the loader before the epoch was restored

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Select for the next epoch."""
        if self._select(trainer, next_epoch(trainer)):
            self._reload(trainer)

    @staticmethod
    def _reload(trainer: Trainer) -> None:
        """Let Lightning count the batches again, now, because later hooks may ask for the loader."""
        trainer.fit_loop._combined_loader = None
        trainer.fit_loop.setup_data()

    # ------------------------------------------------------------------ what

    def _read(self) -> np.ndarray:
        index = SelectionIndex.load(str(self.index))
        if index.size != self._samples:
            raise ValueError(
                f"Argument `index` must be of the {self._samples} training samples, but got {self.index!r} of "
                f"{index.size}."
            )
        if not np.isin(index.indices, self._candidates).all():
            raise ValueError("Argument `index` must hold samples of the loader's SubsetSampler only, but has others.")
        warn_of_other_data(index, self._loader.dataset)
        return index.indices

    def _run_selector(self, trainer: Trainer, epoch: int) -> np.ndarray:
        assert self.selector is not None
        count = len(self._candidates)
        module, selector, name = trainer.lightning_module, self.selector, type(self.selector).__name__
        began = time.perf_counter()
        rank_zero_info(f"InstanceSelection: {name} selects of {count} samples.")
        with ExitStack() as stack:
            for log in ("log", "log_dict"):  # illegal here
                stack.callback(replace_attribute(module, log, lambda *_, **__: None))
            stack.enter_context(trainer.profiler.profile("[Callback]InstanceSelection.select"))  # type: ignore[attr-defined]
            stack.enter_context(side_effect_free(module))
            rng.seed(0, epoch)  # of augmentations and selectors without a seed; resumed or not
            trainer.validating = True  # so that transfer hooks know, and other callbacks leave the batches alone
            stack.callback(setattr, trainer, "training", True)
            mine = together(trainer, lambda: self._pass(trainer, module))
            features, labels = (gather_rows(trainer, list(part))[:count] for part in zip(*mine, strict=True))

            def fit() -> Any:
                if not trainer.is_global_zero:
                    return None
                selector.fit(features.numpy(), labels.numpy())
                if not hasattr(selector, "sample_indices_"):
                    raise TypeError(
                        f"Argument `selector` must have `sample_indices_` after `fit`, but {name} has not."
                    )
                return np.unique(selector.sample_indices_)

            chosen = trainer.strategy.broadcast(together(trainer, fit))
        if not (len(chosen) and chosen.dtype.kind in "iu" and 0 <= chosen.min() <= chosen.max() < count):
            raise ValueError(f"`{name}.sample_indices_` must hold integers in [0, {count}), but holds {chosen}.")
        seconds = time.perf_counter() - began
        rank_zero_info(f"InstanceSelection: {name} keeps {len(chosen)} of {count} samples, after {seconds:.1f} s.")
        return np.sort(self._candidates)[chosen]

    def _pass(self, trainer: Trainer, module: LightningModule) -> list[tuple[Tensor, Tensor]]:
        """Features ``[B, D]`` and labels ``[B]`` of each batch of this process's part, in the order of samples."""
        given, size = self._loader, self._loader.batch_sampler.batch_size
        sampler = SubsetSampler(given.dataset, np.sort(self._candidates), shuffle=False)
        options = {name: getattr(given, name) for name in LOADER_OPTIONS}
        batches = DataLoader(given.dataset, size, sampler=sampler, generator=torch.Generator(), **options)
        outputs: list[Any] = []
        parts = []
        with ExitStack() as stack:
            if self.layer is not None:
                hook = module.get_submodule(self.layer).register_forward_hook(lambda _, __, out: outputs.append(out))
                stack.callback(hook.remove)
            stack.enter_context(trainer.precision_plugin.forward_context())
            for step, batch in enumerate(batches):
                batch = trainer.precision_plugin.convert_input(batch)
                batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
                batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
                inputs, labels = inputs_and_labels(batch)
                if self.layer is None:
                    features = flat(inputs)
                else:
                    find_route(module, batch).take(copy.copy(batch))  # it may take things out of it
                    features = row_vectors(self.layer, outputs, batch)
                    outputs.clear()
                rows = min(size, len(sampler) - step * size)
                if (len(features), len(labels)) != (rows, rows):
                    raise ValueError(
                        f"A batch of {rows} samples must have as many features and labels to select by, but has "
                        f"{len(features)} and {len(labels)}."
                    )
                parts.append((features.cpu(), labels.cpu()))
        return parts

    # ------------------------------------------------------------------ Lightning's other hooks

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log how many samples are kept, once."""
        if self._told or not logs_now(trainer):
            return
        self._told = True
        assert self.indices is not None
        kept = float(len(self.indices))
        for name, value in (("kept", kept), ("kept_fraction", kept / len(self._candidates))):
            pl_module.log(f"instances/{name}", value, on_step=True, on_epoch=False, batch_size=1)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the strategy and the data loader as they were."""
        super().teardown(trainer, pl_module, stage)
        self._leave()

    def state_dict(self) -> dict[str, Any]:
        """What is kept, the same on every rank."""
        return {
            "indices": self.indices,
            "selected_for": self._selected_for,
            "samples": self._samples,
            "seed": self._seed,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what was kept, in a fit."""
        if not self.fitting:
            return
        self.indices = state_dict["indices"]
        self._selected_for = state_dict["selected_for"]
        self._samples = state_dict["samples"]
        self._seed = state_dict["seed"]
        if self._trainer is not None and self._sampler is not None:  # a tuner, or `configure_optimizers`, had it
            self._trainer.fit_loop._combined_loader = self._given = None


def next_epoch(trainer: Trainer) -> int:
    """The epoch for which a data loader is prepared."""
    progress: Any = trainer.fit_loop.epoch_progress.current
    return progress.processed


def ends(trainer: Trainer, epoch: int) -> bool:
    """Whether a fit ends before an epoch."""
    loop = trainer.fit_loop
    return (
        0 <= (-1 if loop.max_epochs is None else loop.max_epochs) <= epoch
        or 0 <= loop.max_steps <= trainer.global_step
        or (trainer.should_stop and loop._can_stop_early)
    )


def together(trainer: Trainer, work: Callable[[], T]) -> T:
    """What ``work`` gives on each process; if it fails on one, all raise and none waits for it."""
    error: Exception | None = None
    try:
        result = work()
    except Exception as caught:  # whatever it is, the others must hear of it
        error = caught
    done = trainer.strategy.reduce_boolean_decision(error is None)
    if error is not None:
        raise error
    if not done:
        raise RuntimeError("The selection of instances failed on another process, which says why.")
    return result


def gather_rows(trainer: Trainer, parts: list[Tensor]) -> Tensor:
    """Rows ``[B, ...]`` of every process, each of which has every W-th: ``[N, ...]`` on the first, on the CPU."""
    rows = []
    for part in parts:
        of_all = trainer.strategy.all_gather(part.to(trainer.strategy.root_device))
        if trainer.is_global_zero:
            rows.append(of_all.view(trainer.world_size, *part.shape).transpose(0, 1).flatten(0, 1).cpu())
    return torch.cat(rows) if rows else parts[0]
