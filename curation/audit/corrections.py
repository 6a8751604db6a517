"""What an audit changes in a data set, in a file: weights of samples and other labels. Nothing is deleted."""

import os
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np

from curation.audit.labels import with_label
from curation.checks import check_path, check_text
from curation.instances.selection_index import fingerprint as fingerprint_of
from curation.tables import read_table, write_table

WEIGHT = "weight"


@dataclass(frozen=True, eq=False)
class Corrections:
    """Weights and labels of all samples of a data set.

    Attributes:
        weights: fp32 ``[N]``, not negative.
        labels: int64 ``[N]``; -1 where the label stays.
        fingerprint: :func:`~curation.instances.selection_index.fingerprint` of the data set; empty if not known.

    Raises:
        ValueError: If they are not of one length, or a weight is negative or not finite.
    """

    weights: np.ndarray
    labels: np.ndarray
    fingerprint: str = ""

    def __post_init__(self) -> None:
        check_text("fingerprint", self.fingerprint)
        object.__setattr__(self, "weights", np.asarray(self.weights, np.float32))
        object.__setattr__(self, "labels", np.asarray(self.labels, np.int64))
        if self.weights.ndim != 1 or not (np.isfinite(self.weights) & (self.weights >= 0)).all():
            raise ValueError("Argument `weights` must be [N], finite and not negative, but is not.")
        if self.labels.shape != self.weights.shape:
            raise ValueError(f"Argument `labels` must be [{len(self)}], but got {list(self.labels.shape)}.")

    def __len__(self) -> int:
        return len(self.weights)

    def save(self, path: str | PathLike[str]) -> None:
        """Write a Parquet file with a row for each sample; the file is replaced as a whole.

        Raises:
            OSError: If the file cannot be written.
        """
        write_table(path, {"weight": self.weights, "label": self.labels}, {"fingerprint": self.fingerprint})

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "Corrections":
        """Read a file of :meth:`save`.

        Raises:
            ValueError: If there is no such file, or it is damaged or was not written by :meth:`save`.
        """
        try:
            table = read_table(path, ("weight", "label"))
            fingerprint = (table.schema.metadata or {})[b"fingerprint"].decode()
            return cls(table["weight"].to_numpy(), table["label"].to_numpy(), fingerprint)
        except (OSError, ValueError, KeyError) as error:
            reason = "there is no such file" if not os.path.isfile(path) else "that is another"
            raise ValueError(
                f"A file of `curation audit --apply` is needed, but {reason}: {os.fspath(path)!r}. ({error})"
            ) from error


class CorrectedDataset:
    """A data set with the labels and the weights of an audit.

    A weight is a further element of a tuple, or the key ``weight`` of a mapping, for
    :class:`~curation.callbacks.WeightedLoss`; without weights other than 1 there is none. Any sampler draws from it,
    and ``SampleIds`` wraps it.

    Args:
        dataset: Map-style data set of pairs ``(x, y)``, longer tuples, or mappings.
        corrections: The corrections, or their file.

    Raises:
        ValueError: If the corrections are of another data set: another length, or other samples.
        TypeError: If a sample whose label changes has none.

    Example:
        >>> corrections = Corrections(np.array([1.0, 0.5]), np.array([-1, 3]))
        >>> CorrectedDataset([("a", 0), ("b", 0)], corrections)[1]
        ('b', 3, 0.5)
    """

    def __init__(self, dataset: Any, corrections: Corrections | str | PathLike[str]) -> None:
        if not isinstance(corrections, Corrections):
            corrections = Corrections.load(check_path("corrections", corrections))
        if len(corrections) != len(dataset):
            raise ValueError(
                f"Argument `corrections` must be of the {len(dataset)} samples of the data set, but is of "
                f"{len(corrections)}."
            )
        if corrections.fingerprint and corrections.fingerprint != fingerprint_of(dataset):
            raise ValueError("Argument `corrections` must be of this data set, but its samples are others.")
        self.dataset = dataset
        self.corrections = corrections
        self._weighs = bool((corrections.weights != 1).any())

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        sample, label = self.dataset[index], int(self.corrections.labels[index])
        if label >= 0:
            sample = with_label(sample, lambda _: label)
        if not self._weighs:
            return sample
        weight = float(self.corrections.weights[index])
        return (*sample, weight) if isinstance(sample, (tuple, list)) else {**sample, WEIGHT: weight}
