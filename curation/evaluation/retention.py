"""What a subset is worth: the accuracy that a probe keeps when it is trained on it. Needs scikit-learn."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

Part = tuple[np.ndarray, np.ndarray]  # features [N, D], labels [N]


@dataclass(frozen=True)
class Retention:
    """Accuracies of probes, one per seed, that were trained on a selection and on as many random samples.

    Attributes:
        full: Trained on all samples.
        selected: Trained on the selection.
        random: Trained on random samples, as many, stratified by class; a new draw for every seed.
        reduction: Share of the samples that were left out.
    """

    full: float
    selected: tuple[float, ...]
    random: tuple[float, ...]
    reduction: float

    @property
    def of_selected(self) -> np.ndarray:
        """``A_S / A_full``: fp64 ``[R]``."""
        return np.array(self.selected) / self.full

    @property
    def of_random(self) -> np.ndarray:
        """The same of random samples: fp64 ``[R]``."""
        return np.array(self.random) / self.full

    @property
    def effectiveness(self) -> float:
        """Mean of ``A_S`` times the reduction (arXiv 2502.20293); high for any small selection, random ones too."""
        return float(np.mean(self.selected)) * self.reduction


def random_forest(seed: int) -> Any:
    """The usual probe: scikit-learn's random forest, on all cores."""
    from sklearn.ensemble import RandomForestClassifier

    return RandomForestClassifier(random_state=seed, n_jobs=-1)


def retention(
    train: Part,
    test: Part,
    indices: np.ndarray,
    probe: Callable[[int], Any] = random_forest,
    repeats: int = 5,
    seed: int = 0,
    track: Callable[[list[tuple[Any, int]]], Iterable[tuple[Any, int]]] = iter,
) -> Retention:
    """Train probes once on all samples, and on a selection and as many stratified random ones; measure on other data.

    The two probes of a repeat have the same seed. Costs a fit on all samples and ``2 R`` on the selection's size.

    Args:
        train: Features ``[N, D]`` and labels ``[N]`` that the selection is of.
        test: Features and labels that accuracy is measured on.
        indices: int64 ``[m]``, the selection, without repetition.
        probe: Makes a scikit-learn classifier from a seed.
        repeats: ``R``, with the seeds ``seed`` to ``seed + R - 1``.
        seed: The first one, and that of the probe on all samples.
        track: Goes through the ``2 R + 1`` fits, and may show that.

    Raises:
        ValueError: If ``indices`` are no selection of the samples, or ``repeats`` is below 1.
    """
    if repeats < 1:
        raise ValueError(f"Argument `repeats` must be >= 1, but got {repeats!r}.")
    x, y = train
    indices = np.asarray(indices)
    if not len(indices) or len(np.unique(indices)) < len(indices) or indices.min() < 0 or indices.max() >= len(y):
        raise ValueError(
            f"Argument `indices` must be different numbers from 0 to {len(y) - 1}, at least one, but got {indices!r}."
        )

    from curation.instances import StratifiedRandomSelector

    def accuracy(rows: Any, at: int) -> float:
        return float(probe(at).fit(x[rows], y[rows]).score(*test))

    fits: list[tuple[Any, int]] = [(slice(None), seed)]
    for at in range(seed, seed + repeats):
        chance = StratifiedRandomSelector(len(indices) / len(y), random_state=at).fit(np.zeros((len(y), 1)), y)
        fits += [(indices, at), (chance.sample_indices_, at)]
    full, *others = [accuracy(rows, at) for rows, at in track(fits)]
    return Retention(full, tuple(others[::2]), tuple(others[1::2]), 1 - len(indices) / len(y))
