"""Exact resume: a run that was killed goes on as if it had not been."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader, IterableDataset

from curation import rng
from curation.callbacks.lightning.seam import BatchSeam, SeamClient, check_one_loader
from curation.callbacks.samplers.hard_batches import HardBatchTraining
from curation.samplers.hard_batches import HardBatchSampler

_ORDER, _LOAD, _STEP = 0, 1, 2


class ExactResume(SeamClient):
    """Resumes in the middle of an epoch with the same batches and the same random numbers.

    Lightning saves no random state, and a plain ``DataLoader`` starts its epoch again after a resume. Here the random
    streams of a process depend on its seed and on the number of batches trained on, and nothing else: they are set
    anew for every batch, and the order of an epoch is drawn from a stream of its own. So a checkpoint holds counters
    and seeds, wherever it is taken. The resumed run draws the order of the epoch again and skips the batches trained
    on without loading them; what loader workers have fetched in advance does not count.

    The seed is the one torch has when the fit begins (``seed_everything``). The random numbers of a run with this
    callback are not those of a run without it.

    For one map-style ``DataLoader``; a stateful one is left to Lightning. Not resumed: gradients that were being
    accumulated, the streams inside loader workers, and samplers that draw from a global stream while they are being
    iterated. Put it before ``ModelCheckpoint``; Lightning does. Strips sample ids, as a selection does.
    """

    def __init__(self) -> None:
        self.batches = 0
        self.epoch = 0
        self.batches_in_epoch = 0
        self._seeds: list[int] = []
        self._rank = 0
        self._skip = 0
        self._length: int | None = None
        self._unrestored: Trainer | None = None
        self._sampler_resumes = False
        self._samplers: list[Any] = []
        self._generators: list[torch.Generator] = []
        self._undo: list[Callable[[], None]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take every rank's seed, and watch the training data loader as Lightning prepares it."""
        BatchSeam.attach(trainer, self)
        self.fitting = stage == "fit"
        if not self.fitting:
            return
        seed = torch.tensor(torch.initial_seed() % 2**63, device=trainer.strategy.root_device)
        self._seeds = trainer.strategy.all_gather(seed).flatten().tolist()
        self._rank = trainer.global_rank
        self.epoch, self._unrestored = 0, trainer
        self.batches = self.batches_in_epoch = self._skip = 0
        self._length = None
        self._sampler_resumes = any(isinstance(c, HardBatchTraining) for c in trainer.callbacks)  # type: ignore[attr-defined]

    def watch(self, loader: Any) -> None:
        """Let the order of the training data loader depend on the epoch, and begin after what was trained on."""
        if self._unrestored is not None:  # a new run, or one that goes on with what had no such callback
            self.epoch, self._unrestored = self._unrestored.current_epoch, None
        if hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict"):
            return
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            data = loader.dataset if isinstance(loader, DataLoader) else loader
            rank_zero_warn(f"ExactResume cannot skip batches of {type(data).__name__}: a resumed epoch starts again.")
            return
        name = "sampler" if loader.batch_sampler is None else "batch_sampler"
        sampler = vars(loader)[name]
        if not isinstance(sampler, _Order):
            # DataLoader forbids assigning a sampler, but only what it yields is wrapped here.
            vars(loader)[name] = _Order(sampler, self)
            self._undo.append(lambda: vars(loader).update({name: sampler}))
            self._samplers = [sampler, getattr(sampler, "sampler", None)]
            drawers = [loader, *self._samplers]
            generators = [getattr(drawer, "generator", None) for drawer in drawers]
            self._generators = [g for g in generators if isinstance(g, torch.Generator)]
        length = len(sampler) if hasattr(sampler, "__len__") else None
        if self._skip and length != self._length:
            raise ValueError(
                f"The checkpoint was saved after {self._skip} of {self._length} batches of an epoch, but the data "
                f"loader now has {length}: other data or another batch size. Remove ExactResume to resume anyway."
            )
        self._length = length
        if self._sampler_resumes and any(isinstance(drawer, HardBatchSampler) for drawer in self._samplers):
            self._skip = 0  # it knows where it was
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """A loader with workers draws their seed as its iteration begins."""
        self.begin_order()
        self.begin_load()

    def begin_order(self) -> None:
        """What the samplers draw next depends on the epoch only."""
        rng.seed(self._seeds[self._rank], self.epoch, _ORDER)
        for generator in self._generators:
            generator.manual_seed(self._seeds[self._rank] ^ self.epoch)
        for sampler in self._samplers:
            if callable(getattr(sampler, "set_epoch", None)):
                sampler.set_epoch(self.epoch)

    def begin_load(self, batch: int | None = None) -> None:
        """What is drawn while a batch is loaded depends on its number in the fit only; by default it is the next."""
        rng.seed(self._seeds[self._rank], self.batches if batch is None else batch, _LOAD)

    def before_transfer(self) -> None:
        """What is drawn from here to the end of the step depends on the number of batches trained on only."""
        rng.seed(self._seeds[self._rank], self.batches, _STEP)

    def take_skip(self) -> int:
        """The batches of the coming order that were trained on before."""
        skip, self._skip = self._skip, 0
        return skip

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse several data loaders, of which only one could be resumed."""
        check_one_loader(trainer, self)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the streams of the epoch."""
        self.begin_epoch()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch and set the streams of the next."""
        self.batches += 1
        self.batches_in_epoch += 1
        self._end_epoch(trainer)
        self.begin_load()

    def _end_epoch(self, trainer: Trainer) -> None:
        if trainer.is_last_batch and self.batches_in_epoch:
            self.epoch += 1
            self.batches_in_epoch = 0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the streams again: a resumed run does not repeat the validation before which it was saved."""
        if self.fitting and not trainer.sanity_checking:
            self.begin_load()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count an epoch that ended without its last batch, because a hook asked for it."""
        self._end_epoch(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the strategy and the data loader as they were."""
        super().teardown(trainer, pl_module, stage)
        while self._undo:
            self._undo.pop()()
        self._samplers, self._generators = [], []
        self._unrestored = None

    def state_dict(self) -> dict[str, Any]:
        """Counters and seeds, the same on every rank."""
        return {
            "seeds": self._seeds,
            "batches": self.batches,
            "epoch": self.epoch,
            "batches_in_epoch": self.batches_in_epoch,
            "batches_per_epoch": self._length,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`, in a fit.

        Raises:
            ValueError: If the checkpoint was saved by another number of processes.
        """
        if not self.fitting:
            return
        if len(state_dict["seeds"]) != len(self._seeds):
            raise ValueError(
                f"The checkpoint was saved by {len(state_dict['seeds'])} processes and cannot be resumed exactly by "
                f"{len(self._seeds)}; remove ExactResume to resume anyway."
            )
        self._unrestored = None
        self._seeds = state_dict["seeds"]
        self.batches = state_dict["batches"]
        self.epoch = state_dict["epoch"]
        self.batches_in_epoch = self._skip = state_dict["batches_in_epoch"]
        self._length = state_dict["batches_per_epoch"]


class _Order:
    """A sampler whose order is drawn from a stream of its own, and begins after what was trained on."""

    def __init__(self, inner: Any, owner: ExactResume) -> None:
        vars(self).update(_inner=inner, _owner=owner)

    def __len__(self) -> int:
        return len(self._inner)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._inner, name, value)

    def __iter__(self) -> Iterator[Any]:
        self._owner.begin_order()
        order = iter(self._inner)
        first = list(itertools.islice(order, 1))
        self._owner.begin_load()
        left = itertools.islice(itertools.chain(first, order), self._owner.take_skip(), None)
        for batch, chosen in enumerate(left, self._owner.batches):
            self._owner.begin_load(batch)  # again, since a loader may load ahead of its time
            yield chosen
