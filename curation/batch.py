"""Rows of any nested batch: how many there are, taking some of them, and copies."""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curation.sample_ids import SAMPLE_ID, SampleIds, split_sample_ids

__all__ = [
    "SAMPLE_ID",
    "Columns",
    "SampleIds",
    "batch_size",
    "copied",
    "leaves",
    "split_sample_ids",
    "take_rows",
    "trim_padding",
]

ENCODINGS = "encodings of the tokenizer"

# Fields of a text batch whose second dimension is that of `input_ids`.
TOKEN_FIELDS = {
    *("input_ids", "attention_mask", "labels", "token_type_ids", "position_ids", "special_tokens_mask"),
    *("inputs_embeds", "offset_mapping", "loss_mask", "completion_mask", "prompt_mask", "assistant_masks"),
    *("global_attention_mask", "bbox", "mm_token_type_ids"),
}


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


def _name(key: Any) -> str:
    """A key in a path: 1 is not "1"."""
    return key if isinstance(key, str) and not key.startswith("[") else f"[{key!r}]"


def _children(node: Any) -> list[tuple[str, Any]] | None:
    """The named fields of a container, or None for a leaf."""
    if isinstance(node, Mapping):
        return [(_name(key), value) for key, value in node.items()]
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


def map_leaves(node: Any, fn: Callable[[Any, str], Any], path: str = "batch") -> Any:
    children = _children(node)
    if children is None:
        return fn(node, path)
    new = _rebuild(node, [map_leaves(child, fn, f"{path}.{name}") for name, child in children])
    if isinstance(node, Mapping) and getattr(node, "_encodings", None) is not None:  # of a tokenizer, one per row
        new._encodings = fn(node._encodings, f"{path}.{ENCODINGS}")  # type: ignore[attr-defined]
    return new


def copied(batch: Any) -> Any:
    """A copy of a nested batch: what is done to its containers and tensors leaves the batch alone.

    Tensors, NumPy arrays and containers are copied; other objects are shared, but for the batch itself.

    Example:
        >>> batch = {"inputs": {"x": torch.ones(2)}}
        >>> copied(batch)["inputs"].pop("x").zero_()
        tensor([0., 0.])
        >>> batch
        {'inputs': {'x': tensor([1., 1.])}}
    """

    def copy_leaf(leaf: Any, path: str) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.clone()
        if isinstance(leaf, np.ndarray):
            return leaf.copy()
        if _is_column(leaf) and not isinstance(leaf, torch.Size):
            return type(leaf)(map_leaves(entry, copy_leaf, path) for entry in leaf)
        return copy.copy(leaf) if path == "batch" else leaf

    return map_leaves(batch, copy_leaf)


def _is_number(node: Any) -> bool:
    return isinstance(node, (int, float, np.number)) or (isinstance(node, Tensor) and node.dim() == 0)


def _is_list_of_samples(batch: Any) -> bool:
    """Whether a batch is a list of samples: each holds tensors, and a number in the same place."""
    if not isinstance(batch, (list, tuple)) or _is_namedtuple(batch) or len(batch) < 2 or _is_column(batch):
        return False
    fields = [None if isinstance(sample, Tensor) else _children(sample) for sample in batch]
    if any(names is None or len(names) < 2 for names in fields):
        return False
    samples: list[dict[str, Any]] = [dict(names) for names in fields if names is not None]
    return all(sample.keys() == samples[0].keys() for sample in samples) and any(
        all(_is_number(sample[name]) for sample in samples) for name in samples[0]
    )


def _refuse_samples(batch: Any) -> None:
    raise TypeError(
        f"The batch is a {type(batch).__name__} of {len(batch)} samples, whose rows cannot be told from their other "
        "dimensions; collate the samples into one mapping or tuple of tensors [B, ...]."
    )


def refuse_samples(batch: Any, size: int, expected: int | None) -> None:
    """Raise a TypeError if a batch is a list of ``expected`` samples, whose first dimension is ``size`` by chance.

    Args:
        batch: The batch.
        size: Number of its rows as :func:`batch_size` finds it.
        expected: Batch size of the data loader; None if that is not known.
    """
    if not isinstance(batch, (list, tuple)) or _is_namedtuple(batch) or len(batch) != expected or size == expected:
        return
    kinds = [(x.shape, x.dtype) if isinstance(x, Tensor) else [name for name, _ in _children(x) or []] for x in batch]
    if all(kind == kinds[0] for kind in kinds) and (size > len(batch) or len(batch) > 4):
        _refuse_samples(batch)


def batch_size(batch: Any) -> int:
    """Number of rows of a nested batch.

    Every tensor with at least one dimension is taken to hold one row per sample in its first dimension.
    Scalars, ``None`` and other objects without a length belong to the batch as a whole.

    Args:
        batch: Tensors in any nesting of mappings, lists, tuples, named tuples and dataclasses.

    Raises:
        TypeError: If the batch holds no tensor with a batch dimension, or is a list of samples.
        ValueError: If the tensors disagree on the number of rows, or there are none.

    Example:
        >>> batch_size({"x": torch.zeros(4, 3), "meta": [torch.zeros(4), "train"]})
        4
    """
    if _is_list_of_samples(batch):
        _refuse_samples(batch)
    sizes = [(path, leaf.size(0)) for path, leaf in leaves(batch) if isinstance(leaf, Tensor) and leaf.dim() > 0]
    if not sizes:
        raise TypeError(f"The batch holds no tensor with a batch dimension, but is {type(batch).__name__}.")
    size = sizes[0][1]
    if any(rows != size for _, rows in sizes):
        listed = ", ".join(f"{path} has {rows}" for path, rows in sizes[:4]) + (", ..." if len(sizes) > 4 else "")
        hint = " If it is a list of samples, let `collate_fn` make tensors [B, ...] of them."
        hint = hint if isinstance(batch, list) else ""
        raise ValueError(f"The tensors of the batch disagree on the number of rows: {listed}.{hint}")
    if size == 0:
        raise ValueError("The batch has no rows.")
    return size


