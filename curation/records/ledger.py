"""The audit trail of a selection: one row per candidate, in Parquet files that survive a crash.

A ledger is a folder with one folder per rank, ``rank=0``, ``rank=1``, ..., of files ``00000000.parquet`` and so on.
Columns: ``step`` (int64, batches trained on before), ``sample_id`` (int64), ``score`` (float32), ``kept`` (int32, how
often the row was trained on in that step) and ``weight`` (float32, 0 where the row was not kept).
``datasets.load_dataset("parquet", data_files="LEDGER/*/*.parquet")`` reads it too, and so does any Parquet reader.
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curation import arrow as pa
from curation.checks import check_integer, check_path
from curation.tables import read_table, write_table

ROWS_PER_FILE = 1 << 18
ROWS_AT_A_TIME = 1 << 17  # that a reader gets
COLUMNS = ("step", "sample_id", "score", "kept", "weight")
_DTYPES = (torch.int64, torch.int64, torch.float32, torch.int32, torch.float32)
_FILES = "[!.]*.parquet"  # a name that begins with a dot is a file that a killed process did not finish
_CLOSED = "closed"


class LedgerWriter:
    """Appends the candidates of one rank to a ledger.

    Rows are gathered in buffers on their device and written a file at a time; a file gets its name only when it is
    whole (:func:`~curation.files.replacing`), and holds checksums (:mod:`curation.tables`). A killed process loses
    the rows since the last :meth:`flush` or full file, never a file.

    Args:
        path: Folder of the ledger.
        rank: Rank of this process.
        rows_per_file: Rows in a file; 28 bytes each on the device of the candidates.

    Raises:
        ValueError: If ``rank`` or ``rows_per_file`` is out of its range, or a file has the name of the rank's folder.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> writer = LedgerWriter(folder)
        >>> ids, kept = torch.tensor([7, 9]), torch.tensor([1, 0])
        >>> writer.append(0, ids, torch.tensor([2.0, 1.0]), kept, kept.float())
        >>> writer.close()
        >>> Ledger(folder).most_kept(1)
        [(7, 1)]
    """

    def __init__(self, path: str | Path, rank: int = 0, rows_per_file: int = ROWS_PER_FILE) -> None:
        check_integer("rank", rank, 0)
        self.folder = Path(check_path("path", path)) / f"rank={rank}"
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"Argument `path` must be the folder of a ledger, but {str(self.folder)!r} is a file.")
        self.rows_per_file: int = check_integer("rows_per_file", rows_per_file, 1)
        self._columns: list[Tensor] = []  # of which the first `_rows` are filled
        self._rows = 0
        self._written = 0
        self._begun = False
        self._number = len(self._files())

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob(_FILES))

    def begin(self) -> None:
        """Mark the ledger as open: until :meth:`close`, rows may be missing from the files."""
        self._begun = True
        (self.folder / _CLOSED).unlink(missing_ok=True)

    def append(self, step: int, sample_ids: Tensor, scores: Tensor, kept: Tensor, weights: Tensor) -> None:
        """Add a candidate batch, without a host synchronisation until a file is full.

        Args:
            step: Number of batches trained on before.
            sample_ids: int64 ``[B]``.
            scores: Floating ``[B]``.
            kept: Integers ``[B]``, how often each row was trained on.
            weights: Floating ``[B]``.

        Raises:
            TypeError: If the ids are not int64.
            ValueError: If the columns differ in length, or ``step`` is not an integer >= 0.
        """
        check_integer("step", step, 0)
        if sample_ids.dtype != torch.int64:
            raise TypeError(f"Argument `sample_ids` must be int64, but got {sample_ids.dtype}.")
        columns = {"sample_ids": sample_ids, "scores": scores, "kept": kept, "weights": weights}
        if len({tuple(column.shape) for column in columns.values()}) > 1 or sample_ids.dim() != 1:
            shapes = ", ".join(f"`{name}` is {list(column.shape)}" for name, column in columns.items())
            raise ValueError(f"The columns of a candidate batch must all be [B], but {shapes}.")
        if not self._begun:
            self.begin()
        end = self._rows + len(sample_ids)
        self._reserve(end, sample_ids.device)
        steps = torch.full_like(sample_ids, step)
        for column, values in zip(self._columns, (steps, *columns.values()), strict=True):
            column[self._rows : end] = values.detach()
        self._rows = end
        if self._rows >= self.rows_per_file:
            self.flush()
            self._rows = self._written = 0
            self._number += 1

    def _reserve(self, rows: int, device: torch.device) -> None:
        """Make room for this many rows: more than a file's where its last candidate batch goes beyond it."""
        room = len(self._columns[0]) if self._columns else 0
        if rows > room:
            room = max(rows, min(2 * room, self.rows_per_file))
            new = [torch.empty(room, dtype=dtype, device=device) for dtype in _DTYPES]
            for column, filled in zip(new, self._columns, strict=False):
                column[: self._rows] = filled[: self._rows]
            self._columns = new

    def flush(self) -> None:
        """Write the gathered rows; the file is written again when more rows are added."""
        if self._rows == self._written:
            return
        columns = [column[: self._rows].cpu().numpy() for column in self._columns]
        write_table(self.folder / f"{self._number:08d}.parquet", dict(zip(COLUMNS, columns, strict=True)))
        self._written = self._rows

    def close(self) -> None:
        """Write the gathered rows and mark the ledger as complete, if it was begun."""
        if not self._begun:
            return
        self.flush()
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / _CLOSED).touch()

    def truncate(self, step: int) -> None:
        """Remove the rows of ``step`` and later, which an interrupted run wrote that is resumed there."""
        check_integer("step", step, 0)
        for pattern in (".*.parquet", "*.part"):  # files that a killed process did not finish; *.part before 0.1.0
            for part in self.folder.glob(pattern):
                part.unlink()
        for file in reversed(self._files()):
            steps = read_table(file, ["step"])["step"].to_numpy()
            if steps[-1] < step:
                break
            if steps[0] >= step:
                file.unlink()
            else:
                table = read_table(file, COLUMNS).slice(0, int(np.searchsorted(steps, step)))
                write_table(file, {name: table[name] for name in COLUMNS})
        self._number = len(self._files())


