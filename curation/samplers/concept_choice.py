"""Objectives that choose a batch from a super-batch by the concepts of its samples (arXiv 2511.20643)."""

import functools
import heapq
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from numbers import Real
from typing import Any, Literal

import numpy as np

from curation.checks import check_integer, check_number
from curation.compiled import compiled
from curation.samplers.concept_index import ConceptIndex

_NO_CAP = 2**62


class ConceptObjective(ABC):
    """Base class of the objectives by which a batch is chosen from a super-batch.

    Example:
        >>> class Rare(ConceptObjective):  # samples whose rarest concept is rarest
        ...     def choose(self, candidates, k, targets, penalties):
        ...         rarest = [candidates.frequencies[row].min(initial=len(candidates)) for row in candidates]
        ...         return np.argsort(rarest, kind="stable")[:k]
        >>> Rare().choose(ConceptIndex.from_lists([["a"], ["a"], ["a", "b"]]), 1, None, None).tolist()
        [2]
    """

    @abstractmethod
    def choose(self, candidates: ConceptIndex, k: int, targets: np.ndarray, penalties: np.ndarray) -> np.ndarray:
        """Positions of the ``k`` chosen candidates: int64 ``[k]``, none twice.

        Args:
            candidates: Concepts of the ``B`` candidates, in the random order in which the super-batch was drawn.
            k: Number of candidates to choose, ``k <= B``.
            targets: fp64 ``[V]``, wanted number of samples with each concept in the batch.
            penalties: fp64 ``[B]``, amounts subtracted from the gains of the candidates.
        """


class Diversity(ConceptObjective):
    """Approaches the targets: :func:`choose_diverse`.

    Args:
        cap: Largest number of samples with one concept in the batch, as far as the candidates allow; None for no cap.

    Raises:
        ValueError: If ``cap`` is neither None nor an integer >= 1.

    Example:
        >>> candidates = ConceptIndex.from_lists([["cat"], ["cat"], ["dog"]])
        >>> Diversity().choose(candidates, 2, np.ones(2), np.zeros(3)).tolist()
        [2, 0]
    """

    def __init__(self, cap: int | None = None) -> None:
        self.cap = check_integer("cap", cap, 1, optional=True)

    def choose(self, candidates: ConceptIndex, k: int, targets: np.ndarray, penalties: np.ndarray) -> np.ndarray:
        """See :class:`ConceptObjective`."""
        return choose_diverse(candidates, k, targets, penalties, self.cap)


class Frequency(ConceptObjective):
    """Takes the candidates with the most concepts, ``|C_i|`` less the penalty; ties go to the earlier candidate.

    Example:
        >>> candidates = ConceptIndex.from_lists([["cat"], ["cat", "dog"]])
        >>> Frequency().choose(candidates, 1, np.ones(2), np.zeros(2)).tolist()
        [1]
    """

    def choose(self, candidates: ConceptIndex, k: int, targets: np.ndarray, penalties: np.ndarray) -> np.ndarray:
        """See :class:`ConceptObjective`."""
        return np.argsort(penalties - candidates.sizes, kind="stable")[:k]


class FirstCome(ConceptObjective):
    """Takes the candidates that were drawn first: the baseline that ignores concepts.

    Example:
        >>> candidates = ConceptIndex.from_lists([["cat"], ["cat", "dog"]])
        >>> FirstCome().choose(candidates, 1, np.ones(2), np.zeros(2)).tolist()
        [0]
    """

    def choose(self, candidates: ConceptIndex, k: int, targets: np.ndarray, penalties: np.ndarray) -> np.ndarray:
        """See :class:`ConceptObjective`."""
        return np.argsort(penalties, kind="stable")[:k]


Targets = Literal["uniform", "proportional"] | dict[str, float]


