"""What a selector sees of a recipe's data: features and labels of all samples, in order."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from curation.batch import split_sample_ids
from curation.callbacks.instances.embed import embed
from curation.callbacks.instances.features import flatten_inputs, inputs_and_labels
from curation.evaluation.retention import Part


def in_order(loader: Any) -> DataLoader:
    """A loader of the same data set, unshuffled and whole.

    Args:
        loader: The loader of a data module.

    Raises:
        TypeError: If it is no ``DataLoader`` of a map-style data set.
    """
    if not isinstance(loader, DataLoader) or not hasattr(loader.dataset, "__len__"):
        raise TypeError(
            f"A selection needs one map-style `DataLoader` of each part, but got {type(loader).__name__}."
        )
    return DataLoader(
        loader.dataset, loader.batch_size or 256, collate_fn=loader.collate_fn, num_workers=loader.num_workers
    )


def features_and_labels(
    trainer: Trainer, module: LightningModule, loader: DataLoader, layer: str | None, title: str
) -> Part:
    """Features and labels of all samples, in order.

    Args:
        trainer: A trainer of one process.
        module: The module whose layer gives the features.
        loader: An unshuffled loader of all samples.
        layer: Name of the submodule whose output are the features; None for the flattened inputs.
        title: What the samples are called in the progress bar.

    Returns:
        Features fp32 ``[N, D]`` and labels int64 ``[N]``.

    Raises:
        TypeError: If a batch has no labels, or its inputs are not one tensor and there is no layer.
        ValueError: As :func:`~curation.callbacks.instances.embed.embed`.
    """
    from rich.progress import track

    features, labels = [], []
    for batch in track(loader, f"reading {title} samples"):
        inputs, y = inputs_and_labels(split_sample_ids(batch)[0])
        labels.append(y)
        if layer is None:
            features.append(flatten_inputs(inputs))
    x = torch.cat(features) if layer is None else embed(trainer, module, loader, layer)
    return x.numpy(), torch.cat(labels).numpy()


def load_weights(module: LightningModule, ckpt_path: str) -> None:
    """Load the weights of a checkpoint into a module, on the CPU."""
    module.load_state_dict(torch.load(ckpt_path, map_location="cpu", weights_only=True)["state_dict"])
