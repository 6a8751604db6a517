"""The irreducible loss of every training sample: that of a model which has not trained on it (arXiv 2206.07137)."""

from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from curation.batch import split_sample_ids
from curation.replace import replace_attribute
from curation.scoring import Route, find_route, per_sample_loss


def irreducible_losses(
    trainer: Trainer, module: LightningModule, datamodule: LightningDataModule, ckpt_path: str
) -> Tensor:
    """Losses of the training samples by a model that was trained on other data, one forward pass per sample.

    Args:
        trainer: A trainer of one process; its precision and device are used.
        module: Any module that a selection can score.
        datamodule: A data module with a map-style training set.
        ckpt_path: Checkpoint of the module, trained on other data.

    Returns:
        fp32 ``[N]`` on the CPU, by sample id, or by position where the samples have no ids; NaN for ids below the
        largest that the loader does not have.

    Raises:
        TypeError: If the module gives no per-sample outputs.
        ValueError: If there are several processes, or the trainer limits the batches.
    """
    if trainer.world_size > 1:
        raise ValueError(f"Irreducible losses are taken by one process, but the trainer has {trainer.world_size}.")
    losses: list[Tensor] = []
    ids: list[Tensor] = []
    route: Route | None = None
    size = 0

    def val_dataloader() -> DataLoader:
        nonlocal size
        datamodule.setup("fit")
        loader = datamodule.train_dataloader()
        size = len(loader.dataset)
        return DataLoader(
            loader.dataset, loader.batch_size or 256, collate_fn=loader.collate_fn, num_workers=loader.num_workers
        )

    def validation_step(batch: Any, batch_idx: int) -> None:
        nonlocal route
        batch, sample_ids = split_sample_ids(batch)
        if sample_ids is not None:
            ids.append(sample_ids)
        route = route or find_route(module, batch)
        losses.append(per_sample_loss(*route(batch)))

    undo = [
        replace_attribute(datamodule, "val_dataloader", val_dataloader),
        replace_attribute(module, "validation_step", validation_step),
    ]
    try:
        trainer.validate(module, datamodule, ckpt_path=ckpt_path, verbose=False)
    finally:
        for restore in undo:
            restore()
    losses_in_order = torch.cat(losses).cpu()
    if len(losses_in_order) != size:
        raise ValueError(
            f"Only {len(losses_in_order)} of {size} samples were scored: take the limit from the trainer."
        )
    if not ids:
        return losses_in_order
    ids_in_order = torch.cat(ids).cpu()
    losses_by_id = torch.full((int(ids_in_order.max()) + 1,), torch.nan)
    losses_by_id[ids_in_order] = losses_in_order
    return losses_by_id