def target_counts(concepts: ConceptIndex, targets: Targets | Mapping[Hashable, float], k: int) -> np.ndarray:
    """Samples ``t_c`` of each concept wanted in a batch of ``k``: fp64 ``[V]``.

    ``k w_c / sum_d w_d`` with the weights ``w`` of a mapping, 0 for concepts that it does not name, or the number of
    samples with the concept in the corpus for ``"proportional"``; ``max(1, k / V)`` for ``"uniform"``.

    Args:
        concepts: Concepts of the corpus.
        targets: ``"uniform"``, ``"proportional"``, or weights by the name of the concept.
        k: Size of the batch, >= 1.

    Raises:
        ValueError: If no sample has a concept, a name is unknown, a weight is negative or not finite, all are zero,
            ``targets`` is something else, or ``k`` is not an integer >= 1.

    Example:
        >>> target_counts(ConceptIndex.from_lists([["cat"], ["dog"]]), {"dog": 3, "cat": 1}, 8).tolist()
        [2.0, 6.0]
    """
    check_integer("k", k, 1)
    count = len(concepts.names)
    if not count:
        raise ValueError("Argument `concepts` must have a sample with a concept, but has none.")
    if isinstance(targets, Mapping):
        weights = np.zeros(count)
        place: dict[Hashable, int] = {str(name): i for i, name in enumerate(concepts.names)}  # as in a config file
        place |= {name: i for i, name in enumerate(concepts.names)}
        for name, weight in targets.items():
            if name not in place:
                raise ValueError(f"Argument `targets` must name concepts of the index, but got {name!r}.")
            if isinstance(weight, bool) or not (isinstance(weight, Real) and weight >= 0 and math.isfinite(weight)):
                raise ValueError(
                    f"Argument `targets` must have finite weights >= 0, but got {weight!r} for {name!r}."
                )
            weights[place[name]] = weight
    elif isinstance(targets, str) and targets == "proportional":
        weights = concepts.frequencies.astype(np.float64)
    elif isinstance(targets, str) and targets == "uniform":
        return np.full(count, max(1.0, k / count))
    else:
        raise ValueError(f"Argument `targets` must be 'uniform', 'proportional' or a mapping, but got {targets!r}.")
    if not weights.any():
        raise ValueError(f"Argument `targets` must have a weight > 0, but got {targets!r}.")
    weights /= weights.max()  # so that their sum is finite
    return k * weights / weights.sum()


class MovingTargets:
    """Targets that move while a model trains: a mixture with a schedule.

    Between two points the shares of the concepts change linearly; before the first and after the last they stay.

    Args:
        points: Targets by the number of samples that all processes were given before, at least two: ``"uniform"`` (as
            many samples of each concept), ``"proportional"``, or weights by name.

    Raises:
        ValueError: If there are fewer points, or a number is no integer >= 0.

    Example:
        >>> concepts = ConceptIndex.from_lists([["cat"], ["dog"]])
        >>> moving = MovingTargets({0: {"cat": 1}, 100: {"dog": 1}})
        >>> moving.at(moving.counts(concepts, 8), 25).tolist()
        [6.0, 2.0]
    """

    def __init__(self, points: Mapping[int, Targets]) -> None:
        if not isinstance(points, Mapping) or len(points) < 2:
            raise ValueError(
                f"Argument `points` must have targets at two numbers of samples at least, but got {points!r}."
            )
        for samples in points:
            check_integer("points", samples, 0)
        self.points = dict(sorted(points.items()))

    def counts(self, concepts: ConceptIndex, k: int) -> np.ndarray:
        """Samples of each concept wanted in a batch of ``k`` at each point: fp64 ``[P, V]``, rows of sum ``k``.

        Raises:
            ValueError: If targets name no concept of the index, or have no weight > 0.
        """
        equal: Any = dict.fromkeys(concepts.names, 1.0)
        return np.stack([target_counts(concepts, equal if t == "uniform" else t, k) for t in self.points.values()])

    def at(self, counts: np.ndarray, samples: int) -> np.ndarray:
        """Samples of each concept wanted in the batch after so many samples: fp64 ``[V]``.

        Args:
            counts: What :meth:`counts` gives.
            samples: Samples that all processes were given before.
        """
        numbers = np.array(list(self.points), np.float64)
        after = int(np.searchsorted(numbers, samples, side="right"))
        if after in (0, len(numbers)):
            return counts[min(after, len(numbers) - 1)]
        share = (samples - numbers[after - 1]) / (numbers[after] - numbers[after - 1])
        return (1 - share) * counts[after - 1] + share * counts[after]


