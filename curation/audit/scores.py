"""Scores that say how suspicious a label is, and what a model forgets."""

from collections.abc import Mapping
from typing import Literal

import numpy as np

from curation.checks import check_choice, check_number
from curation.records.dynamics import SampleDynamics


def area_under_margin(margins: np.ndarray) -> np.ndarray:
    """Area under the margin: the mean over the epochs (arXiv 2001.10528, eq. 1); low is suspicious.

    ``margin`` of :class:`~curation.records.dynamics.SampleDynamics` is the same, streamed.

    Args:
        margins: ``[N, E]``; NaN for an epoch without a visit.

    Returns:
        ``[N]``; NaN without a visit.

    Example:
        >>> area_under_margin(np.array([[1.0, 3.0], [-1.0, np.nan]]))
        array([ 2., -1.])
    """
    visits = np.isfinite(margins)
    counts = visits.sum(1)
    return np.divide(np.where(visits, margins, 0).sum(1), counts, np.full(len(margins), np.nan), where=counts > 0)


def forgetting_counts(right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How often each sample was wrong after it had been right, and whether it ever was right (arXiv 1812.05159).

    Args:
        right: bool ``[N, E]``, at each visit in order.

    Returns:
        Counts int64 ``[N]``, and bool ``[N]``; a sample that never was right counts 0 and was never learned.

    Example:
        >>> forgetting_counts(np.array([[True, False, True, False]]))
        (array([2]), array([ True]))
    """
    return (right[:, :-1] & ~right[:, 1:]).sum(1), np.any(right, axis=1)


def cartography_regions(
    probability: np.ndarray, deviation: np.ndarray, share: float = 1 / 3
) -> dict[str, np.ndarray]:
    """The regions of dataset cartography (arXiv 2009.10795, sec. 2), which may overlap.

    Args:
        probability: ``[N]``, mean probability of the label over the visits (confidence); NaN without a visit.
        deviation: ``[N]``, its standard deviation (variability).
        share: Share of the visited samples in each region, in (0, 1]; a third as in the paper.

    Returns:
        Masks bool ``[N]``: ``easy`` of the highest probability, ``hard`` of the lowest, ``ambiguous`` of the highest
        deviation. Of equal samples the first is in.

    Raises:
        ValueError: If ``share`` is out of its range.

    Example:
        >>> regions = cartography_regions(np.array([0.9, 0.5, 0.1]), np.array([0.0, 0.3, 0.1]))
        >>> {name: mask.nonzero()[0].tolist() for name, mask in regions.items()}
        {'easy': [0], 'hard': [2], 'ambiguous': [1]}
    """
    check_number("share", share, "(0, 1]")
    visited = np.flatnonzero(np.isfinite(probability))
    size = round(share * len(visited))
    regions = {}
    for name, values in (("easy", -probability), ("hard", probability), ("ambiguous", -deviation)):
        regions[name] = np.zeros(len(probability), bool)
        regions[name][visited[np.argsort(values[visited], kind="stable")[:size]]] = True
    return regions


def self_confidence(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Held-out probability of each label (confident learning, arXiv 1911.00068); low is suspicious.

    Args:
        probabilities: ``[N, C]``, by a model that has not trained on the sample.
        labels: int64 ``[N]``.

    Example:
        >>> self_confidence(np.array([[0.75, 0.25]]), np.array([1]))
        array([0.25])
    """
    return probabilities[np.arange(len(labels)), labels]


def normalized_margin(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """``(p_y - max_{c != y} p_c + 1) / 2`` of held-out probabilities (arXiv 1911.00068); low is suspicious.

    Args:
        probabilities: ``[N, C]``, by a model that has not trained on the sample.
        labels: int64 ``[N]``.

    Example:
        >>> normalized_margin(np.array([[0.75, 0.25]]), np.array([1]))
        array([0.25])
    """
    own = self_confidence(probabilities, labels)
    others = probabilities.copy()
    others[np.arange(len(labels)), labels] = -np.inf
    return (own - others.max(1) + 1) / 2


def errors_are_learned(dynamics: SampleDynamics, threshold: np.ndarray | None = None) -> bool:
    """Whether wrong labels seem to go from each class to one other, which a model learns.

    Of the tenth of the samples with the lowest mean margins, more than ``(1 + 1 / (C - 1)) / 2`` have the suggestion
    that is the most frequent one of their label: halfway from errors drawn from all classes to errors from one to one
    other. With two classes there is no difference.

    Args:
        dynamics: The record, of classes.
        threshold: int64 ``[M]``, threshold samples, which are left out; None for none.
    """
    margins, classes = dynamics["margin"].astype(np.float64), dynamics.classes
    margins[[] if threshold is None else threshold] = np.nan
    visited = np.flatnonzero(np.isfinite(margins))
    worst = visited[np.argsort(margins[visited], kind="stable")[: len(visited) // 10]]
    if classes < 3 or not len(worst):
        return False
    counts = np.zeros((classes, classes))
    np.add.at(counts, (dynamics["label"][worst], dynamics["suggested"][worst]), 1)
    return bool(counts.max(1).sum() / len(worst) > (1 + 1 / (classes - 1)) / 2)


def suspicion(
    dynamics: SampleDynamics,
    by: Literal["auto", "margin", "probability_margin"] = "auto",
    threshold: np.ndarray | None = None,
) -> np.ndarray:
    """How suspicious each sample is, the most suspicious highest; of sequences, and of losses alone, the mean loss.

    The mean margin of logits (:func:`area_under_margin`) finds labels that are wrong at random, and the mean margin
    of probabilities, ``p_y - max_{c != y} p_c``, those of one class that are often given to one other.

    Args:
        dynamics: The record.
        by: What classes are ranked by, lowest first; ``"auto"`` takes the margin of probabilities where
            :func:`errors_are_learned`, else that of logits.
        threshold: int64 ``[M]``, threshold samples, on which that does not depend.

    Returns:
        fp64 ``[N]``, NaN without a visit.

    Raises:
        ValueError: If ``by`` is something else.
    """
    check_choice("by", by, ("auto", "margin", "probability_margin"))
    if dynamics.kind != "classes":
        return dynamics["loss"].astype(np.float64)
    if by == "margin" or (by == "auto" and not errors_are_learned(dynamics, threshold)):
        return -dynamics["margin"].astype(np.float64)
    return dynamics["rival_probability"].astype(np.float64) - dynamics["probability"]


def slices(dynamics: SampleDynamics, suspects: np.ndarray, groups: Mapping[str, np.ndarray]) -> list[dict]:
    """Loss of each part of the data beside that of all, the hardest part first.

    Args:
        dynamics: The record.
        suspects: bool ``[N]``.
        groups: Names of parts ``[N]`` by what they are divided by, such as ``{"class": labels}``.

    Returns:
        For each part ``by``, ``part``, its visited ``samples``, the mean ``loss``, ``excess`` over the mean of all
        visited samples with the standard ``error`` of the part's mean, and the share of ``suspects``.

    Example:
        >>> from curation.records import DynamicsStore
        >>> slices(SampleDynamics.of_store(DynamicsStore(2)), np.zeros(2, bool), {"class": np.zeros(2)})
        []
    """
    visited = dynamics["visits"] > 0
    loss = dynamics["loss"].astype(np.float64)
    found = []
    for by, names in groups.items():
        for part in np.unique(names[visited]).tolist():
            inside = visited & (names == part)
            own = loss[inside]
            found.append(
                {
                    "by": by,
                    "part": part,
                    "samples": len(own),
                    "loss": own.mean(),
                    "excess": own.mean() - loss[visited].mean(),
                    "error": own.std() / np.sqrt(len(own)),
                    "suspects": suspects[inside].mean(),
                }
            )
    return sorted(found, key=lambda part: -part["excess"])
