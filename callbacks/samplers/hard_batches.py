"""Hard-batch training in a fit: the sampler gets the losses."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from curation.callbacks.lightning.seam import SeamClient, check_one_loader, check_training_step
from curation.samplers.hard_batches import HardBatchSampler


class HardBatchTraining(SeamClient):
    """Gives a :class:`~curation.samplers.hard_batches.HardBatchSampler` the loss of every mini-batch.

    The loss is what ``training_step`` returned, before the update, averaged over processes (arXiv 2304.03486). Saves
    the state of the sampler with checkpoints, so that a run resumes in the middle of a round. Strips sample ids.

    Attributes:
        sampler: The sampler of the training data loader; None before the loader is prepared.

    Raises:
        ValueError: If the training data loader has no such sampler, or another batch size than it.
        TypeError: If ``training_step`` returns no loss in a manual optimisation, or fetches its batches itself.

    Example:
        >>> from curation.samplers import HardBatchSampler
        >>> dataset = list(range(64))
        >>> loader = DataLoader(dataset, 8, sampler=HardBatchSampler(dataset, 8, delta=0.25))
        >>> callbacks = [HardBatchTraining()]  # Trainer(callbacks=callbacks).fit(module, loader)
    """

    def __init__(self) -> None:
        self.sampler: HardBatchSampler | None = None
        self._state: dict[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier fit; watch for the training data loader."""
        super().setup(trainer, pl_module, stage)
        if self.fitting:
            check_training_step(pl_module)
            self.sampler = self._state = None

    def watch(self, dataloader: Any) -> None:
        """Find the sampler, and restore its state before it is iterated."""
        sampler = dataloader.sampler if isinstance(dataloader, DataLoader) else None
        if not isinstance(sampler, HardBatchSampler):
            raise ValueError(
                "HardBatchTraining needs a training `DataLoader(sampler=HardBatchSampler(...))`, but its sampler is "
                f"{type(sampler).__name__}. (`overfit_batches` takes samplers away.)"
            )
        if dataloader.batch_size != sampler.batch_size:
            raise ValueError(
                f"The data loader must have the `batch_size` of its sampler, {sampler.batch_size}, but has "
                f"{dataloader.batch_size!r}."
            )
        if sampler is not self.sampler:  # the first of the fit, or one of a reloaded data loader
            state = self._state if self.sampler is None else self.sampler.state_dict()
            if state is None:
                sampler.reset()
            else:
                sampler.load_state_dict(state)
        self.sampler = sampler

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse several data loaders, whose losses would be mixed up."""
        check_one_loader(trainer, self)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Give the sampler the loss."""
        assert self.sampler is not None
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if loss is None and pl_module.automatic_optimization:  # Lightning skips such a batch
            loss = torch.full((), torch.nan, device=pl_module.device)
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"`{type(pl_module).__name__}.training_step` must return its loss to be ranked, but returned "
                f"{type(outputs).__name__}."
            )
        # Lightning has divided it by the number of micro-batches of a step.
        micro_batches = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
        self.sampler.trained(trainer.strategy.reduce(loss.detach() * micro_batches, reduce_op="mean"))
        if trainer.is_last_batch:
            self.sampler.end_epoch()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count an epoch that ended without its last batch, because a hook asked for it."""
        if self.sampler is not None:
            self.sampler.end_epoch()

    def state_dict(self) -> dict[str, Any]:
        """The state of the sampler; equal on all ranks."""
        return {"sampler": self._state if self.sampler is None else self.sampler.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        """Keep the state of the sampler until the data loader is prepared."""
        self._state = state["sampler"]
