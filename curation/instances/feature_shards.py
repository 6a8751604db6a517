"""Features in Parquet, Arrow or NumPy files that are larger than the memory, a part at a time."""

import glob
import os
from collections.abc import Sequence
from os import PathLike
from typing import Any

import numpy as np

from curation import arrow as pa
from curation.checks import check_integer, check_path, check_text

MAPPED = (".arrow", ".npy")
KINDS = (".parquet", *MAPPED)


class FeatureShards:
    """Rows of features in files, read as they are asked for; the files one after another are the pool.

    Files of Parquet are read a row group at a time. Files of Arrow (the format of streams, as data sets of Hugging
    Face are saved, or of files) and of NumPy are mapped, and only the rows that are asked for are copied.

    Args:
        files: A folder or a glob, whose files (``.parquet``, ``.arrow``, ``.npy``) are taken in the order of their
            names; or a list of files.
        column: Name of the column, lists of ``D`` floats. A ``.npy`` file is ``[n, D]`` and has no name.
        memory: Bytes of a row group in memory, of which one is kept.

    Attributes:
        shape: ``(N, D)``.
        files: The files.
        largest: Bytes of the largest row group in memory, at most; files that are mapped have none.

    Raises:
        ValueError: If there are no files or rows, a file has no such column or another number of features, or a row
            group is larger than ``memory``; and when it is read, if it has other than ``D`` floats in each row.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> table = pa.table({"features": [[0.0, 1.0], [2.0, 3.0]]})
        >>> pa.parquet.write_table(table, f"{folder}/a.parquet", row_group_size=1)
        >>> np.save(f"{folder}/b.npy", np.array([[4.0, 5.0]]))
        >>> shards = FeatureShards(folder)
        >>> shards.shape, shards[1:3]
        ((3, 2), array([[2., 3.],
               [4., 5.]]))
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
            self.files = [check_path("files", name) for name in files]
        else:
            place = check_path("files", files)
            found = sorted(glob.glob(os.path.join(place, "*") if os.path.isdir(place) else place))
            self.files = [name for name in found if name.endswith(KINDS)] if os.path.isdir(place) else found
        self._groups: list[tuple[str, int]] = []
        sizes, numbers = [0], [0]  # of rows and of floats in each group
        for path in self.files:
            if not os.path.isfile(path):
                raise ValueError(f"Argument `files` must name files, but got {files!r}: there is no {path!r}.")
            for i, (rows, floats) in enumerate(_sizes(path, self.column)):
                self._groups.append((path, i))
                sizes.append(rows)
                numbers.append(floats)
        decoded = [n for (path, _), n in zip(self._groups, numbers[1:], strict=True) if not path.endswith(MAPPED)]
        self.largest: int = 8 * max(decoded, default=0)  # at most
        if self.largest > memory:
            raise ValueError(
                f"Argument `memory` must be at least {self.largest}, for the largest row group, but got {memory}; or "
                "write the files with a smaller `row_group_size`."
            )
        self._ends: np.ndarray = np.cumsum(sizes[1:])
        if not any(sizes):
            raise ValueError(f"Argument `files` must have rows, but {files!r} has none.")
        self.shape = (sum(sizes), next(n // size for n, size in zip(numbers, sizes, strict=True) if size))
        for (path, i), size, floats in zip(self._groups, sizes[1:], numbers[1:], strict=True):
            if floats != size * self.shape[1]:
                raise ValueError(
                    f"Argument `files` must hold {self.shape[1]} floats in each row, as {self._groups[0][0]!r} does, "
                    f"but group {i} of {path!r} has {floats} in {size} rows."
                )
        self._read: tuple[int, np.ndarray] = (-1, np.empty((0, 0)))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_read": (-1, np.empty((0, 0)))}

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
            parts.append(self._rows(number, part - (self._ends[number - 1] if number else 0)))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def place(self, row: int) -> str:
        """The file of a row and its number there, for errors."""
        path = self._groups[int(np.searchsorted(self._ends, row, side="right"))][0]
        first = next(i for i, (name, _) in enumerate(self._groups) if name == path)
        return f"row {row - (int(self._ends[first - 1]) if first else 0)} of {path!r}"

    def _rows(self, number: int, rows: np.ndarray) -> np.ndarray:
        """Some rows of a group, ``[n, D]``, ascending."""
        path, i = self._groups[number]
        run = len(rows) and rows[-1] - rows[0] + 1 == len(rows)
        if path.endswith(".npy"):
            return np.array(_array(path)[slice(rows[0], rows[-1] + 1) if run else rows])
        if path.endswith(".arrow"):
            lists = _mapped(path, self.column)
            return self._floats(lists.slice(rows[0], len(rows)) if run else lists.take(pa.array(rows)), path, i)
        if self._read[0] != number:
            self._read = (-1, np.empty((0, 0)))  # never two in memory
            pa.default_memory_pool().release_unused()
            lists = pa.parquet.ParquetFile(path).read_row_group(i, columns=[self.column]).column(0)
            self._read = (number, self._floats(lists, path, i))
        return self._read[1][rows]

    def _floats(self, lists: Any, path: str, i: int) -> np.ndarray:
        """A column of lists as ``[n, D]``."""
        lengths = pa.compute.unique(pa.compute.list_value_length(lists)).to_pylist()
        values, wide = pa.compute.list_flatten(lists), self.shape[1]
        if lengths != [wide] or values.null_count or not pa.types.is_floating(values.type):
            raise ValueError(
                f"Column {self.column!r} must hold lists of {wide} floats, but row group {i} of {path!r} has "
                f"{values.type} with {values.null_count} missing, in lists of {lengths[:5]}."
            )
        return values.to_numpy().reshape(-1, wide)


def _sizes(path: str, column: str) -> list[tuple[int, int]]:
    """Rows and floats of each group of a file that is read at once."""
    if path.endswith(".npy"):
        shape = _array(path).shape
        return [(shape[0], shape[0] * shape[1])]
    if path.endswith(".arrow"):
        lists = _mapped(path, column)
        return [(len(lists), pa.compute.sum(pa.compute.list_value_length(lists)).as_py() or 0)]
    metadata, leaf = _metadata(path, column)
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    return [(group.num_rows, group.column(leaf).num_values) for group in groups]


def _array(path: str) -> np.ndarray:
    """The array of a ``.npy`` file, mapped."""
    try:
        array: Any = np.load(path, mmap_mode="r")
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"Argument `files` must name files of features, but of {path!r}: {error}") from error
    if array.ndim != 2 or array.dtype.kind not in "iuf" or not array.flags.c_contiguous:
        raise ValueError(
            f"Argument `files` must name arrays [N, D] of numbers, row by row, but {path!r} has {array.dtype} "
            f"{list(array.shape)}{' column by column' * array.flags.fnc}."
        )
    return array


def _mapped(path: str, column: str) -> Any:
    """A column of an Arrow file, mapped."""
    source = pa.memory_map(path)
    try:
        try:
            table = pa.ipc.open_stream(source).read_all()
        except pa.ArrowInvalid:
            table = pa.ipc.open_file(source).read_all()
    except pa.ArrowInvalid as error:
        raise ValueError(f"Argument `files` must name Arrow files, but of {path!r}: {error}") from error
    if column not in table.column_names:
        raise ValueError(
            f"Argument `column` must be one of {', '.join(table.column_names)} of {path!r}, but got {column!r}."
        )
    return table.column(column)


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
