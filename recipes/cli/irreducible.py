"""The irreducible loss of every training sample: that of a model which has not trained on it (arXiv 2206.07137).

``curation irreducible --config RECIPE --ckpt_path HOLDOUT.ckpt --output irreducible.pt`` scores the training set of a
recipe, in order, with a model that was trained on held-out data.
"""

import argparse
from pathlib import Path
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
    """Losses of the training samples, by sample id, or by place where they have none: fp32 ``[N]``, on the CPU.

    Args:
        trainer: Of one process; its precision and device are used.
        module: Any module that a selection can score.
        datamodule: With a map-style training set.
        ckpt_path: Checkpoint of the module, trained on other data.

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
        batch, of_batch = split_sample_ids(batch)
        if of_batch is not None:
            ids.append(of_batch)
        route = route or find_route(module, batch)
        losses.append(per_sample_loss(*route(batch)))

    undo = [
        replace_attribute(datamodule, "val_dataloader", val_dataloader),
        replace_attribute(module, "validation_step", validation_step),
    ]
    try:
        trainer.validate(module, datamodule, ckpt_path=ckpt_path, verbose=False)
    finally:
        for one in undo:
            one()
    of_rows = torch.cat(losses).cpu()
    if len(of_rows) != size:
        raise ValueError(f"Only {len(of_rows)} of {size} samples were scored: take the limit from the trainer.")
    if not ids:
        return of_rows
    of_ids = torch.cat(ids).cpu()
    table = torch.full((int(of_ids.max()) + 1,), torch.nan)
    table[of_ids] = of_rows
    return table


def main(args: list[str]) -> None:
    """``curation irreducible --config RECIPE --ckpt_path CKPT --output FILE [overrides]``.

    Raises:
        ValueError: If the checkpoint is missing, or something stands in the way of scoring every sample.
        OSError: If the output exists or cannot be written.
    """
    from curation.recipes.cli.main import run

    parser = argparse.ArgumentParser("curation irreducible", description=__doc__, allow_abbrev=False)
    parser.add_argument("--ckpt_path", required=True, help="checkpoint of a model trained on held-out data")
    parser.add_argument("--output", required=True, help="file for the losses, fp32 [N] by sample id")
    options, rest = parser.parse_known_args(args)
    if not Path(options.ckpt_path).is_file():
        raise ValueError(f"Argument `--ckpt_path` must name a checkpoint, but there is no {options.ckpt_path!r}.")
    output = Path(options.output)
    if output.exists():
        raise FileExistsError(f"Argument `--output` must name a new file, but {options.output!r} exists.")
    output.parent.mkdir(parents=True, exist_ok=True)
    cli = run(rest, execute=False)
    if cli.datamodule is None:
        raise ValueError("Argument `--config` must name a recipe with a data module.")
    table = irreducible_losses(cli.trainer, cli.model, cli.datamodule, options.ckpt_path)
    torch.save(table, output)
    print(f"Irreducible losses of {len(table)} samples, mean {table.nanmean():.3f}, in {output}.")
