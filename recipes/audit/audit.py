"""The audit of a data set: a ranked table, an estimate of how many labels are wrong, and the samples to look at."""

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.csv

from curation.audit import (
    UnsupportedError,
    WrongLabels,
    below_threshold,
    cartography_regions,
    errors_are_learned,
    estimate_wrong,
    slices,
    suspicion,
)
from curation.checks import check_integer
from curation.files import replacing
from curation.records import SampleDynamics
from curation.tables import write_table

SHOWN = (
    "loss",
    "last_loss",
    "margin",
    "margin_deviation",
    "probability",
    "probability_deviation",
    "rival_probability",
)
KINDS = (".csv", ".parquet")  # of tables


@dataclass
class Audit:
    """What the record of a run says of its data.

    Args:
        dynamics: The record.
        threshold: int64 ``[M]``, the threshold samples of the run; None where it had none.
        count: Number of suspects; None for the estimate.
        groups: Parts of the data ``[N]`` by what they are divided by, besides the classes.
        kept: int64 ``[N]``, how often a selection trained on each sample; None without one.
        pairs: int64 ``[P, 2]``, near-duplicates with different labels; None where they were not looked for.
        by: What classes are ranked by (:func:`~curation.audit.scores.suspicion`).

    Attributes:
        score: fp64 ``[N]``, the higher the more suspicious; NaN of threshold samples and of those never visited.
        order: int64 ``[n]``, the samples with a score, the most suspicious first.
        estimate: How many labels are wrong; None where that is refused.
        refused: Why it is refused; empty where it is not.
        suspects: bool ``[N]``, the first ``count`` of the order.
        regions: Masks of dataset cartography, bool ``[N]``; empty where only losses are known.
        slices: Parts of the data with their excess loss.

    Raises:
        ValueError: If ``threshold`` or ``kept`` is of another data set, or ``count`` is more than the samples.
    """

    dynamics: SampleDynamics
    threshold: np.ndarray | None = None
    count: int | None = None
    groups: dict[str, np.ndarray] = field(default_factory=dict)
    kept: np.ndarray | None = None
    pairs: np.ndarray | None = None
    by: Literal["auto", "margin", "probability_margin"] = "auto"

    def __post_init__(self) -> None:
        dynamics, size = self.dynamics, len(self.dynamics)
        self.is_threshold = np.zeros(size, bool)
        if self.threshold is not None:
            if len(self.threshold) and not (self.threshold.min() >= 0 and self.threshold.max() < size):
                raise ValueError(
                    f"Argument `threshold` must hold samples of the record, 0 to {size - 1}, but got "
                    f"{self.threshold.min()} to {self.threshold.max()}."
                )
            self.is_threshold[self.threshold] = True
        self.score = np.where(self.is_threshold, np.nan, suspicion(dynamics, self.by, self.threshold))
        scored = np.flatnonzero(np.isfinite(self.score))
        self.order = scored[np.argsort(-self.score[scored], kind="stable")]
        self.estimate: WrongLabels | None = None
        self.refused = ""
        self._estimate()
        check_integer("count", self.count, 0, len(self.order) + 1, optional=True)
        if self.count is None:
            self.count = 0 if self.estimate is None else round(self.estimate.count)
        self.suspects = np.zeros(size, bool)
        self.suspects[self.order[: self.count]] = True
        known = dynamics.kind != "losses"
        usual = np.where(self.is_threshold, np.nan, dynamics["probability"])
        self.regions = cartography_regions(usual, dynamics["probability_deviation"]) if known else {}
        groups = {"class": dynamics["label"], **self.groups} if dynamics.kind == "classes" else self.groups
        self.slices = slices(dynamics, self.suspects, groups)

    def _estimate(self) -> None:
        if self.dynamics.kind != "classes":
            self.refused = "only labels that are classes have margins"
            return
        if errors_are_learned(self.dynamics, self.threshold):
            self.refused = "errors seem to go from each class to one other, which margins do not count"
            return
        margins = self.dynamics["margin"].astype(np.float64)
        threshold = None if self.threshold is None else margins[self.is_threshold]
        try:
            self.estimate = estimate_wrong(margins[~self.is_threshold], threshold)
        except UnsupportedError as error:
            self.refused = str(error)

    def table(self) -> dict[str, np.ndarray]:
        """Columns with a row for each sample, the most suspicious first; those without a score come last."""
        dynamics = self.dynamics
        rows = np.concatenate([self.order, np.flatnonzero(~np.isfinite(self.score))])
        columns: dict[str, np.ndarray] = {"sample_id": np.arange(len(dynamics))}
        if dynamics.kind == "classes":
            columns |= {"label": dynamics["label"], "suggested": dynamics["suggested"]}
        columns |= {"score": self.score, "suspect": self.suspects}
        columns |= {name: dynamics[name] for name in SHOWN if np.isfinite(dynamics[name]).any()}
        columns |= {"visits": dynamics["visits"]}
        if dynamics.kind != "losses":
            columns |= {name: dynamics[name] for name in ("right", "forgotten")} | self.regions
        if dynamics.kind == "sequences":
            columns["worst_token"] = dynamics["worst"]
        if self.threshold is not None and len(self.threshold):
            columns["threshold_sample"] = self.is_threshold
            threshold = dynamics["margin"][self.is_threshold]
            columns["below_threshold"] = below_threshold(dynamics["margin"], threshold[np.isfinite(threshold)])
        if self.kept is not None:
            columns["times_kept"] = self.kept
        if self.pairs is not None:
            other = np.full(len(dynamics), -1)
            for one, two in self.pairs[::-1].tolist():
                other[one], other[two] = two, one
            columns["conflicts_with"] = other
        return {name: values[rows] for name, values in columns.items()}

    def summary(self) -> list[str]:
        """What was found, in lines of text."""
        dynamics, visited = self.dynamics, self.dynamics["visits"] > 0
        visits = dynamics["visits"][visited]
        shown = f"{visits.min()} to {visits.max()}" if len(visits) else "0"
        lines = [f"{len(dynamics):,} samples, of which {int((~visited).sum()):,} never visited; {shown} visits each"]
        if self.estimate is None:
            lines.append(f"wrong labels: not estimated, since {self.refused}")
        else:
            e, n = self.estimate, len(self.order)
            interval = f"[{e.low:,.0f}, {e.high:,.0f}]"
            found = f"wrong labels: {e.count:,.0f} {interval} of {n:,} ({e.count / n:.1%}), by {e.method}"
            lines.append(f"{found}; more where errors depend on the sample")
        if dynamics.kind != "losses":
            learned = dynamics["right"] > 0
            forgotten = int((dynamics["forgotten"] > 0).sum())
            never = int((visited & ~learned).sum())
            lines.append(f"forgotten at least once: {forgotten:,}; never right: {never:,}")
        if self.pairs is not None:
            lines.append(f"near-duplicates with different labels: {len(self.pairs):,} pairs")
        if self.kept is not None:
            lines.append(self._of_selection(self.kept))
        return lines

    def _of_selection(self, kept: np.ndarray) -> str:
        """Suspects among what a selection keeps most, and among what it never visits."""
        scored = np.isfinite(self.score) | (kept == 0)
        often = scored & (kept >= np.quantile(kept[scored], 0.9)) & (kept > 0)
        never = kept == 0
        of_often = f"{self.suspects[often].mean():.1%} of the {int(often.sum()):,} kept most" if often.any() else ""
        of_never = f"{int(never.sum()):,} were never kept"
        return f"suspects: {self.suspects[scored].mean():.1%} of all, {of_often}; {of_never}"


