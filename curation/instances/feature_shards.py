"""Features in Parquet files that are larger than the memory, a row group at a time."""

import glob
import os
from collections.abc import Sequence
from os import PathLike
from typing import Any

import numpy as np

from curation import arrow as pa
from curation.checks import check_integer, check_path, check_text


class FeatureShards:
    """Rows of features in Parquet files, read as they are asked for; the files one after another are the pool.

    Args:
        files: A folder or a glob, whose files are taken in the order of their names; or a list of files.
        column: Name of the column, lists of ``D`` floats.
        memory: Bytes of a row group in memory, of which one is kept.

    Attributes:
        shape: ``(N, D)``.

    Raises:
        ValueError: If there are no files or rows, a file has no such column, or a row group is larger than
            ``memory``; and when it is read, if it has other than ``D`` floats in each row.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> table = pa.table({"features": [[0.0, 1.0], [2.0, 3.0]]})
        >>> pa.parquet.write_table(table, f"{folder}/a.parquet", row_group_size=1)
        >>> shards = FeatureShards(folder)
        >>> shards.shape, shards[1:2]
        ((2, 2), array([[2., 3.]]))
    """

    def __init__(
        self,
        files: str | PathLike[str] | Sequence[str | PathLike[str]],
        column: str = "features",
        memory: int = 2**30,
    ) -> None:
        self.column: str = check_text("column", column)
        check_integer("memory", memory, 1)
        if isinstance(files, (list, tuple)):
            paths = [check_path("files", name) for name in files]
        else:
            place = check_path("files", files)
            paths = sorted(glob.glob(os.path.join(place, "*.parquet") if os.path.isdir(place) else place))
        self._groups: list[tuple[str, int]] = []
        sizes, numbers = [0], [0]  # of rows and of floats in each row group
        for path in paths:
            if not os.path.isfile(path):
                raise ValueError(
                    f"Argument `files` must name Parquet files, but got {files!r}: there is no {path!r}."
                )
            metadata, leaf = _metadata(path, self.column)
            for i in range(metadata.num_row_groups):
                self._groups.append((path, i))
                sizes.append(metadata.row_group(i).num_rows)
                numbers.append(metadata.row_group(i).column(leaf).num_values)
        self._ends: np.ndarray = np.cumsum(sizes[1:])
        if not any(sizes):
            raise ValueError(f"Argument `files` must have rows, but {files!r} has none.")
        self.shape = (sum(sizes), next(n // size for n, size in zip(numbers, sizes, strict=True) if size))
        largest = 8 * max(numbers)  # at most
        if largest > memory:
            raise ValueError(
                f"Argument `memory` must be at least {largest}, for the largest row group, but got {memory}; or "
                "write the files with a smaller `row_group_size`."
            )
        self._read: tuple[int, np.ndarray] = (-1, np.empty((0, 0)))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """Features ``[n, D]`` of a range without steps, or of rows int64 ``[n]`` in ascending order."""
        if isinstance(rows, slice):
            rows = np.arange(*rows.indices(len(self)))
        groups = np.searchsorted(self._ends, rows, side="right")
        numbers, starts = np.unique(groups, return_index=True)
        parts = []
        for number, part in zip(numbers.tolist(), np.split(rows, starts[1:]), strict=True):
            values = self._group(number)
            parts.append(values[part - (self._ends[number] - len(values))])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _group(self, number: int) -> np.ndarray:
        """The features of a row group, ``[n, D]``."""
        if self._read[0] != number:
            self._read = (-1, np.empty((0, 0)))  # never two in memory
            pa.default_memory_pool().release_unused()
            path, i = self._groups[number]
            lists = pa.parquet.ParquetFile(path).read_row_group(i, columns=[self.column]).column(0)
            lengths = pa.compute.unique(pa.compute.list_value_length(lists)).to_pylist()
            values = pa.compute.list_flatten(lists)
            wide = self.shape[1]
            if lengths != [wide] or values.null_count or not pa.types.is_floating(values.type):
                raise ValueError(
                    f"Column {self.column!r} must hold lists of {wide} floats, but row group {i} of {path!r} has "
                    f"{values.type} with {values.null_count} missing, in lists of {lengths[:5]}."
                )
            values = values.to_numpy()
            self._read = (number, values.reshape(-1, wide))
        return self._read[1]


def _metadata(path: str, column: str) -> tuple[Any, int]:
    """What a Parquet file says of its row groups, and the place of a column of lists in them."""
    try:
        metadata = pa.parquet.read_metadata(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"Argument `files` must name Parquet files, but of {path!r}: {error}") from error
    names = [metadata.schema.column(i).path.partition(".")[0] for i in range(metadata.num_columns)]
    if column not in names:
        raise ValueError(f"Argument `column` must be one of {', '.join(names)} of {path!r}, but got {column!r}.")
    return metadata, names.index(column)
