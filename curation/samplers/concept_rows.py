"""Compressed rows of an index of concepts: their checks, their checksum, and what a name is."""

import zlib
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

CHUNK = 2**24  # items read at a time, so that a memory-mapped index is read in pieces


def check_parts(offsets: np.ndarray, ids: np.ndarray, names: Sequence[Hashable]) -> None:
    """Refuse parts of an index that do not fit together. Reads them in pieces, since they may be on disk."""
    rises = all(
        (offsets[start + 1 : start + CHUNK + 1] >= offsets[start : start + CHUNK][: len(offsets) - start - 1]).all()
        for start in range(0, len(offsets), CHUNK)
    )
    if not (len(offsets) and offsets[0] == 0 and offsets[-1] == len(ids) and rises):
        raise ValueError(
            f"Argument `offsets` must rise from 0 to the number of `ids`, {len(ids)}, but got {offsets}."
        )
    if len(names) > 2**31:
        raise ValueError(f"Argument `names` must hold at most 2^31 names, but holds {len(names)}.")
    for start in range(0, len(ids), CHUNK):
        part = ids[start : start + CHUNK + 1]
        if not 0 <= part.min() <= part.max() < len(names):
            raise ValueError(
                f"Argument `ids` must be in [0, {len(names)}), the concepts with a name, but got {part.min()} to "
                f"{part.max()}."
            )
        higher = part[1:] > part[:-1]
        first, last = np.searchsorted(offsets, (start + 1, start + len(part)))
        higher[offsets[first:last].astype(np.int64) - start - 1] = True  # the first of a sample
        if not higher.all():
            raise ValueError("Argument `ids` must rise strictly within each sample, but does not.")
    if isinstance(names, range):
        return
    missing = [i for i, name in enumerate(names) if is_missing(name)]
    if missing:
        raise ValueError(f"Argument `names` must have no missing name, but name {missing[0]} is one.")
    if len(set(names)) < len(names):
        raise ValueError("Argument `names` must have each name once, but has one several times.")


def checksum(offsets: np.ndarray, ids: np.ndarray, names: str) -> int:
    """CRC-32 of offsets, ids and names, read in pieces."""
    value = zlib.crc32(names.encode())
    for array in (offsets, ids):
        for start in range(0, len(array), CHUNK):
            value = zlib.crc32(np.ascontiguousarray(array[start : start + CHUNK]).data, value)
    return value


def plain_names(names: Any) -> Any:
    """Names as Python objects, since tensors are hashed by their identity; dates stay what they are."""
    dates = isinstance(names, np.ndarray) and names.dtype.kind in "mM"  # `tolist` makes numbers of them
    return names.tolist() if hasattr(names, "tolist") and not dates else names


def is_missing(name: Any) -> bool:
    """Whether a name is None, NaN, or a missing value of pandas, by their rules of equality."""
    try:
        return name is None or bool(name == name) is False  # NaN and NaT are not equal to themselves
    except TypeError:  # NA is neither equal to itself nor not
        return True


def ranges(starts: np.ndarray, sizes: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """``[starts[0], starts[0] + 1, ..., starts[0] + sizes[0] - 1, starts[1], ...]``."""
    return np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], sizes)


def unique_rows(offsets: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows in ascending order, without repeats."""
    rows = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    order = np.lexsort((ids, rows))
    ids = ids[order]  # `rows` is sorted already
    new = np.ones(len(ids), bool)
    new[1:] = (ids[1:] != ids[:-1]) | (rows[1:] != rows[:-1])
    sizes = np.bincount(rows[new], minlength=len(offsets) - 1)
    return np.concatenate([[0], np.cumsum(sizes)]), ids[new]
