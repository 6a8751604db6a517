"""Rows of any nested batch: how many there are, and taking some of them."""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curation.sample_ids import SAMPLE_ID, SampleIds, split_sample_ids

__all__ = ["SAMPLE_ID", "SampleIds", "batch_size", "leaves", "split_sample_ids", "take_rows", "trim_padding"]


def _is_namedtuple(node: Any) -> bool:
    return isinstance(node, tuple) and hasattr(node, "_fields")


def _holds_tensors(node: Any) -> bool:
    if isinstance(node, Tensor):
        return node.dim() > 0
    children = _children(node)
    return children is not None and any(_holds_tensors(child) for _, child in children)


def _is_column(node: Any) -> bool:
    """A list or tuple with one entry per row (strings, dicts of settings), rather than a container of fields."""
    return isinstance(node, (list, tuple)) and not _is_namedtuple(node) and not any(map(_holds_tensors, node))


def _children(node: Any) -> list[tuple[str, Any]] | None:
    """The named fields of a container, or None for a leaf."""
    if isinstance(node, Mapping):
        return [(str(key), value) for key, value in node.items()]
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        return [(f.name, getattr(node, f.name)) for f in dataclasses.fields(node)]
    if _is_namedtuple(node):
        return list(zip(node._fields, node, strict=True))
    if isinstance(node, (list, tuple)) and not _is_column(node):
        return [(str(i), value) for i, value in enumerate(node)]
    return None


def _rebuild(node: Any, values: Sequence[Any]) -> Any:
    """A container like ``node`` that holds ``values``."""
    if isinstance(node, Mapping):
        new: Any = copy.copy(node)
        for key, value in zip(node, values, strict=True):
            new[key] = value
        return new
    if dataclasses.is_dataclass(node):
        new = copy.copy(node)
        for field, value in zip(dataclasses.fields(node), values, strict=True):
            object.__setattr__(new, field.name, value)
        return new
    if _is_namedtuple(node):
        return type(node)(*values)
    return type(node)(values)


def leaves(node: Any, path: str = "batch") -> list[tuple[str, Any]]:
    """The leaves of a nested batch, each with its path; a column of rows that are no tensors is one."""
    children = _children(node)
    if children is None:
        return [(path, node)]
    return [leaf for name, child in children for leaf in leaves(child, f"{path}.{name}")]


def _map_leaves(node: Any, fn: Callable[[Any, str], Any], path: str = "batch") -> Any:
    children = _children(node)
    if children is None:
        return fn(node, path)
    return _rebuild(node, [_map_leaves(child, fn, f"{path}.{name}") for name, child in children])


def batch_size(batch: Any) -> int:
    """Number of rows of a nested batch.

    Every tensor with at least one dimension is taken to hold one row per sample in its first dimension.
    Scalars, ``None`` and other objects without a length belong to the batch as a whole.

    Args:
        batch: Tensors in any nesting of mappings, lists, tuples, named tuples and dataclasses.

    Raises:
        TypeError: If the batch holds no tensor with a batch dimension.
        ValueError: If the tensors disagree on the number of rows, or there are none.

    Example:
        >>> batch_size({"x": torch.zeros(4, 3), "meta": [torch.zeros(4), "train"]})
        4
    """
    # A list, since the keys 1 and "1" have one path.
    sizes = [(path, leaf.size(0)) for path, leaf in leaves(batch) if isinstance(leaf, Tensor) and leaf.dim() > 0]
    if not sizes:
        raise TypeError(f"The batch holds no tensor with a batch dimension, but is {type(batch).__name__}.")
    size = sizes[0][1]
    if any(rows != size for _, rows in sizes):
        listed = ", ".join(f"{path} has {rows}" for path, rows in sizes)
        raise ValueError(f"The tensors of the batch disagree on the number of rows: {listed}.")
    if size == 0:
        raise ValueError("The batch has no rows.")
    return size


def take_rows(batch: Any, rows: Tensor) -> Any:
    """The rows of a nested batch at given indices, in the same nesting; the batch itself is left alone.

    Tensors are indexed along their first dimension without a host synchronisation. NumPy arrays, and lists and tuples
    without tensors, are indexed too where they are as long as the batch, which needs the rows on the host.

    Args:
        batch: As in :func:`batch_size`.
        rows: int64 ``[k]`` in ``[0, B)``, on the batch's device.

    Raises:
        TypeError: As :func:`batch_size`, and if another object is as long as the batch: it may hold one entry a row.
            Also if a tensor is nested, or ``rows`` are no integers.
        ValueError: As :func:`batch_size`, and on a CPU if a row is not in the batch.

    Example:
        >>> take_rows({"x": torch.arange(4), "name": ["a", "b", "c", "d"]}, torch.tensor([0, 2]))
        {'x': tensor([0, 2]), 'name': ['a', 'c']}
    """
    size = batch_size(batch)
    if rows.dtype not in (torch.int32, torch.int64) or rows.dim() != 1:
        raise TypeError(f"Argument `rows` must be int64 [k], but got {rows.dtype} {list(rows.shape)}.")
    if rows.device.type == "cpu" and len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < size:
        raise ValueError(f"Argument `rows` must be in [0, {size}), but got {int(rows.min())} to {int(rows.max())}.")

    def take(leaf: Any, path: str) -> Any:
        if isinstance(leaf, Tensor):
            if leaf.is_nested:
                raise TypeError(f"{path} is a nested tensor, of which no rows can be taken; pad it.")
            return leaf.index_select(0, rows.to(leaf.device)) if leaf.dim() > 0 else leaf
        if isinstance(leaf, (str, bytes, torch.Size)) or not hasattr(leaf, "__len__") or len(leaf) != size:
            return leaf
        if isinstance(leaf, np.ndarray):
            return leaf[rows.cpu().numpy()]
        if _is_column(leaf):
            return type(leaf)(leaf[i] for i in rows.tolist())
        raise TypeError(
            f"{path} is a {type(leaf).__name__} as long as the batch; make it a tensor, an array or a list, so that "
            "its rows can be taken."
        )

    return _map_leaves(batch, take)


def trim_padding(batch: Any) -> Any:
    """Drop the trailing columns of a text batch that are padding in every row.

    Applies to mappings with ``input_ids`` and ``attention_mask`` of shape ``[B, T]`` and without inputs for a
    decoder; other batches are returned as they are. A column is padding where ``attention_mask`` is 0 and ``labels``,
    if they have that shape, are -100. Every ``[B, T, ...]`` tensor of the mapping is cut. Costs one host
    synchronisation.

    Example:
        >>> trim_padding({"input_ids": torch.tensor([[5, 0, 0]]), "attention_mask": torch.tensor([[1, 0, 0]])})
        {'input_ids': tensor([[5]]), 'attention_mask': tensor([[1]])}
    """
    if not isinstance(batch, Mapping) or any(str(key).startswith("decoder_") for key in batch):
        return batch
    ids, mask, labels = (batch.get(key) for key in ("input_ids", "attention_mask", "labels"))
    if not (isinstance(ids, Tensor) and isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape == ids.shape):
        return batch
    if not mask.numel():
        return batch
    used = mask.ne(0)
    if isinstance(labels, Tensor) and labels.shape == mask.shape:
        used = used | labels.ne(-100)
    width = int((used.any(dim=0) * torch.arange(1, mask.size(1) + 1, device=mask.device)).max())
    if width in (0, mask.size(1)):
        return batch
    values = [
        v[:, :width].contiguous() if isinstance(v, Tensor) and v.dim() >= 2 and v.shape[:2] == mask.shape else v
        for v in batch.values()
    ]
    return _rebuild(batch, values)
