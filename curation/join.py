"""Several batches of a data loader as one."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from curation.batch import ENCODINGS, TOKEN_FIELDS, batch_size, is_masked_text, leaves, map_leaves
from curation.scoring import IGNORED


def join_batches(batches: Sequence[Any], pad_id: int | None = None, side: str | None = None) -> Any:
    """One batch of the rows of several, in their order.

    Tensors with a batch dimension are concatenated; so are lists, tuples and arrays that are as long as their batch.
    All else belongs to a batch as a whole and must be equal in all of them. Text batches of different widths
    (mappings with ``input_ids`` and ``attention_mask``, ``[B, T]``) are padded to the widest: labels with -100, masks
    and other fields with 0.

    Args:
        batches: Batches of the same structure, at least one.
        pad_id: Id of the padding token; None for the one at a masked position of the batches, or else 0.
        side: ``"left"`` or ``"right"``, where padding goes; None to read it from the masks.

    Raises:
        ValueError: If fields differ in their names or in what belongs to a batch as a whole; if it is not certain
            whether a list has an entry per row; or if tensors differ in other dimensions than the first and are not
            the tokens of a masked text. The message names the field.

    Example:
        >>> join_batches([(torch.zeros(2, 3), ["a", "b"]), (torch.ones(1, 3), ["c"])])
        (tensor([[0., 0., 0.],
                [0., 0., 0.],
                [1., 1., 1.]]), ['a', 'b', 'c'])
    """
    if len(batches) == 1:
        return batches[0]
    sizes = [batch_size(batch) for batch in batches]
    batches = _equally_wide(batches, pad_id, side)
    paths = [[path for path, _ in leaves(batch)] for batch in batches]
    if any(path != paths[0] for path in paths):
        other = next(path for path in paths if path != paths[0])
        raise ValueError(f"Batches must have the same fields to be joined, but got {paths[0]} and {other}.")
    columns: dict[str, list[Any]] = {}

    def collect(leaf: Any, path: str) -> Any:
        columns.setdefault(path, []).append(leaf)
        return leaf

    for batch in batches:
        map_leaves(batch, collect)
    return map_leaves(batches[0], lambda leaf, path: _joined(columns[path], sizes, path))


def _joined(parts: list[Any], sizes: list[int], path: str) -> Any:
    first = parts[0]
    if isinstance(first, Tensor) and first.dim():
        if any(p.shape[1:] != first.shape[1:] for p in parts):
            shapes = ", ".join(str(list(p.shape)) for p in parts)
            raise ValueError(
                f"Batches are joined along their rows, but {path} has the shapes {shapes}. Let `collate_fn` pad to "
                "one size. Texts of different widths are padded here where the batch is a mapping with `input_ids` "
                "and `attention_mask` [B, T]."
            )
        return torch.cat(parts)
    rows = not isinstance(first, (str, bytes, torch.Size)) and isinstance(first, (list, tuple, np.ndarray))
    if rows and all(len(p) == size for p, size in zip(parts, sizes, strict=True)):
        if not isinstance(first[0], str) and all(_equal(first, p) for p in parts[1:]) and not _constant(first):
            raise ValueError(
                f"{path} is {first!r} in each of the batches that are joined, and as long as they are, so that it "
                "may hold one entry a row or belong to the batch as a whole. Make it a tensor, or no list."
            )
        return np.concatenate(parts) if isinstance(first, np.ndarray) else type(first)(x for p in parts for x in p)
    if path.endswith(ENCODINGS):
        return None
    if not all(_equal(first, p) for p in parts[1:]):
        raise ValueError(
            f"{path} belongs to a batch as a whole and differs between the batches that are joined: {first!r} and "
            f"{next(p for p in parts if not _equal(first, p))!r}. Give it one entry for each row."
        )
    return first


def _constant(rows: Any) -> bool:
    return all(_equal(rows[0], row) for row in rows)


def _equal(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, (Tensor, np.ndarray)) or isinstance(b, (Tensor, np.ndarray)):
        return type(a) is type(b) and a.shape == b.shape and bool((a == b).all())
    return bool(a == b)


def _equally_wide(batches: Sequence[Any], pad_id: int | None, side: str | None) -> Sequence[Any]:
    """Text batches, padded to the widest; others as they are."""
    if not all(map(is_masked_text, batches)):
        return batches
    widths = [batch["input_ids"].size(1) for batch in batches]
    if len(set(widths)) == 1:
        return batches
    masks = [batch["attention_mask"] for batch in batches]
    if side is None:
        side = "left" if any(bool((m[:, 0] == 0).any() & (m[:, -1] != 0).all()) for m in masks) else "right"
    if pad_id is None:
        padding = torch.cat([b["input_ids"][b["attention_mask"] == 0] for b in batches])
        pad_id = int(padding[0]) if len(padding) else 0
    return [_padded(batch, max(widths) - width, pad_id, side) for batch, width in zip(batches, widths, strict=True)]


def _padded(batch: Any, missing: int, pad_id: int, side: str) -> Any:
    width = batch["input_ids"].shape
    fill = {"input_ids": pad_id, "labels": IGNORED}

    def pad(leaf: Any, path: str) -> Any:
        if path.endswith(ENCODINGS):
            return None  # whose positions are those of the narrower batch
        name = path.removeprefix("batch.")
        if not (name in TOKEN_FIELDS and isinstance(leaf, Tensor) and leaf.dim() > 1 and leaf.shape[:2] == width):
            return leaf
        columns = (missing, 0) if side == "left" else (0, missing)
        return F.pad(leaf, (0, 0) * (leaf.dim() - 2) + columns, value=fill.get(name, 0))

    return map_leaves(batch, pad)
