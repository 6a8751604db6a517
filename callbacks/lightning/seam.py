"""The one place where the batch of a LightningModule is replaced.

A callback cannot rebind the batch that a training step gets, and a wrapper of the module's own hooks is not called
where a DataModule overrides them. Every batch passes through ``strategy.batch_to_device``, so one :class:`BatchSeam`
replaces that method on the strategy instance, and the callbacks of this package are its clients.
"""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, Strategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from curation.batch import batch_size, split_sample_ids
from curation.callbacks.lightning.fit_callback import FitCallback
from curation.callbacks.lightning.joined_loader import JoinedLoader
from curation.callbacks.lightning.loop import (
    Place,
    curated_name,
    is_trained_on,
    move_to_device,
    prepared_place,
    prepares_training_loader,
    training_loaders,
)
from curation.replace import replace_attribute


class SeamClient(FitCallback):
    """A callback that the seam calls, in the order of the trainer's callbacks.

    Attributes:
        candidate_batches: Batches of the training data loader that it takes as one.
    """

    candidate_batches = 1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Install the seam, in every stage: sample ids are stripped in evaluation, too.

        Raises:
            TypeError: If the client reads batches, and the module fetches its own.
        """
        super().setup(trainer, pl_module, stage)
        if self.fitting and type(self).curate is not SeamClient.curate:
            check_training_step(pl_module)
        BatchSeam.attach(trainer, self)

    def before_transfer(self) -> None:
        """Called before a batch that is to be trained on is transferred."""

    def watch(self, dataloader: Any) -> Any:
        """Called with the training data loader before it is iterated, as often as Lightning prepares one.

        Returns:
            A data loader to take its place, or None.
        """

    def watch_other(self, dataloader: Any, place: Place) -> None:
        """Called with each further training data loader, which is not curated."""

    def curate(self, trainer: Trainer, pl_module: LightningModule, batch: Any, sample_ids: Tensor | None) -> Any:
        """The batch to train on, given the candidate batch on the device and its sample ids."""
        return batch

    def strip(self, batch: Any) -> Any:
        """A batch on the device that is not trained on, without what only training is to see."""
        return batch

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the seam."""
        BatchSeam.detach(trainer, self)


class BatchSeam:
    """Replaces ``trainer.strategy.batch_to_device`` while it has clients.

    Sample ids are stripped in every stage. Clients are called only for batches that are trained on: not in
    validation, not in the sanity check, not while stochastic weight averaging updates its normalisation layers.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.clients: list[SeamClient] = []
        self._batch: Any = None
        self._transfer = trainer.strategy.batch_to_device
        self._prepare = trainer.strategy.process_dataloader
        self._undo = [
            replace_attribute(trainer.strategy, "batch_to_device", self),
            replace_attribute(trainer.strategy, "process_dataloader", self._process_dataloader),
        ]
        self._tear_down_strategy = trainer.strategy.teardown
        self._undo.append(replace_attribute(trainer.strategy, "teardown", self._teardown))

    @staticmethod
    def of(trainer: Trainer) -> "BatchSeam | None":
        """The seam of a trainer; None where there is none."""
        seam = vars(trainer.strategy).get("batch_to_device")
        return seam if isinstance(seam, BatchSeam) else None

    @staticmethod
    def attach(trainer: Trainer, client: SeamClient) -> None:
        """Add a client, installing the seam with the first one.

        Raises:
            TypeError: Under DeepSpeed.
        """
        refuse_strategies(trainer, client)
        seam = BatchSeam.of(trainer) or BatchSeam(trainer)
        if client not in seam.clients:
            seam.clients.append(client)

    @staticmethod
    def detach(trainer: Trainer, client: SeamClient) -> None:
        """Remove a client, and with the last one the seam."""
        seam = BatchSeam.of(trainer)
        if seam is None or client not in seam.clients:
            return
        seam.clients.remove(client)
        seam._batch = None
        if not seam.clients:
            for undo in seam._undo:
                undo()

    def _teardown(self) -> None:
        """Tear down the clients that Lightning forgot: a tuner that fails leaves its callbacks in the trainer."""
        for client in list(self.clients):
            client.teardown(self.trainer, self.trainer.lightning_module, "")
        self._tear_down_strategy()

    def _process_dataloader(self, dataloader: object) -> object:
        dataloader = self._prepare(dataloader)
        if prepares_training_loader(self.trainer):
            place = prepared_place(self.trainer)
            if place.number != place.curated:
                for client in self.clients:
                    client.watch_other(dataloader, place)
                return dataloader
            for client in self.clients:
                replacement = client.watch(dataloader)
                dataloader = dataloader if replacement is None else replacement
            joined = self.joined()
            dataloader = JoinedLoader(dataloader, joined) if joined > 1 else dataloader
        return dataloader

    def joined(self) -> int:
        """Batches of the training data loader that are trained on as one."""
        return max(client.candidate_batches for client in self.clients)

    def __call__(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """Move the batch as the strategy does, without its ids, and let the clients curate it."""
        trainer = self.trainer
        trains = is_trained_on(trainer)
        name, batch, ids = self._split(batch)
        for client in self.clients if trains else []:
            client.before_transfer()
        batch = self._batch = self._transfer(batch, device=device, dataloader_idx=dataloader_idx)
        part = batch if name is None or batch is None else batch[name]
        if part is None:
            return batch
        if trains and ids is not None:
            ids = self._on_device(ids, part, device)
        for client in self.clients:
            curated = client.curate(trainer, trainer.lightning_module, part, ids) if trains else client.strip(part)
            part = curated
        self._batch = part if name is None else replaced(batch, name, part)
        return self._batch

    def _split(self, batch: Any) -> tuple[str | int | None, Any, Tensor | None]:
        """The name of the curated part of a batch of several data loaders, the batch without ids, and its ids."""
        if not self.trainer.training or len(training_loaders(self.trainer)) < 2:
            return None, *split_sample_ids(batch)
        name, ids = curated_name(self.trainer), None
        for key in list(batch) if isinstance(batch, dict) else range(len(batch)):
            part, own = split_sample_ids(batch[key])
            batch, ids = replaced(batch, key, part), own if key == name else ids
        return name, batch, ids

    def transfer(self, batch: Any) -> Any:
        """A batch as the training step would get it without clients: without sample ids, on the device."""
        batch, _ = split_sample_ids(batch)
        return move_to_device(self.trainer, batch, self._transfer)

    def _on_device(self, ids: Tensor, batch: Any, device: torch.device | None) -> Tensor:
        size = batch_size(batch)
        if len(ids) != size:
            raise ValueError(
                f"The batch came with {len(ids)} sample ids but has {size} rows after its transfer hooks."
            )
        return ids.to(device or self.trainer.strategy.root_device, non_blocking=True)

    @staticmethod
    def check(trainer: Trainer, batch: Any) -> None:
        """Raise unless ``batch``, which is about to be trained on, is what the trainer's seam returned last."""
        seam = BatchSeam.of(trainer)
        if seam is None or batch is not seam._batch:
            raise RuntimeError(
                "The batch given to `training_step` did not pass through `strategy.batch_to_device`, so nothing was "
                "selected. A strategy or a Lightning version that moves batches in another way is not supported."
            )


