"""What training showed of every sample, in a Parquet file."""

import os
from dataclasses import dataclass, field
from os import PathLike
from typing import Literal

import numpy as np

from curation.checks import check_text
from curation.records.dynamics_store import DynamicsStore
from curation.tables import read_table, write_table

MEANS = ("loss", "margin", "probability")
COUNTS = ("visits", "right", "forgotten", "label", "suggested", "worst")
COLUMNS = (*COUNTS, *MEANS, *(f"{name}_deviation" for name in MEANS), "rival_probability", "last_loss")


@dataclass(frozen=True, eq=False)
class SampleDynamics:
    """The columns of a :class:`~curation.records.dynamics_store.DynamicsStore` after a fit.

    Attributes:
        columns: ``visits``, ``right``, ``forgotten``, ``label``, ``suggested`` and ``worst``, int64 ``[N]``; means
            ``loss``, ``margin`` and ``probability`` over the visits, their standard deviations ``loss_deviation`` and
            so on, ``rival_probability`` and ``last_loss``, fp32 ``[N]``, NaN where they are not known. By sample id.
        fingerprint: :func:`~curation.instances.selection_index.fingerprint` of the data set; empty if not known.

    Raises:
        ValueError: If a column is missing, or they are not of one length.
    """

    columns: dict[str, np.ndarray] = field(repr=False)
    fingerprint: str = ""

    def __post_init__(self) -> None:
        check_text("fingerprint", self.fingerprint)
        shapes = {name: np.shape(self.columns[name]) if name in self.columns else None for name in COLUMNS}
        size = len(self)
        wrong = next((name for name, shape in shapes.items() if shape != (size,)), None)
        if wrong is not None:
            raise ValueError(f"Argument `columns` must hold [{size}] of {wrong!r}, but got {shapes[wrong]}.")

    def __len__(self) -> int:
        return len(self.columns.get("visits", ()))

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name]

    @property
    def kind(self) -> Literal["classes", "sequences", "losses"]:
        """What a sample is: one with a class, a sequence of tokens, or one of which only losses are known."""
        visited = self["visits"] > 0
        if (self["label"][visited] >= 0).any():
            return "classes"
        return "sequences" if np.isfinite(self["margin"][visited]).any() else "losses"

    @property
    def classes(self) -> int:
        """Number of classes, as far as labels and suggestions show; 0 without."""
        return int(max(self["label"].max(), self["suggested"].max())) + 1

    @classmethod
    def of_store(cls, store: DynamicsStore, fingerprint: str = "") -> "SampleDynamics":
        """The columns of a store; costs a copy of it on the host."""
        values = {name: getattr(store, name).cpu().numpy() for name in store.columns}
        visits = values["visits"]
        columns = {name: values[name].astype(np.int64) for name in COUNTS}
        for name in MEANS:
            columns[name] = np.where(visits > 0, values[name], np.nan).astype(np.float32)
            variance = values[f"{name}_squares"] / np.maximum(visits, 1)
            columns[f"{name}_deviation"] = np.where(visits > 0, np.sqrt(variance), np.nan).astype(np.float32)
        columns["rival_probability"] = np.where(visits > 0, values["rival_probability"], np.nan).astype(np.float32)
        return cls({**columns, "last_loss": values["last_loss"]}, fingerprint)

    def save(self, path: str | PathLike[str]) -> None:
        """Write a Parquet file with a row for each sample; the file is replaced as a whole.

        Raises:
            OSError: If the file cannot be written.
        """
        columns = {"sample_id": np.arange(len(self)), **{name: self.columns[name] for name in COLUMNS}}
        write_table(path, columns, {"fingerprint": self.fingerprint})

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "SampleDynamics":
        """Read a file of :meth:`save`.

        Raises:
            ValueError: If there is no such file, or it is damaged or was not written by :meth:`save`.
        """
        try:
            table = read_table(path)
            fingerprint = (table.schema.metadata or {})[b"fingerprint"].decode()
            return cls({name: table[name].to_numpy() for name in COLUMNS}, fingerprint)
        except (OSError, ValueError, KeyError) as error:
            reason = "there is no such file" if not os.path.isfile(path) else "that is another"
            raise ValueError(
                f"A file of `TrainingDynamics` is needed, but {reason}: {os.fspath(path)!r}. ({error})"
            ) from error
