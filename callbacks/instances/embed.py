"""What selectors see of a data set: embeddings by any LightningModule, or the inputs, and the labels."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from curation.callbacks.lightning.seam import BatchSeam, SeamClient

LABELS = ("labels", "label", "y")


def embed(trainer: Trainer, pl_module: LightningModule, dataloader: DataLoader, layer: str | None = None) -> Tensor:
    """One embedding for each sample, in the order of the data set, by ``trainer.predict``.

    A sequence of vectors ``[B, T, D]`` is averaged over its positions, those of the batch's ``attention_mask`` where
    there is one, and a picture of them ``[B, D, H, W]`` over its pixels. Sample ids are stripped.

    Args:
        trainer: Of one process, that predicts all batches.
        pl_module: The module; its ``predict_step`` is run.
        dataloader: Of all samples, in their order; not the one of training.
        layer: Path of the submodule whose output is taken, such as ``"net.5"``; None for what ``predict_step``
            returns.

    Returns:
        fp32 ``[N, D]`` on the CPU.

    Raises:
        ValueError: If the loader shuffles or has a sampler, there are several processes, samples are left out by
            ``limit_predict_batches`` or ``fast_dev_run``, or a batch does not give a vector per row.
        TypeError: If the layer, or ``predict_step``, gives no tensor.
        AttributeError: If there is no such layer.
    """
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


def row_vectors(source: str, outputs: list[Any], batch: Any) -> Tensor:
    """One vector per row of what a layer gave for a batch, averaged as in :func:`embed`: fp32 ``[B, D]``.

    Args:
        source: Name of the layer, for errors.
        outputs: All that it gave; the first of a tuple counts.
        batch: With its ``attention_mask``, if it has one.

    Raises:
        ValueError: If it ran more than once or not at all, or gave something else than a vector per row.
        TypeError: If it gave no tensor.
    """
    if len(outputs) != 1:
        raise ValueError(f"`{source}` must run once for a batch, but ran {len(outputs)} times.")
    vectors = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
    if not isinstance(vectors, Tensor):
        raise TypeError(f"`{source}` must give a tensor, but gave {type(vectors).__name__}.")
    vectors = vectors.float()
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if vectors.dim() == 3:
        weights = torch.ones_like(vectors[..., 0]) if mask is None else mask.to(vectors.dtype)
        vectors = (vectors * weights[..., None]).sum(1) / weights.sum(1, keepdim=True)
    elif vectors.dim() == 4:
        vectors = vectors.mean((2, 3))
    if vectors.dim() != 2:
        raise ValueError(f"`{source}` must give one vector per row, but gave shape {list(vectors.shape)}.")
    return vectors


def inputs_and_labels(batch: Any) -> tuple[Any, Tensor]:
    """The inputs of a batch (None where they are not one tensor of a mapping), and its labels, integers ``[B]``.

    Raises:
        TypeError: If there are no such labels.
    """
    inputs = labels = None
    if isinstance(batch, Mapping):
        labels = next((batch[name] for name in LABELS if name in batch), None)
        tensors = [value for name, value in batch.items() if name not in LABELS and isinstance(value, Tensor)]
        inputs = tensors[0] if len(tensors) == 1 else None
    elif isinstance(batch, (list, tuple)) and len(batch) == 2:
        inputs, labels = batch
    if not isinstance(labels, Tensor) or labels.dim() != 1 or labels.is_floating_point() or labels.is_complex():
        found = f"{labels.dtype} {list(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(
            "A selector needs one integer label per sample, the second element of batches (x, y), or `labels`, "
            f"`label` or `y` of mappings, but the labels of a {type(batch).__name__} are {found}."
        )
    return inputs, labels.long()


def flat(inputs: Any) -> Tensor:
    """Inputs as vectors: fp32 ``[B, D]``.

    Raises:
        TypeError: If they are not one tensor.
    """
    if not isinstance(inputs, Tensor):
        raise TypeError(
            "Argument `layer` must be given where the inputs of a batch are not one tensor, but got None."
        )
    return inputs.reshape(len(inputs), -1).float()