def check_training_step(pl_module: LightningModule) -> None:
    """Raise a TypeError if the module fetches its own batches, which no callback can curate."""
    if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
        raise TypeError(
            f"`{type(pl_module).__name__}.training_step(dataloader_iter)` fetches its own batches, so no callback "
            "can choose or record what is in them. Take `batch` as the argument of `training_step` instead."
        )


def replaced(batches: Any, key: Any, part: Any) -> Any:
    """A copy of the batches of several data loaders with another one for one of them."""
    if isinstance(batches, dict):
        return {**batches, key: part}
    return type(batches)(part if place == key else batch for place, batch in enumerate(batches))


def check_one_loader(trainer: Trainer, client: object, named: bool = False) -> None:
    """Refuse several training data loaders: a sample id would name no single sample.

    Args:
        trainer: The trainer.
        client: The callback; errors name it.
        named: Whether it works where one of several is named.

    Raises:
        TypeError: If there are several, and none is named or it works with one alone.
    """
    loaders = training_loaders(trainer)
    if len(loaders) > 1 and not (named and curated_name(trainer) is not None):
        name = " Name the one that it is for in the attribute `curated_loader` of the module." if named else ""
        raise TypeError(f"{type(client).__name__} needs one training data loader, but got {len(loaders)}.{name}")


def refuse_strategies(trainer: Trainer, client: object, *strategies: type[Strategy]) -> None:
    """Raise a TypeError under DeepSpeed, with which this package was never tried, and under ``strategies``."""
    if isinstance(trainer.strategy, (DeepSpeedStrategy, *strategies)):
        raise TypeError(f"{type(client).__name__} does not support {type(trainer.strategy).__name__} yet.")


def warn_of_mixing(trainer: Trainer, pl_module: LightningModule) -> None:
    """Warn that a transfer hook may mix rows before they are selected."""
    for owner in (pl_module, trainer.datamodule):  # type: ignore[attr-defined]
        if is_overridden("on_after_batch_transfer", owner):
            rank_zero_warn(
                f"{type(owner).__name__}.on_after_batch_transfer runs before selection. If it mixes rows (mixup, "
                "cutmix), a sample id no longer names one sample; mix in `training_step` instead."
            )
