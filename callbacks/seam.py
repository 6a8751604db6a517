"""The one place where the batch of a LightningModule is replaced.

A callback cannot rebind the batch that a training step gets, and wrapping the module's own hooks goes silently dead
as soon as a DataModule overrides them. What every route passes through is ``strategy.batch_to_device``, so one
:class:`BatchSeam` stands in for it on the strategy instance, and the callbacks of this package are its clients.
"""

from typing import Any, Protocol

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from curation.batch import batch_size, split_sample_ids


class SeamClient(Protocol):
    """What the seam asks of a callback."""

    def curate(self, trainer: Trainer, pl_module: LightningModule, batch: Any, sample_ids: Tensor | None) -> Any:
        """The batch to train on, given the candidate batch on the device and its sample ids."""
        ...


class BatchSeam:
    """Stands in for ``trainer.strategy.batch_to_device`` while it has clients.

    Sample ids are stripped in every stage. Clients are asked only for batches that are trained on: not in
    validation, not in the sanity check, not while stochastic weight averaging updates its normalisation layers.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.clients: list[SeamClient] = []
        self.sample_ids: Tensor | None = None
        self._wrapped = trainer.strategy.batch_to_device
        self._was_own = "batch_to_device" in vars(trainer.strategy)
        self._batch: Any = None

    @staticmethod
    def attach(trainer: Trainer, client: SeamClient) -> "BatchSeam":
        """Add a client, installing the seam with the first one."""
        seam = vars(trainer.strategy).get("batch_to_device")
        if not isinstance(seam, BatchSeam):
            seam = BatchSeam(trainer)
            trainer.strategy.batch_to_device = seam  # type: ignore[method-assign]
        if client not in seam.clients:
            seam.clients.append(client)
        return seam

    def detach(self, client: SeamClient) -> None:
        """Remove a client, and with the last one the seam."""
        if client in self.clients:
            self.clients.remove(client)
        self._batch = self.sample_ids = None
        strategy = self.trainer.strategy
        if self.clients or vars(strategy).get("batch_to_device") is not self:
            return
        if self._was_own:
            strategy.batch_to_device = self._wrapped  # type: ignore[method-assign]
        else:
            del strategy.batch_to_device

    def __call__(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """Move the batch as the strategy does, without its ids, and let the clients curate it."""
        batch, ids = split_sample_ids(batch)
        batch = self._wrapped(batch, device=device, dataloader_idx=dataloader_idx)
        trainer = self.trainer
        self._batch = batch
        if not trainer.training or trainer.fit_loop._skip_backward:
            return batch
        if ids is not None:
            ids = self._on_device(ids, batch, device)
        for client in self.clients:
            batch = client.curate(trainer, trainer.lightning_module, batch, ids)
        self._batch = batch
        self.sample_ids = ids
        return batch

    def _on_device(self, ids: Tensor, batch: Any, device: torch.device | None) -> Tensor:
        size = batch_size(batch)
        if len(ids) != size:
            raise ValueError(
                f"The batch came with {len(ids)} sample ids but has {size} rows after its transfer hooks."
            )
        return ids.to(device or self.trainer.strategy.root_device, non_blocking=True)

    def check(self, batch: Any) -> None:
        """Raise unless ``batch``, which is about to be trained on, is what the seam returned last."""
        if batch is not self._batch:
            raise RuntimeError(
                "The batch given to `training_step` did not pass through `strategy.batch_to_device`, so nothing was "
                "selected. A strategy or a Lightning version that moves batches in another way is not supported."
            )
        self._batch = None


def check_training_step(pl_module: LightningModule) -> None:
    """Raise if the module fetches its own batches, which no callback can curate."""
    if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
        raise TypeError(
            f"`{type(pl_module).__name__}.training_step(dataloader_iter)` fetches its own batches, so none can be "
            "curated. Take `batch` as the argument of `training_step` instead."
        )


def warn_of_mixing(trainer: Trainer, pl_module: LightningModule) -> None:
    """Warn that a transfer hook may mix rows before they are selected."""
    base = LightningModule.on_after_batch_transfer
    owners: list[Any] = [pl_module, trainer.datamodule] if trainer.datamodule is not None else [pl_module]  # type: ignore[attr-defined]
    for owner in owners:
        if getattr(type(owner), "on_after_batch_transfer", base).__qualname__.split(".")[0] != "DataHooks":
            rank_zero_warn(
                f"{type(owner).__name__}.on_after_batch_transfer runs before selection. If it mixes rows (mixup, "
                "cutmix), a sample id no longer names one sample; mix in `training_step` instead."
            )
