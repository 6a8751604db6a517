"""Hard-batch training in a fit: the sampler gets the losses."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from curation.callbacks.samplers.round_training import RoundTraining
from curation.samplers.hard_batches import HardBatchSampler


class HardBatchTraining(RoundTraining[HardBatchSampler]):
    """Gives a :class:`~curation.samplers.hard_batches.HardBatchSampler` the loss of every mini-batch.

    The loss is what ``training_step`` returned, before the update, averaged over processes (arXiv 2304.03486). Saves
    the state of the sampler with checkpoints, so that a run resumes in the middle of a round. Strips sample ids.

    Attributes:
        sampler: The sampler of the training data loader; None before the loader is prepared.

    Raises:
        ValueError: If the training data loader has no such sampler, or another batch size than it.
        TypeError: If ``training_step`` returns no loss in a manual optimisation, or fetches its batches itself.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> from curation.samplers import HardBatchSampler
        >>> dataset = list(range(64))
        >>> loader = DataLoader(dataset, 8, sampler=HardBatchSampler(dataset, 8, delta=0.25))
        >>> callbacks = [HardBatchTraining()]  # Trainer(callbacks=callbacks).fit(module, loader)
    """

    sampler_type = HardBatchSampler

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
