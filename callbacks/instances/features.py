"""Features and labels of a batch, as selectors get them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from curation.batch import batch_size

LABELS = ("labels", "label", "y")


def row_vectors(source: str, outputs: list[Any], batch: Any) -> Tensor:
    """One vector per row from the output of a layer for a batch.

    Sequences and pictures of vectors are averaged as in :func:`~curation.callbacks.instances.embed.embed`.

    Args:
        source: Name of the layer, for errors.
        outputs: All outputs of the layer for the batch, a list with one item; the first of a tuple counts.
        batch: The batch; its ``attention_mask``, if there is one, says which positions count.

    Returns:
        fp32 ``[B, D]``.

    Raises:
        ValueError: If the layer ran more than once or not at all, or its output has not one vector per row.
        TypeError: If the output is no tensor.

    Example:
        >>> row_vectors("layer", [torch.tensor([[[1.0], [3.0]]])], {})
        tensor([[2.]])
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


def inputs_and_labels(batch: Any, classes: bool = True) -> tuple[Any, Tensor]:
    """The inputs and the labels of a batch.

    Args:
        batch: A pair ``(x, y)``, or a mapping with ``labels``, ``label`` or ``y``; where the labels need not be
            classes, also one without labels, a tensor ``x`` or a tuple ``(x,)``.
        classes: Whether the labels must be classes. Else they may be numbers, ``[B]`` or ``[B, 1]``, and where there
            is not one for each sample they are missing.

    Returns:
        The inputs, None where a mapping has not exactly one other tensor; the labels ``[B]``, int64, or floating and
        NaN where they are missing.

    Raises:
        TypeError: If there are no integer labels ``[B]``, and they must be classes.

    Example:
        >>> inputs_and_labels({"x": torch.zeros(2, 3), "y": torch.tensor([0, 1])})[1]
        tensor([0, 1])
        >>> inputs_and_labels(torch.zeros(2, 3), classes=False)[1]
        tensor([nan, nan])
    """
    inputs = labels = None
    if isinstance(batch, Mapping):
        labels = next((batch[name] for name in LABELS if name in batch), None)
        tensors = [value for name, value in batch.items() if name not in LABELS and isinstance(value, Tensor)]
        inputs = tensors[0] if len(tensors) == 1 else None
    elif isinstance(batch, (list, tuple)) and len(batch) == 2:
        inputs, labels = batch
    elif not classes:
        inputs = batch[0] if isinstance(batch, (list, tuple)) and len(batch) == 1 else batch
    if isinstance(labels, Tensor) and not labels.is_complex():
        if labels.dim() == 1 and not labels.is_floating_point():
            return inputs, labels.long()
        if not classes and (labels.dim() == 1 or labels.shape[1:] == (1,)):
            return inputs, labels.flatten().float()
    if not classes:
        return inputs, torch.full((batch_size(batch),), torch.nan)
    kind = f"{labels.dtype} {list(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
    raise TypeError(
        "A selector needs one integer label per sample, the second element of batches (x, y), or `labels`, "
        f"`label` or `y` of mappings, but the labels of a {type(batch).__name__} are {kind}."
    )


def flatten_inputs(inputs: Any) -> Tensor:
    """The inputs of a batch as vectors.

    Args:
        inputs: A tensor ``[B, ...]``.

    Returns:
        fp32 ``[B, D]``.

    Raises:
        TypeError: If the inputs are not one tensor.
    """
    if not isinstance(inputs, Tensor):
        raise TypeError(
            "Argument `layer` must be given where the inputs of a batch are not one tensor, but got None."
        )
    return inputs.reshape(len(inputs), -1).float()