def round_targets(targets: np.ndarray, draw: float) -> np.ndarray:
    """Whole numbers of samples that are the targets on average and have their sum: fp64 ``[V]``.

    The gain of a concept without a sample is 1 whatever its target, so of the many concepts with ``t_c < 1`` each
    would be wanted in every batch, and a batch with targets proportional to the corpus would be far from it.

    Args:
        targets: fp64 ``[V]`` with a whole sum.
        draw: Random number, uniform in [0, 1).

    Raises:
        ValueError: If ``draw`` is outside [0, 1).

    Example:
        >>> round_targets(np.array([0.5, 0.5, 1.0]), 0.6).tolist()
        [1.0, 0.0, 1.0]
    """
    check_number("draw", draw, "[0, 1)")
    # Rounding may leave a sum just below its whole number.
    return np.diff(np.floor(np.cumsum(targets) + draw + 1e-9), prepend=0.0)


def choose_diverse(
    candidates: ConceptIndex,
    k: int,
    targets: np.ndarray,
    penalties: np.ndarray | None = None,
    cap: int | None = None,
) -> np.ndarray:
    r"""The greedy batch of diversity maximisation (arXiv 2511.20643), in the order of choice: int64 ``[k]``.

    Each step takes the candidate with the largest

    .. math:: h(i) = \frac{1}{|C_i|} \sum_{c \in C_i, n_c < t_c} \frac{t_c - n_c}{t_c} + \frac{1}{F_c}

    less its penalty, where ``n_c`` samples with concept ``c`` were chosen so far and ``F_c`` candidates have it; ties
    go to the earlier one. The paper leaves open what follows when no candidate with ``h > 0`` is left: all targets
    grow by another ``t_c``, as often as needed. Candidates without a wanted concept come last. A candidate with a
    concept that was chosen ``cap`` times waits until no other is left; then ``cap`` doubles, triples and so on.

    As ``h`` never rises while candidates are chosen, a queue of old values gives the exact maximum (lazy greedy). Of
    candidates with the same concepts only the next is in the queue. Cost: ``O(B P log B)`` in practice, for ``P``
    concepts per candidate, and ``O(V)``.

    Args:
        candidates: Concepts of ``B`` candidates.
        k: Number of candidates to choose, in [0, B].
        targets: fp64 ``[V]``, as from :func:`target_counts`; 0, or at least 1e-9.
        penalties: fp64 ``[B]``; None for no penalties.
        cap: Number of samples with one concept from which on its candidates wait; None for no cap.

    Raises:
        ValueError: If an argument has another shape, or is out of its range.

    Example:
        >>> choose_diverse(ConceptIndex.from_lists([["cat"], ["cat"], ["dog"]]), 2, np.ones(2)).tolist()
        [2, 0]
    """
    size = len(candidates)
    targets = np.asarray(targets, np.float64)
    if (
        targets.shape != (len(candidates.names),)
        or not (((targets >= 1e-9) & (targets < np.inf)) | (targets == 0)).all()
    ):
        raise ValueError(
            f"Argument `targets` must be [{len(candidates.names)}] numbers, 0 or from 1e-9 on, but got {targets}."
        )
    if penalties is not None and (np.shape(penalties) != (size,) or not np.isfinite(penalties).all()):
        raise ValueError(f"Argument `penalties` must be [{size}] finite numbers, but got {penalties}.")
    check_integer("cap", cap, 1, optional=True)
    check_integer("k", k, 0, size + 1)
    penalties = np.zeros(size) if penalties is None else np.asarray(penalties, np.float64)
    offsets, ids = candidates.offsets, candidates.ids
    rarity = 1 / np.maximum(np.bincount(ids, minlength=len(targets)), 1)
    # Candidates with the same concepts, one after the other, the cheapest first; the choice compares them.
    hashes = ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    hashes = (hashes ^ (hashes >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(hashes ^ (hashes >> np.uint64(32)))])
    order = np.lexsort((penalties, np.diff(sums[offsets])))
    chosen, following, counts = np.zeros(k, np.int64), np.full(size, -1), np.zeros(len(targets), np.int64)
    arrays = [offsets, ids, targets, rarity, penalties, order, following, counts, chosen]
    greedy = _compiled()
    if greedy is _greedy:
        arrays = [array.tolist() for array in arrays]  # whose items are read faster
    greedy(*arrays, _NO_CAP if cap is None else min(cap, _NO_CAP))
    return np.asarray(arrays[-1], np.int64)


