"""Base class of the instance selectors, with the conventions of scikit-learn, and the budgets of the classes."""

import warnings
from collections.abc import Mapping
from time import perf_counter
from typing import Any, Literal, Self

import numpy as np
from torch import Tensor

try:
    from sklearn.base import BaseEstimator
    from sklearn.utils import _safe_indexing
    from sklearn.utils.multiclass import check_classification_targets, type_of_target
    from sklearn.utils.validation import check_random_state, validate_data
except ImportError as error:
    raise ImportError("Selectors need scikit-learn: `pip install 'lightning-curation[select]'`.") from error

from curation.checks import check_choice, check_flag, check_number

Strategy = Literal["proportional", "equal"] | dict[Any, int]
Targets = Literal["auto", "classes", "numbers"]
STRATA = 10  # of targets that are numbers


class InstanceSelector(BaseEstimator):
    """Base class of instance selectors: validation, standardisation and the results of :meth:`fit`.

    A subclass defines ``_select``, which gets standardised features and class codes.

    Attributes:
        needs_classes: Whether :meth:`fit` takes classes alone; else also numbers, or None for unlabelled samples.
        sample_indices_: int64 ``[n]``, the samples that stay, ascending.
        ranking_: int64 ``[n]``, the samples that stay, best first. Its first ``m`` are a selection of ``m`` samples
            without another fit. A fit with a smaller budget may choose others, since coverage then considers more
            neighbours.
        scores_: fp32 ``[N]``, larger is better.
        report_: Number of samples, samples kept in all and by class, reduction, seconds.
        classes_: The classes ``[C]``.
        n_features_in_: Number of features.

    Example:
        >>> class FirstOfClass(InstanceSelector):
        ...     def __init__(self):
        ...         self.budget, self.sampling_strategy, self.random_state = 0.1, "proportional", None
        ...
        ...     def _select(self, x, y):
        ...         return np.unique(y, return_index=True)[1], np.zeros(len(x), np.float32)
        >>> FirstOfClass().fit([[0.0], [1.0], [2.0]], ["cat", "cat", "dog"]).sample_indices_.tolist()
        [0, 2]
    """

    needs_classes = True
    budget: float
    sampling_strategy: Strategy
    random_state: Any

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = self.needs_classes
        return tags

    def fit(self, X: Any, y: Any = None) -> Self:
        """Select.

        Args:
            X: Features ``[N, D]``: an array, a tensor, a memory map, a data frame; dates are numbers. Standardised in
                their own precision, so that a common offset changes nothing, and computed in fp32.
            y: Classes ``[N]``; or of a selector that does not need classes numbers ``[N]``, or None.

        Raises:
            ValueError: If there is nothing to select from, a value is missing or not finite, there are no classes and
                the selector needs them, or a parameter is out of its range.

        Warns:
            UserWarning: If more samples stay than the budget asks for, one of each class.
        """
        start = perf_counter()
        X, y = (v.detach().cpu() if isinstance(v, Tensor) else v for v in (X, y))
        X = X.float() if isinstance(X, Tensor) else X  # NumPy has no bf16
        if y is None and not self.needs_classes:
            X = validate_data(self, X, dtype="numeric")
        else:
            X, y = validate_data(self, X, y, dtype="numeric")
        X, resolution = _floating(X)
        largest = float(np.abs(X).max())
        if largest > 1e35:
            raise ValueError(
                f"Argument `X` must hold values of at most 1e35, since it is computed in fp32, but has {largest}."
            )
        self._check()
        self.classes_, codes = self._strata(y, len(X))
        x = _standardised(X, resolution)
        del X
        self._keep(*self._select(x, codes), codes, start)
        return self

    def _keep(self, order: np.ndarray, scores: np.ndarray, codes: np.ndarray, start: float) -> None:
        """Set the results of a fit that began at ``start``: what stays, best first; scores and classes of all."""
        self.ranking_ = order
        self.scores_ = scores
        self.sample_indices_ = np.sort(order)
        kept = np.bincount(codes[order], minlength=len(self.classes_))
        self.report_ = {
            "samples": len(codes),
            "kept": len(order),
            "reduction": 1 - len(order) / len(codes),
            "kept_per_class": dict(zip(self.classes_.tolist(), kept.tolist(), strict=True)),
            "seconds": perf_counter() - start,
        }

    def fit_resample(self, X: Any, y: Any = None) -> tuple[Any, Any]:
        """Select, and return the features and targets that stay, with the types of ``X`` and ``y``."""
        rows = self.fit(X, y).sample_indices_

        def stay(values: Any) -> Any:
            return values[rows] if isinstance(values, Tensor) else _safe_indexing(values, rows)

        return stay(X), None if y is None else stay(y)

    def get_support(self, indices: bool = False) -> np.ndarray:
        """The samples that stay, as a mask bool ``[N]``, or as indices int64 ``[n]``."""
        check_flag("indices", indices)
        if indices:
            return self.sample_indices_
        mask = np.zeros(len(self.scores_), dtype=bool)
        mask[self.sample_indices_] = True
        return mask

    def _check(self) -> None:
        check_number("budget", self.budget, "(0, 1]")

    def _strata(self, y: Any, n: int) -> tuple[np.ndarray, np.ndarray]:
        """What has budgets of its own, here classes: names ``[C]``, and the code of each sample, int64 ``[N]``."""
        check_classification_targets(y)
        return np.unique(y, return_inverse=True)

    def _seed(self) -> int:
        return int(check_random_state(self.random_state).randint(2**31 - 1))

    def _select(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The samples that stay, best first, and the scores of all.

        Args:
            x: fp32 ``[N, D]``, standardised.
            y: int64 ``[N]``, class codes in ``[0, C)``.
        """
        raise NotImplementedError


class AnyTargetSelector(InstanceSelector):
    """Base class of selectors that need no classes: numbers are put into strata, and unlabelled samples into one.

    Numbers are sorted and cut into ``min(10, m)`` strata of as many samples, give or take one, for a budget of ``m``
    samples. So the budget is kept exactly, and every part of the range of the targets has its share of it.
    """

    needs_classes = False
    targets: Targets

    def _check(self) -> None:
        super()._check()
        check_choice("targets", self.targets, ("auto", "classes", "numbers"))

    def _strata(self, y: Any, n: int) -> tuple[np.ndarray, np.ndarray]:
        if y is None:
            return np.zeros(1, np.int64), np.zeros(n, np.int64)
        continuous = self.targets == "auto" and type_of_target(y) == "continuous"
        if not continuous and self.targets != "numbers":
            return super()._strata(y, n)
        if y.dtype.kind not in "iuf":
            raise ValueError(
                f"Argument `targets` must be 'auto' or 'classes' for {y.dtype}, but got {self.targets!r}."
            )
        values = y.astype(np.float64)
        count = min(STRATA, max(round(self.budget * n), 1))
        codes = np.empty(n, np.int64)
        codes[np.argsort(values, kind="stable")] = np.arange(n) * count // n
        return np.arange(count), codes


def class_budgets(y: np.ndarray, budget: float, strategy: Strategy, classes: np.ndarray) -> np.ndarray:
    """How many samples of each class stay: int64 ``[C]``, at least one of each.

    Args:
        y: int64 ``[N]`` in ``[0, C)``.
        budget: Fraction of all samples, in (0, 1].
        strategy: ``"proportional"`` to the classes; ``"equal"`` numbers as far as the classes have them; or numbers
            by class, which replace the budget; a class without a number keeps all its samples.
        classes: Names of the classes ``[C]``.

    Raises:
        ValueError: If the strategy is unknown, names an unknown class, or asks for more samples than there are, or
            ``budget`` is outside (0, 1].

    Warns:
        UserWarning: If there are more classes than the budget has samples.

    Example:
        >>> class_budgets(np.array([0] * 90 + [1] * 10), 0.1, "proportional", np.arange(2)).tolist()
        [9, 1]
        >>> class_budgets(np.array([0] * 90 + [1] * 10), 0.3, "equal", np.arange(2)).tolist()
        [20, 10]
    """
    check_number("budget", budget, "(0, 1]")
    counts = np.bincount(y, minlength=len(classes))
    asked = round(budget * len(y))
    total = max(asked, len(counts))
    if isinstance(strategy, Mapping):
        unknown = [name for name in strategy if name not in classes]
        if unknown:
            raise ValueError(f"Argument `sampling_strategy` must name classes of `y`, but got {unknown[0]!r}.")
        names = classes.tolist()
        sizes: list[Any] = [strategy.get(name, count) for name, count in zip(names, counts, strict=True)]
        for name, value, count in zip(names, sizes, counts, strict=True):
            if isinstance(value, bool) or not (
                isinstance(value, (int, float, np.number))
                and 1 <= float(value) <= count
                and float(value).is_integer()
            ):
                raise ValueError(
                    f"Argument `sampling_strategy` must ask for 1 to {count} of class {name!r}, but got {value!r}."
                )
        return np.array(sizes).astype(np.int64)
    if strategy == "proportional":
        ideal = counts * (total / len(y))
    elif strategy == "equal":
        level = total / len(counts)
        for _ in counts:  # samples that small classes lack go to the larger ones
            short = counts <= level
            if short.all():
                break
            level = (total - counts[short].sum()) / (~short).sum()
        ideal = np.minimum(counts, level)
    else:
        raise ValueError(
            f"Argument `sampling_strategy` must be 'proportional', 'equal' or a dict, but got {strategy!r}."
        )
    if total > max(asked, 1):
        warnings.warn(
            f"Argument `budget` of {budget} asks for {asked} of {len(y)} samples, but {total} stay, one of each "
            "class. Where the targets are numbers and no classes, `targets='numbers'` keeps the budget.",
            stacklevel=2,
        )
    whole = np.maximum(np.floor(ideal + 1e-9).astype(np.int64), 1)
    while whole.sum() != total:  # largest remainder; at most one step a class
        if whole.sum() < total:
            whole[np.argmax(np.where(whole < counts, ideal - whole, -np.inf))] += 1
        else:
            whole[np.argmin(np.where(whole > 1, ideal - whole, np.inf))] -= 1
    return whole


def _floating(x: np.ndarray) -> tuple[np.ndarray, float]:
    """Features as floats that hold every difference, and the relative deviation up to which one is rounding.

    Integers and dates are exact; those beyond the integers of fp32 are counted from the smallest of their feature.
    """
    if x.dtype.kind in "mM":
        if np.isnat(x).any():
            raise ValueError("Input X contains NaT.")
        x = x.astype(np.int64)
    if x.dtype.kind in "iub":
        low, high = x.min(0), x.max(0)
        if max(-float(low.min()), float(high.max())) <= 2**24:
            return x.astype(np.float32), 0.0
        if (high.astype(np.float64) - low.astype(np.float64)).max() < 2**62:
            x = x - low
    wide = x.dtype.kind in "iu" or x.dtype.itemsize > 4
    return x.astype(np.float64 if wide else np.float32, copy=False), 2e-15 if wide else 1e-7


def _standardised(x: np.ndarray, resolution: float) -> np.ndarray:
    """fp32 ``[N, D]`` of mean 0 and deviation 1; a constant feature is 0."""
    mean = x.mean(0, dtype=np.float64)
    out = (x - mean.astype(x.dtype)).astype(np.float32, copy=False)
    deviation = out.std(0, dtype=np.float64)
    out -= out.mean(0)
    varies = deviation > resolution * np.maximum(np.abs(mean), 1e-30)
    out /= np.where(varies, deviation, np.inf).astype(np.float32)
    return out
