"""Which samples of a data set stay, in a file that any run can train on."""

import hashlib
import os
import re
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from curation import rng
from curation.batch import leaves
from curation.sample_ids import SampleIds

SAMPLES = 64  # that a fingerprint looks at


class InstanceSelector(Protocol):
    """What selects instances, with the conventions of scikit-learn; a selector need not inherit from it.

    Attributes:
        sample_indices_: int64 ``[n]``, the samples that stay, once :meth:`fit` has run.
    """

    sample_indices_: Any

    def fit(self, X: Any, y: Any, /) -> Any:
        """Select by features, fp32 ``[N, D]``, and labels, int64 ``[N]``."""


@dataclass(frozen=True, eq=False)
class SelectionIndex:
    """The ``n`` samples that stay of a data set of ``size``.

    Attributes:
        indices: int64 ``[n]``, rising.
        scores: fp32 ``[n]``, of each.
        ranks: int64 ``[n]``, the place of each in the order in which a smaller selection keeps them, 0 the first.
        size: Samples of the data set.
        fingerprint: :func:`fingerprint` of the data set; empty if it is not known.
        config: How the selection was made, as JSON.

    Raises:
        ValueError: If the parts do not fit together.
    """

    indices: np.ndarray
    scores: np.ndarray
    ranks: np.ndarray
    size: int
    fingerprint: str = ""
    config: str = "{}"

    def __post_init__(self) -> None:
        for name, kinds, dtype in (
            ("indices", "iu", np.int64),
            ("scores", "iuf", np.float32),
            ("ranks", "iu", np.int64),
        ):
            array = np.asarray(getattr(self, name))
            if array.dtype.kind not in kinds or array.shape != (len(self.indices),):
                raise ValueError(
                    f"Argument `{name}` must be {np.dtype(dtype)} [{len(self.indices)}], one for each index, but got "
                    f"{array.dtype} {list(array.shape)}."
                )
            object.__setattr__(self, name, array.astype(dtype))
        if not len(self.indices) or (np.diff(self.indices) <= 0).any():
            raise ValueError("Argument `indices` must rise strictly and not be empty, but does not.")
        if self.indices[0] < 0 or self.indices[-1] >= self.size:
            raise ValueError(
                f"Argument `indices` must be in [0, {self.size}), the samples of the data set, but got "
                f"{self.indices[0]} to {self.indices[-1]}."
            )
        if (np.sort(self.ranks) != np.arange(len(self.ranks))).any():
            raise ValueError(f"Argument `ranks` must hold each of 0 to {len(self.ranks) - 1} once, but does not.")

    def __len__(self) -> int:
        return len(self.indices)

    def first(self, m: int) -> np.ndarray:
        """The best ``m`` of the indices: int64 ``[m]``, rising.

        Raises:
            ValueError: If there are not so many.

        Example:
            >>> SelectionIndex([2, 5, 7], [0.1, 0.3, 0.2], [2, 0, 1], size=9).first(2).tolist()
            [5, 7]
        """
        if not 1 <= m <= len(self):
            raise ValueError(f"Argument `m` must be in [1, {len(self)}], the size of the selection, but got {m!r}.")
        return self.indices[self.ranks < m]

    def save(self, path: str | PathLike[str]) -> None:
        """Write a Parquet file with a row for each index; it appears under its name only when it is whole."""
        columns = {"index": self.indices, "score": self.scores, "rank": self.ranks}
        metadata = {"size": str(self.size), "fingerprint": self.fingerprint, "config": self.config}
        part = f"{os.fspath(path)}.{os.getpid()}.part"
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        try:
            pq.write_table(pa.table(columns).replace_schema_metadata(metadata), part)
            os.replace(part, path)
        finally:
            Path(part).unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "SelectionIndex":
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: If there is no such file, or it is another.
        """
        try:
            table = pq.ParquetFile(path).read()
            made = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
            indices, scores, ranks = (table[name].to_numpy() for name in ("index", "score", "rank"))
            return cls(indices, scores, ranks, int(made["size"]), made["fingerprint"], made["config"])
        except (OSError, pa.ArrowInvalid, KeyError) as error:
            what = "there is no such file" if not os.path.isfile(path) else "that is another"
            raise ValueError(
                f"A file of `SelectionIndex.save` is needed, but {what}: {os.fspath(path)!r}."
            ) from error


def fingerprint(dataset: Any) -> str:
    """What tells a data set from others: a hash of its length and of at most 64 samples, evenly spaced.

    Sample ids do not count. What a data set draws from the global random streams is the same every time, and the
    streams stay as they were.

    Args:
        dataset: Map-style.

    Example:
        >>> fingerprint([(1, "a")]) == fingerprint([(1, "a")]) != fingerprint([(1, "b")])
        True
    """
    while isinstance(dataset, SampleIds):
        dataset = dataset.dataset
    digest = hashlib.sha256(str(len(dataset)).encode())
    places = np.linspace(0, len(dataset) - 1, min(len(dataset), SAMPLES)).astype(int)
    with rng.isolated():
        rng.seed(0)
        for place in places.tolist():
            _digest(digest, dataset[place])
    return digest.hexdigest()


def _digest(digest: Any, node: Any) -> None:
    for path, leaf in leaves(node):
        digest.update(path.encode())
        if isinstance(leaf, (list, tuple)):  # a column, which may hold arrays
            for item in leaf:
                _digest(digest, item)
        elif isinstance(leaf, Tensor):
            _update(digest, leaf, leaf.detach().cpu().reshape(-1).view(torch.uint8).numpy())
        elif hasattr(leaf, "__array_interface__") and not np.asarray(leaf).dtype.hasobject:  # a picture is one, too
            array = np.asarray(leaf)
            _update(digest, array, np.ascontiguousarray(array))
        else:
            digest.update(re.sub(r" at 0x[0-9a-f]+", "", repr(leaf)).encode())


def _update(digest: Any, array: Any, values: np.ndarray) -> None:
    digest.update(f"{array.dtype} {list(array.shape)}".encode())
    digest.update(values.tobytes())