def _greedy(
    offsets: Any,
    ids: Any,
    targets: Any,
    rarity: Any,
    penalties: Any,
    order: Any,
    following: Any,
    counts: Any,
    chosen: Any,
    cap: int,
) -> None:
    """Fill ``chosen``. Compiled by numba where there is numba, hence plain loops."""

    def entry(i):  # type: ignore[no-untyped-def]
        """Smallest first: how often the cap and the targets have to grow, the penalty less the gain, the position."""
        begin, end = offsets[i], offsets[i + 1]
        full, rounds, gain = 0, np.inf, 0.0
        for j in range(begin, end):
            c = ids[j]
            target, count = targets[c], counts[c]
            if count >= cap:
                full = max(full, count // cap)
            if count < target:
                rounds = 1.0
                gain += (target - count) / target + rarity[c]
            elif target > 0 and rounds > 1:
                grown = math.floor(count / target) + 1.0
                if count >= grown * target:
                    grown += 1
                elif count < (grown - 1) * target:
                    grown -= 1
                rounds = min(rounds, grown)
        if 1 < rounds < np.inf:
            for j in range(begin, end):
                c = ids[j]
                target = rounds * targets[c]
                if counts[c] < target:
                    gain += (target - counts[c]) / target + rarity[c]
        return full, rounds, penalties[i] - gain / max(end - begin, 1), i

    def same(a, b):  # type: ignore[no-untyped-def]
        size = offsets[a + 1] - offsets[a]
        if size != offsets[b + 1] - offsets[b]:
            return False
        for j in range(size):  # noqa: SIM110 - numba has no all()
            if ids[offsets[a] + j] != ids[offsets[b] + j]:
                return False
        return True

    heap = [entry(i) for i in order[:1]]
    for place in range(1, len(order)):
        if same(order[place], order[place - 1]):
            following[order[place - 1]] = order[place]
        else:
            heap.append(entry(order[place]))
    heapq.heapify(heap)
    for step in range(len(chosen)):
        i = heapq.heappop(heap)[3]
        current = entry(i)
        while len(heap) > 0 and current > heap[0]:
            i = heapq.heapreplace(heap, current)[3]
            current = entry(i)
        chosen[step] = i
        for j in range(offsets[i], offsets[i + 1]):
            counts[ids[j]] += 1
        if following[i] >= 0:
            heapq.heappush(heap, entry(following[i]))


@functools.cache
def _compiled() -> Callable[..., None]:
    try:
        return compiled(_greedy)
    except ImportError:
        warnings.warn(
            "numba is not installed, so concept-aware batches are chosen by plain Python, over ten times slower: "
            "`pip install 'lightning-curation[select]'`.",
            stacklevel=3,
        )
        return _greedy