class Ledger:
    """Reads a ledger, a batch of rows at a time.

    Args:
        path: Folder of the ledger.

    Raises:
        FileNotFoundError: If the folder holds no ledger.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(check_path("path", path))
        self.files = sorted(self.path.glob(f"rank=*/{_FILES}"))
        if not self.files:
            raise FileNotFoundError(f"Argument `path` must be the folder of a ledger, but got {str(path)!r}.")

    def cut_off(self) -> dict[str, int]:
        """Ranks whose fit is running or was killed, with the last step written; later rows may be missing."""
        last = {}
        for folder in sorted(self.path.glob("rank=*")):
            if not (folder / _CLOSED).exists():
                last[folder.name] = self.last_step(int(folder.name.removeprefix("rank=")))
        return last

    def rows(self) -> Any:
        """All rows, as a ``pyarrow.Table``."""
        return pa.concat_tables(self._tables(COLUMNS))

    def _tables(self, columns: Sequence[str]) -> Iterator[Any]:
        for file in self.files:
            yield read_table(file, columns).replace_schema_metadata(None)

    def batches(self, *columns: str) -> Iterator[dict[str, np.ndarray]]:
        """All rows, about 100,000 at a time, rank by rank and in the order of steps."""
        for table in self._tables(columns or COLUMNS):
            for batch in table.to_batches(ROWS_AT_A_TIME):
                yield {name: batch[name].to_numpy() for name in batch.schema.names}

    def steps(self, rank: int = 0, first: int = 0) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """The candidates of each step of a rank, in the order of steps, a file in memory at a time.

        Args:
            rank: The rank.
            first: The first step.

        Raises:
            ValueError: If an argument is not an integer >= 0.
        """
        check_integer("rank", rank, 0)
        check_integer("first", first, 0)
        for file in sorted((self.path / f"rank={rank}").glob(_FILES)):
            table = read_table(file, COLUMNS)
            columns = {name: table[name].to_numpy() for name in COLUMNS}
            edges = np.flatnonzero(np.diff(columns["step"])) + 1
            for begin, end in itertools.pairwise([0, *edges.tolist(), len(columns["step"])]):
                if columns["step"][begin] >= first:
                    yield int(columns["step"][begin]), {name: column[begin:end] for name, column in columns.items()}

    def last_step(self, rank: int = 0) -> int:
        """The last step of a rank; -1 where it has none."""
        file = max((self.path / f"rank={check_integer('rank', rank, 0)}").glob(_FILES), default=None)
        return -1 if file is None else read_table(file, ["step"])["step"][-1].as_py()

    def counts(self, size: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """How often each sample was a candidate, how often it was kept, and the step at which it was last kept.

        Args:
            size: Number of samples of the data set; None for the largest id plus 1.

        Returns:
            int64 ``[N]`` each; the last step is -1 for a sample that was never kept.

        Raises:
            ValueError: If an id is not in [0, size), or in [0, 2^31) without a size, or ``size`` is no integer >= 1.
        """
        check_integer("size", size, 1, optional=True)
        most = 2**31 if size is None else size
        seen, kept, last = (np.zeros(0, np.int64) for _ in range(3))
        for batch in self.batches("step", "sample_id", "kept"):
            ids = batch["sample_id"]
            if not 0 <= ids.min() <= ids.max() < most:
                raise ValueError(
                    f"Argument `size` must be more than every sample id, of 0 to {most - 1}, but got {size!r} and "
                    f"ids from {ids.min()} to {ids.max()}."
                )
            n = max(len(seen), int(ids.max()) + 1, size or 0)
            seen, kept = (np.pad(a, (0, n - len(a))) for a in (seen, kept))
            last = np.pad(last, (0, n - len(last)), constant_values=-1)
            seen += np.bincount(ids, minlength=n)
            kept += np.bincount(ids, weights=batch["kept"], minlength=n).astype(np.int64)
            chosen = batch["kept"] > 0
            np.maximum.at(last, ids[chosen], batch["step"][chosen])
        return seen, kept, last

    def never_kept(self, size: int | None = None) -> np.ndarray:
        """Ids of the samples that were never trained on, int64, ascending."""
        return np.flatnonzero(self.counts(size)[1] == 0)

    def most_kept(self, n: int = 10) -> list[tuple[int, int]]:
        """The ``n`` samples that were trained on most often, with the number of times."""
        check_integer("n", n, 0)
        _, kept, _ = self.counts()
        order = np.argsort(-kept, kind="stable")[:n]
        return [(int(i), int(kept[i])) for i in order]

    def history(self, sample_id: int) -> dict[str, np.ndarray]:
        """Every row of one sample, in the order of steps: a dictionary of columns."""
        check_integer("sample_id", sample_id, 0)
        tables = [table.filter(pa.compute.equal(table["sample_id"], sample_id)) for table in self._tables(COLUMNS)]
        table = pa.concat_tables(tables).sort_by("step")
        return {name: table[name].to_numpy() for name in COLUMNS}