class Columns:
    """Tells lists with an entry per row from those that belong to the batch as a whole, over several batches.

    A list, tuple or NumPy array is a column of rows where it is as long as the batch. One of another length belongs
    to the batch as a whole, and so it does in a batch that happens to have as many rows.

    Example:
        >>> columns = Columns()
        >>> columns.observe({"x": torch.zeros(8), "image_size": (4, 6)})
        >>> take_rows({"x": torch.arange(2), "image_size": (4, 6)}, torch.tensor([1]), columns)
        {'x': tensor([1]), 'image_size': (4, 6)}
    """

    def __init__(self) -> None:
        self._whole: set[str] = set()
        self._taken: set[str] = set()

    def observe(self, batch: Any) -> None:
        """Note which lists of a batch are not as long as it.

        Raises:
            TypeError: If one of them was as long as an earlier batch, so that rows of it were taken by mistake.
        """
        size = batch_size(batch)
        for path, leaf in leaves(batch):
            if isinstance(leaf, torch.Size) or not isinstance(leaf, (list, tuple, np.ndarray)) or len(leaf) == size:
                continue
            if path in self._taken:
                raise TypeError(
                    f"{path} has {len(leaf)} entries for {size} rows, but had one per row in an earlier batch, where "
                    "rows of it were taken. If it belongs to the batch as a whole, make it another object than a "
                    "list, a tuple or an array."
                )
            self._whole.add(path)

    def is_whole(self, path: str) -> bool:
        """Whether the list at a path belongs to the batch as a whole; if not, its rows are taken from now on."""
        if path not in self._whole:
            self._taken.add(path)
        return path in self._whole


def take_rows(batch: Any, rows: Tensor, columns: Columns | None = None) -> Any:
    """The rows of a nested batch at given indices, in the same nesting; the batch itself is left alone.

    Tensors are indexed along their first dimension without a host synchronisation. NumPy arrays, and lists and tuples
    without tensors, are indexed too where they are as long as the batch, which needs the rows on the host. So are the
    ``encodings`` of a ``BatchEncoding``, from which ``word_ids`` and ``tokens`` are read.

    Args:
        batch: As in :func:`batch_size`.
        rows: int64 ``[k]`` in ``[0, B)``, on the batch's device.
        columns: What earlier batches tell of the lists; None if there were none.

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
        if path.endswith(ENCODINGS) and len(leaf) != size:
            return None  # `word_ids` and `tokens` then raise, which is better than an answer for another row
        if isinstance(leaf, (str, bytes, torch.Size)) or not hasattr(leaf, "__len__") or len(leaf) != size:
            return leaf
        if isinstance(leaf, (np.ndarray, list, tuple)) and columns is not None and columns.is_whole(path):
            return leaf
        if isinstance(leaf, np.ndarray):
            return leaf[rows.cpu().numpy()]
        if _is_column(leaf):
            return type(leaf)(leaf[i] for i in rows.tolist())
        raise TypeError(
            f"{path} is a {type(leaf).__name__} as long as the batch; make it a tensor, an array or a list, so that "
            "its rows can be taken."
        )

    return map_leaves(batch, take)


def is_masked_text(batch: Any) -> bool:
    """Whether a batch is a mapping with ``input_ids`` and ``attention_mask``, both ``[B, T]``."""
    ids, mask = (batch.get(key) if isinstance(batch, Mapping) else None for key in ("input_ids", "attention_mask"))
    return isinstance(ids, Tensor) and isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape == ids.shape


def trim_padding(batch: Any) -> Any:
    """Drop the trailing columns of a text batch that are padding in every row.

    Applies to mappings with ``input_ids`` and ``attention_mask`` of shape ``[B, T]`` and without inputs for a
    decoder; other batches are returned as they are. A column is padding where ``attention_mask`` is 0 and ``labels``,
    if they have that shape, are -100. The fields that go with the tokens are cut, known by their names
    (``TOKEN_FIELDS``). Where a field of another name is ``[B, T, ...]`` too, nothing is cut: it may go with the
    tokens or have as many columns by chance. Costs one host synchronisation.

    Example:
        >>> trim_padding({"input_ids": torch.tensor([[5, 0, 0]]), "attention_mask": torch.tensor([[1, 0, 0]])})
        {'input_ids': tensor([[5]]), 'attention_mask': tensor([[1]])}
    """
    if not isinstance(batch, Mapping) or any(str(key).startswith("decoder_") for key in batch):
        return batch
    if not is_masked_text(batch):
        return batch
    mask, labels = batch["attention_mask"], batch.get("labels")
    columns = {k for k, v in batch.items() if isinstance(v, Tensor) and v.dim() >= 2 and v.shape[:2] == mask.shape}
    if not mask.numel() or not columns <= TOKEN_FIELDS:
        return batch
    used = mask.ne(0)
    if isinstance(labels, Tensor) and labels.shape == mask.shape:
        used = used | labels.ne(-100)
    width = int((used.any(dim=0) * torch.arange(1, mask.size(1) + 1, device=mask.device)).max())
    if width in (0, mask.size(1)):
        return batch
    return _rebuild(batch, [v[:, :width].contiguous() if k in columns else v for k, v in batch.items()])
