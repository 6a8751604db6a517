"""Embeddings of a data set by any LightningModule."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from curation.callbacks.instances.features import row_vectors
from curation.callbacks.lightning.seam import BatchSeam, SeamClient
from curation.checks import check_text


def embed(trainer: Trainer, pl_module: LightningModule, dataloader: DataLoader, layer: str | None = None) -> Tensor:
    """One embedding for each sample, in the order of the data set, by ``trainer.predict``.

    Sequences of vectors ``[B, T, D]`` are averaged over their positions, where the batch has an ``attention_mask``
    over its positions only; pictures of vectors ``[B, D, H, W]`` are averaged over their pixels. Sample ids are
    stripped.

    Args:
        trainer: A trainer of one process that predicts all batches.
        pl_module: The module; its ``predict_step`` is run.
        dataloader: A data loader of all samples in their order, which that of training is not.
        layer: Path of the submodule whose output is taken, such as ``"net.5"``; None for what ``predict_step``
            returns.

    Returns:
        fp32 ``[N, D]`` on the CPU.

    Raises:
        ValueError: If the loader shuffles or has a sampler, there are several processes, samples are left out by
            ``limit_predict_batches`` or ``fast_dev_run``, or a batch does not give a vector per row.
        TypeError: If the layer, or ``predict_step``, gives no tensor.
        AttributeError: If there is no such layer.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
        >>> trainer = Trainer(accelerator="cpu", logger=False, barebones=True)
        >>> embed(trainer, BoringModel(), DataLoader(RandomDataset(32, 10), batch_size=4), layer="layer").shape
        torch.Size([10, 2])
    """
    check_text("layer", layer, optional=True)
    if trainer.world_size > 1:
        raise ValueError(f"Argument `trainer` must have one process, but has {trainer.world_size}.")
    limit = trainer.limit_predict_batches
    if isinstance(limit, int) or limit < 1:  # positions would no longer be those of the data set
        raise ValueError(f"Argument `trainer` must predict all batches, but has `limit_predict_batches={limit}`.")
    for sampler, kind in ((dataloader.sampler, SequentialSampler), (dataloader.batch_sampler, BatchSampler)):
        if type(sampler) not in (kind, type(None)):
            raise ValueError(
                f"Argument `dataloader` must keep the order of the data set, but has a {type(sampler).__name__}."
            )
    collect, client = _Collect(layer or "predict_step"), SeamClient()
    hook = pl_module.get_submodule(layer).register_forward_hook(collect.on_forward) if layer else None
    trainer.callbacks.append(collect)  # type: ignore[attr-defined]
    BatchSeam.attach(trainer, client)
    try:
        trainer.predict(pl_module, dataloader, return_predictions=False)
    finally:
        BatchSeam.detach(trainer, client)
        trainer.callbacks.remove(collect)  # type: ignore[attr-defined]
        if hook is not None:
            hook.remove()
    if not collect.embeddings:
        raise ValueError("Argument `dataloader` must have a batch, but has none.")
    return torch.cat(collect.embeddings)


class _Collect(Callback):
    def __init__(self, source: str) -> None:
        self.source = source
        self.outputs: list[Any] = []
        self.embeddings: list[Tensor] = []

    def on_forward(self, module: Any, args: Any, output: Any) -> None:
        self.outputs.append(output)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        if self.source == "predict_step":
            self.outputs.append(outputs)
        self.embeddings.append(row_vectors(self.source, self.outputs, batch).cpu())
        self.outputs = []
