"""A selection of the samples of a data set, in a file that any run can train on."""

import hashlib
import os
import re
from dataclasses import dataclass
from os import PathLike
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from curation import rng
from curation.batch import leaves
from curation.checks import check_integer, check_text
from curation.sample_ids import SampleIds
from curation.tables import read_table, write_table

SAMPLES = 64  # samples that a fingerprint hashes


class Selector(Protocol):
    """Interface of instance selectors, with the conventions of scikit-learn; a selector need not inherit from it.

    One with an attribute ``needs_classes`` that is False is given numbers as labels, too, or None.

    Attributes:
        sample_indices_: int64 ``[n]``, the samples that stay, after :meth:`fit`.
    """

    sample_indices_: Any

    def fit(self, X: Any, y: Any, /) -> Any:
        """Select by features, fp32 ``[N, D]``, and labels, int64 ``[N]``."""


@dataclass(frozen=True, eq=False)
class SelectionIndex:
    """The ``n`` samples that stay of a data set of ``size``.

    Attributes:
        indices: int64 ``[n]``, rising.
        scores: fp32 ``[n]``, scores of these samples.
        ranks: int64 ``[n]``, positions of these samples in the order in which a smaller selection keeps them, from 0.
        size: Number of samples of the data set.
        fingerprint: :func:`fingerprint` of the data set; empty if it is not known.
        config: Settings with which the selection was made, as JSON.

    Raises:
        ValueError: If the parts do not fit together, or one has the wrong type.
    """

    indices: np.ndarray
    scores: np.ndarray
    ranks: np.ndarray
    size: int
    fingerprint: str = ""
    config: str = "{}"

    def __post_init__(self) -> None:
        check_integer("size", self.size, 1)
        check_text("fingerprint", self.fingerprint)
        check_text("config", self.config)
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
            ValueError: If ``m`` is not an integer in [1, n].

        Example:
            >>> SelectionIndex([2, 5, 7], [0.1, 0.3, 0.2], [2, 0, 1], size=9).first(2).tolist()
            [5, 7]
        """
        check_integer("m", m, 1, len(self) + 1)
        return self.indices[self.ranks < m]

    def save(self, path: str | PathLike[str]) -> None:
        """Write a Parquet file with a row for each index; the file is replaced as a whole.

        Raises:
            OSError: If the file cannot be written.
        """
        columns = {"index": self.indices, "score": self.scores, "rank": self.ranks}
        metadata = {"size": str(self.size), "fingerprint": self.fingerprint, "config": self.config}
        write_table(path, columns, metadata)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "SelectionIndex":
        """Read a file of :meth:`save`.

        Raises:
            ValueError: If there is no such file, or it is damaged or was not written by :meth:`save`.
        """
        try:
            table = read_table(path)
            metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
            indices, scores, ranks = (table[name].to_numpy() for name in ("index", "score", "rank"))
            return cls(indices, scores, ranks, int(metadata["size"]), metadata["fingerprint"], metadata["config"])
        except (OSError, ValueError, KeyError) as error:
            reason = "there is no such file" if not os.path.isfile(path) else "that is another"
            raise ValueError(
                f"A file of `SelectionIndex.save` is needed, but {reason}: {os.fspath(path)!r}. ({error})"
            ) from error


def fingerprint(dataset: Any) -> str:
    """Hash of a data set: of its length and of at most 64 samples, evenly spaced.

    Sample ids are left out. Random draws of the data set from the global streams are the same every time, and the
    streams are restored.

    Args:
        dataset: Map-style data set.

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
        elif hasattr(leaf, "__array_interface__") and not np.asarray(leaf).dtype.hasobject:  # such as a picture
            array = np.asarray(leaf)
            _update(digest, array, np.ascontiguousarray(array))
        else:
            digest.update(re.sub(r" at 0x[0-9a-f]+", "", repr(leaf)).encode())


def _update(digest: Any, array: Any, values: np.ndarray) -> None:
    digest.update(f"{array.dtype} {list(array.shape)}".encode())
    digest.update(values.tobytes())
