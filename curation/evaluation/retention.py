"""Retention: the accuracy that a probe keeps when it is trained on a subset. Needs scikit-learn."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from curation.checks import check_integer, check_number

Part = tuple[np.ndarray, np.ndarray]  # features [N, D], labels [N]


@dataclass(frozen=True)
class Retention:
    """Accuracies of probes, one per seed, that were trained on a selection and on as many random samples.

    Of a regression they are what the probe scores in their place, as R².

    Attributes:
        full: Accuracy after training on all samples.
        selected: Accuracies ``[R]`` after training on the selection, or on that of each seed.
        random: Accuracies ``[R]`` after training on as many random samples, stratified by class; a new draw for every
            seed.
        reduction: Fraction of the samples that was left out.
        redrawn: Whether the seeds have selections of their own, that is, whether they differ.

    Example:
        >>> result = Retention(full=0.8, selected=(0.6, 0.6), random=(0.4, 0.4), reduction=0.5)
        >>> result.of_selected.round(2).tolist(), round(result.effectiveness, 2)
        ([0.75, 0.75], 0.3)
    """

    full: float
    selected: tuple[float, ...]
    random: tuple[float, ...]
    reduction: float
    redrawn: bool = False

    @property
    def of_selected(self) -> np.ndarray:
        """``A_S / A_full``: fp64 ``[R]``."""
        return np.array(self.selected) / self.full

    @property
    def of_random(self) -> np.ndarray:
        """``A_random / A_full``: fp64 ``[R]``."""
        return np.array(self.random) / self.full

    def difference(self, confidence: float = 0.95) -> tuple[float, float, float]:
        """Retention of the selection less that of random samples: the mean, and an interval.

        Where every seed has a selection of its own, it is Student's interval of the mean of the paired differences,
        and speaks of the selector. One selection is another matter, since the random samples of each seed are others:
        then it is Student's prediction interval of one more random selection, the mean ±
        ``t_{R - 1} s sqrt(1 + 1 / R)`` with the standard deviation ``s`` over the random samples: it holds 0 with at
        least this confidence if the selection is a random one, too. An interval of the mean over seeds would leave
        out the chance of the one selection.

        Args:
            confidence: Confidence level, in (0, 1).

        Returns:
            Mean, lower and upper end. The ends are infinite where the differences, or of one selection the random
            accuracies, are all equal, since nothing is known of their spread then.

        Raises:
            ValueError: If there are fewer than two repeats, or ``confidence`` is outside (0, 1).

        Example:
            >>> [round(x, 2) for x in Retention(1.0, (0.8, 0.8, 0.8), (0.6, 0.7, 0.65), 0.9).difference()]
            [0.15, -0.1, 0.4]
        """
        from scipy import stats

        check_number("confidence", confidence, "(0, 1)")
        repeats = len(self.random)
        if repeats < 2:
            raise ValueError(f"An interval needs at least two repeats, but there are {repeats}.")
        mean = float(self.of_selected.mean() - self.of_random.mean())
        spread = self.of_selected - self.of_random if self.redrawn else self.of_random
        terms = 1 / repeats if self.redrawn else 1 + 1 / repeats
        if (spread == spread[0]).all():
            return mean, -math.inf, math.inf
        width = stats.t.ppf((1 + confidence) / 2, repeats - 1) * spread.std(ddof=1) * terms**0.5
        return mean, mean - float(width), mean + float(width)

    @property
    def effectiveness(self) -> float:
        """Mean of ``A_S`` times the reduction (arXiv 2502.20293); high for any small selection, random ones too."""
        return float(np.mean(self.selected)) * self.reduction


def random_forest(seed: int) -> Any:
    """The default probe: scikit-learn's random forest, on all cores."""
    from sklearn.ensemble import RandomForestClassifier

    return RandomForestClassifier(random_state=seed, n_jobs=-1)


def retention(
    train: Part,
    test: Part,
    indices: np.ndarray | Sequence[np.ndarray],
    probe: Callable[[int], Any] = random_forest,
    repeats: int = 5,
    seed: int = 0,
    track: Callable[[list[tuple[Any, int]]], Iterable[tuple[Any, int]]] = iter,
) -> Retention:
    """Measure the accuracy of probes trained on all samples, on a selection, and on as many random samples.

    The random samples are stratified by class, except where the selection has fewer samples than there are classes;
    or by strata of the targets, where those are numbers (:class:`~curation.instances.StratifiedRandomSelector`). The
    two probes of a repeat have the same seed. Costs one fit on all samples and ``2 R`` fits on the size of the
    selection.

    Args:
        train: Features ``[N, D]`` and labels ``[N]`` from which the selection was made.
        test: Features and labels on which accuracy is measured.
        indices: int64 ``[m]``, the selection, without repetition; or a list of ``R`` selections, one for each repeat.
        probe: Function from a seed to a scikit-learn classifier, or regressor.
        repeats: Number of repeats ``R``, with the seeds ``seed`` to ``seed + R - 1``.
        seed: Seed of the first repeat, and of the probe on all samples.
        track: Iterates over the ``2 R + 1`` fits, and may show the progress.

    Raises:
        ValueError: If ``indices`` are no selection of the samples or not one for each repeat, or ``repeats`` or
            ``seed`` is out of its range.
    """
    check_integer("repeats", repeats, 1)
    check_integer("seed", seed, 0, 2**32)
    x, y = train
    several = isinstance(indices, (list, tuple)) and len(indices) > 0 and np.ndim(indices[0]) == 1
    selections = [np.asarray(rows) for rows in (indices if several else [indices] * repeats)]
    if len(selections) != repeats:
        raise ValueError(f"Argument `indices` must be one selection or {repeats}, but got {len(selections)}.")
    for rows in selections:
        if not len(rows) or len(np.unique(rows)) < len(rows) or rows.min() < 0 or rows.max() >= len(y):
            raise ValueError(
                f"Argument `indices` must be different numbers from 0 to {len(y) - 1}, at least one, but got "
                f"{rows!r}."
            )

    from sklearn.utils.multiclass import type_of_target

    from curation.instances import StratifiedRandomSelector

    def accuracy(rows: Any, probe_seed: int) -> float:
        return float(probe(probe_seed).fit(x[rows], y[rows]).score(*test))

    least = 1 if type_of_target(y) == "continuous" else len(np.unique(y))
    fits: list[tuple[Any, int]] = [(slice(None), seed)]
    for s, rows in enumerate(selections, seed):
        if len(rows) < least:  # a stratified draw would have more samples than the selection
            chance = np.sort(np.random.default_rng(s).choice(len(y), len(rows), replace=False))
        else:
            draw = StratifiedRandomSelector(len(rows) / len(y), random_state=s)
            chance = draw.fit(np.zeros((len(y), 1)), y).sample_indices_
        fits += [(rows, s), (chance, s)]
    full, *repeated = [accuracy(rows, s) for rows, s in track(fits)]
    redrawn = any(not np.array_equal(np.sort(rows), np.sort(selections[0])) for rows in selections)
    kept = float(np.mean([len(rows) for rows in selections]))
    return Retention(full, tuple(repeated[::2]), tuple(repeated[1::2]), 1 - kept / len(y), redrawn)
