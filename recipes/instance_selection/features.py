"""What a selector sees of a recipe's data: features and labels of all samples, in order."""

import pickle
from typing import Any

import numpy as np
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
        ValueError: If it is no ``DataLoader`` of a map-style data set.
    """
    if not isinstance(loader, DataLoader) or not hasattr(loader.dataset, "__len__"):
        raise ValueError(
            f"A selection needs one map-style `DataLoader` of each part, but got {type(loader).__name__}."
        )
    return DataLoader(
        loader.dataset, loader.batch_size or 256, collate_fn=loader.collate_fn, num_workers=loader.num_workers
    )


def features_and_labels(
    trainer: Trainer, module: LightningModule, loader: DataLoader, layer: str | None, title: str, classes: bool = True
) -> Part:
    """Features and labels of all samples, in order.

    Args:
        trainer: A trainer of one process.
        module: The module whose layer gives the features.
        loader: An unshuffled loader of all samples.
        layer: Name of the submodule whose output are the features; None for the flattened inputs.
        title: What the samples are called in the progress bar.
        classes: Whether the labels must be classes; else they may be numbers, or missing.

    Returns:
        Features fp32 ``[N, D]`` and labels ``[N]``, int64, or floating and NaN where they are missing.

    Raises:
        ValueError: If there are no samples, a batch has no labels, its inputs are not one tensor and there is no
            layer, or the module has no such layer; and as :func:`~curation.callbacks.instances.embed.embed`.
    """
    from rich.progress import track

    if layer is not None and layer not in dict(module.named_modules()):
        raise ValueError(f"Argument `--layer` must name a submodule of {type(module).__name__}, but got {layer!r}.")
    features, labels = [], []
    for batch in track(loader, f"reading {title} samples"):
        try:
            inputs, y = inputs_and_labels(split_sample_ids(batch)[0], classes)
            if layer is None:
                features.append(flatten_inputs(inputs))
        except TypeError as error:
            raise ValueError(f"The {title} samples cannot be selected from. {error}") from error
        labels.append(y)
    if not labels:
        raise ValueError(f"There are no {title} samples.")
    x = torch.cat(features) if layer is None else embed(trainer, module, loader, layer)
    return x.numpy(), torch.cat(labels).numpy()


def load_weights(module: LightningModule, ckpt_path: str) -> None:
    """Load the weights of a checkpoint into a module, on the CPU.

    Raises:
        ValueError: If the file is no checkpoint, or one of another module.
    """
    try:
        module.load_state_dict(torch.load(ckpt_path, map_location="cpu", weights_only=True)["state_dict"])
    except (pickle.UnpicklingError, EOFError, KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"Argument `--ckpt_path` must name a checkpoint of {type(module).__name__}, but got {ckpt_path!r}: "
            f"{' '.join(str(error).split())[:300]}"  # all missing weights may be listed
        ) from error


def read_features(file: str, count: int) -> np.ndarray:
    """Features ``[N, D]`` in a ``.npy`` file.

    Raises:
        ValueError: If the file does not hold a row of numbers for each of ``count`` training samples.
    """
    features = read_array("--features", file)
    if features.ndim != 2 or len(features) != count:
        raise ValueError(
            f"Argument `--features` must hold [{count}, D], a row for each training sample, but "
            f"{file!r} has {list(features.shape)}."
        )
    return features


def read_array(option: str, file: str, what: str = "numbers") -> np.ndarray:
    """The array in a ``.npy`` file.

    Args:
        option: The option that names the file, for the errors.
        file: The file.
        what: What it should hold, for the errors.

    Raises:
        ValueError: If the file holds no numbers.
    """
    try:
        array: Any = np.load(file)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"Argument `{option}` must name a .npy file of {what}, but got {file!r}: {error}") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iufb":
        kind = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
        raise ValueError(f"Argument `{option}` must name a .npy file of {what}, but {file!r} holds {kind}.")
    return array