def write_audit(audit: Audit, path: Path) -> None:
    """Write the table as CSV or Parquet, by the suffix.

    Raises:
        OSError: If the file cannot be written.
    """
    columns = audit.table()
    if path.suffix == ".parquet":
        write_table(path, columns)
        return
    with replacing(path) as new:
        pyarrow.csv.write_csv(pa.table(columns), new)


def group_of(sample: Any, name: str) -> Any:
    """The part of the data that a sample belongs to: a field of a mapping, or with ``length`` its number of tokens.

    Raises:
        ValueError: If it has no such field.
    """
    if isinstance(sample, dict) and name in sample:
        value = sample[name]
        return value.item() if hasattr(value, "item") else value
    if isinstance(sample, dict) and name == "length":
        mask = sample.get("attention_mask")
        if mask is not None:
            return int(np.asarray(mask).sum())
        for key in ("input_ids", "text"):
            if key in sample:
                return len(sample[key])
    fields = ", ".join(map(str, sample)) if isinstance(sample, dict) else type(sample).__name__
    raise ValueError(f"Argument `--slice` must name a field of the samples, {fields}, but got {name!r}.")


def groups_of(dataset: Any, names: list[str]) -> dict[str, np.ndarray]:
    """Parts of the data by each name, ``[N]``; numbers of more than 20 values are cut into quarters."""
    found: dict[str, list[Any]] = {name: [] for name in names}
    for i in range(len(dataset)) if names else ():
        sample = dataset[i]
        for name in names:
            found[name].append(group_of(sample, name))
    return {name: _quarters(np.asarray(values)) for name, values in found.items()}


def _quarters(values: np.ndarray) -> np.ndarray:
    if values.dtype.kind not in "iuf" or len(np.unique(values)) <= 20:
        return values.astype(str)
    ends = np.quantile(values, [0, 0.25, 0.5, 0.75, 1])
    names = np.array([f"{low:g} to {high:g}" for low, high in itertools.pairwise(ends)])
    return names[np.searchsorted(ends[1:-1], values)]
