"""Exact resume: a run that was killed goes on as if it had not been."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader, IterableDataset

from curation import rng


class ExactResume(Callback):
    """Resumes in the middle of an epoch with the same batches and the same random numbers.

    Lightning saves no random state, and a plain ``DataLoader`` starts its epoch again after a resume. This callback
    saves every rank's random streams and the number of batches trained on in the epoch; the resumed run draws the
    epoch's order again and skips those batches without loading them. Batches that workers had fetched in advance
    are not counted, so any number of workers works.

    Exact for one map-style ``DataLoader`` (a stateful one is left to Lightning). With workers, augmentation drawn in
    a worker is not: its stream is lost with its process. Put it before ``ModelCheckpoint``; Lightning does.
    """

    def __init__(self) -> None:
        self._batches = 0
        self._epoch_start: list[dict[str, Any]] | None = None
        self._now: list[dict[str, Any]] | None = None
        self._resume: dict[str, Any] | None = None
        self._pending: dict[str, Any] | None = None
        self._order: _ResumableOrder | None = None
        self._trainer: Trainer | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Watch the training data loader as Lightning prepares it."""
        if stage != "fit":
            return
        self._trainer = trainer
        self._batches = 0
        self._epoch_start = self._now = self._resume = self._pending = None
        prepare = trainer.strategy.process_dataloader

        def process_dataloader(dataloader: object) -> object:
            dataloader = prepare(dataloader)
            if trainer.training:
                self._watch(dataloader)
            return dataloader

        trainer.strategy.process_dataloader = process_dataloader  # type: ignore[method-assign]

    def _watch(self, loader: Any) -> None:
        if hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict"):
            return
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            rank_zero_warn(
                f"ExactResume cannot skip batches of {type(loader).__name__}: a resumed epoch starts again."
            )
            return
        name = "sampler" if loader.batch_sampler is None else "batch_sampler"
        inner = getattr(loader, name)
        if not isinstance(inner, _ResumableOrder):
            # DataLoader forbids assigning a sampler, but only what it yields is wrapped here.
            inner = vars(loader)[name] = _ResumableOrder(inner, loader.generator)
        self._order = inner
        resume, self._resume = self._resume, None
        if resume is None:
            return
        if resume["batches"] == 0:  # at the end of an epoch: Lightning begins the next one right after this
            if loader.persistent_workers:  # then the next epoch draws no seed for its workers
                inner.state = resume["now"]
            else:
                inner.restore(resume["now"])
            return
        inner.skip, inner.state = resume["batches"], resume["epoch_start"]
        if loader.num_workers:
            self._pending = resume["now"]  # the sampler runs ahead of training
        else:
            inner.then = resume["now"]  # the main process draws while it loads

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Go on with the saved random streams, where the main process loads no data."""
        if self._pending is not None:
            assert self._order is not None
            self._order.restore(self._pending)
            self._pending = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch and take every rank's random streams."""
        self._batches += 1
        self._take(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the streams before a checkpoint is saved."""
        self._take(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting again."""
        self._batches = 0
        self._take(trainer)

    def _take(self, trainer: Trainer) -> None:
        """Gather the streams now: ``state_dict`` must hold no collective, since not every rank may be saving."""
        if trainer.sanity_checking:
            return
        if self._order is None:
            return
        self._now = _gather(trainer, self._order.capture())
        if self._order.started is not None:
            self._epoch_start = _gather(trainer, self._order.started)
            self._order.started = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the strategy and the data loader as they were."""
        self._restore(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the strategy and the data loader as they were."""
        self._restore(trainer)

    def _restore(self, trainer: Trainer) -> None:
        vars(trainer.strategy).pop("process_dataloader", None)
        combined = trainer.fit_loop._combined_loader
        for loader in combined.flattened if combined is not None else []:
            for name in ("sampler", "batch_sampler"):
                order = vars(loader).get(name)
                if isinstance(order, _ResumableOrder):
                    vars(loader)[name] = order.inner
        self._order = self._trainer = None

    def state_dict(self) -> dict[str, Any]:
        """The batches of this epoch, and all ranks' streams at its start and now."""
        return {"batches": self._batches, "epoch_start": self._epoch_start, "now": self._now}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from :meth:`state_dict` when the data loader is prepared."""
        assert self._trainer is not None
        if state_dict["now"] is None:
            return
        rank = self._trainer.global_rank
        if len(state_dict["now"]) != self._trainer.world_size:
            raise ValueError(
                f"The checkpoint was saved by {len(state_dict['now'])} processes and cannot be resumed exactly by "
                f"{self._trainer.world_size}; remove ExactResume to resume anyway."
            )
        self._batches = state_dict["batches"]
        self._epoch_start, self._now = state_dict["epoch_start"], state_dict["now"]
        start = state_dict["epoch_start"]
        self._resume = {
            "batches": self._batches,
            "epoch_start": start[rank] if start is not None else None,
            "now": state_dict["now"][rank],
        }


class _ResumableOrder:
    """The order of a sampler, begun with a saved random state and without the batches already trained on."""

    def __init__(self, inner: Any, generator: torch.Generator | None) -> None:
        self.inner = inner
        self.generator = generator
        self.skip = 0
        self.state: dict[str, Any] | None = None
        self.then: dict[str, Any] | None = None
        self.started: dict[str, Any] | None = None

    def __len__(self) -> int:
        return len(self.inner)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "inner" not in vars(self):
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __iter__(self) -> Iterator[Any]:
        skip, state, then = self.skip, self.state, self.then
        self.skip, self.state, self.then = 0, None, None
        if state is not None:
            self.restore(state)
        self.started = self.capture()
        order = iter(self.inner)
        for _ in itertools.islice(order, skip):
            pass
        if then is not None:
            self.restore(then)
        yield from order

    def capture(self) -> dict[str, Any]:
        """The random streams, the data loader's own generator included."""
        own = {} if self.generator is None else {"loader": self.generator.get_state()}
        return {**rng.capture(), **own}

    def restore(self, state: dict[str, Any]) -> None:
        """Set the streams to a state from :meth:`capture`."""
        rng.restore(state)
        if self.generator is not None and "loader" in state:
            self.generator.set_state(state["loader"].cpu())


def _gather(trainer: Trainer, state: dict[str, Any]) -> list[dict[str, Any]]:
    """One state per rank, in rank order."""
    if trainer.world_size == 1:
        return [state]
    states: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(states, state)
    return states
