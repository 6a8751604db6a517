"""Which samples of a super-batch make the batch with the concepts asked for (arXiv 2511.20643)."""

import functools
import heapq
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from numbers import Real
from typing import Any, Literal

import numpy as np

from curation.samplers.concept_index import ConceptIndex

_NO_CAP = 2**62


class ConceptObjective(ABC):
    """What makes a good batch of a super-batch.

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
            candidates: Their concepts, ``[B]``, in the random order in which the super-batch was drawn.
            k: How many to choose, ``k <= B``.
            targets: fp64 ``[V]``, samples of each concept wanted in the batch.
            penalties: fp64 ``[B]``, what choosing a candidate costs.
        """


class Diversity(ConceptObjective):
    """Approaches the targets: :func:`choose_diverse`.

    Args:
        cap: Most samples of a concept in the batch, where that can be had.

    Raises:
        ValueError: If ``cap`` is below 1.
    """

    def __init__(self, cap: int | None = None) -> None:
        if cap is not None and cap < 1:
            raise ValueError(f"Argument `cap` must be >= 1 or None, but got {cap!r}.")
        self.cap = cap

    def choose(self, candidates: ConceptIndex, k: int, targets: np.ndarray, penalties: np.ndarray) -> np.ndarray:
        """See :class:`ConceptObjective`."""
        return choose_diverse(candidates, k, targets, penalties, self.cap)


class Frequency(ConceptObjective):
    """The candidates with the most concepts, ``|C_i|`` less the penalty; ties go to the earlier candidate."""

    def choose(self, candidates: ConceptIndex, k: int, targets: np.ndarray, penalties: np.ndarray) -> np.ndarray:
        """See :class:`ConceptObjective`."""
        return np.argsort(penalties - candidates.sizes, kind="stable")[:k]


class FirstCome(ConceptObjective):
    """The candidates that were drawn first: the baseline that knows no concepts."""

    def choose(self, candidates: ConceptIndex, k: int, targets: np.ndarray, penalties: np.ndarray) -> np.ndarray:
        """See :class:`ConceptObjective`."""
        return np.argsort(penalties, kind="stable")[:k]


Targets = Literal["uniform", "proportional"] | dict[str, float]


def target_counts(concepts: ConceptIndex, targets: Targets | Mapping[Hashable, float], k: int) -> np.ndarray:
    """Samples ``t_c`` of each concept wanted in a batch of ``k``: fp64 ``[V]``.

    ``k w_c / sum_d w_d`` with the weights ``w`` of a mapping, 0 for concepts that it does not name, or the number of
    samples with the concept in the corpus for ``"proportional"``; ``max(1, k / V)`` for ``"uniform"``.

    Args:
        concepts: Of the corpus.
        targets: ``"uniform"``, ``"proportional"``, or weights by the name of the concept.
        k: Size of the batch.

    Raises:
        ValueError: If a name is unknown, a weight is negative or not finite, all are zero, or ``targets`` is
            something else.
    """
    count = len(concepts.names)
    if isinstance(targets, Mapping):
        weights = np.zeros(count)
        place: dict[Hashable, int] = {str(name): i for i, name in enumerate(concepts.names)}  # as in a config file
        place |= {name: i for i, name in enumerate(concepts.names)}
        for name, weight in targets.items():
            if name not in place:
                raise ValueError(f"Argument `targets` must name concepts of the index, but got {name!r}.")
            if not (isinstance(weight, Real) and weight >= 0 and math.isfinite(weight)):
                raise ValueError(
                    f"Argument `targets` must have finite weights >= 0, but got {weight!r} for {name!r}."
                )
            weights[place[name]] = weight
    elif targets == "proportional":
        weights = concepts.frequencies.astype(np.float64)
    elif targets == "uniform":
        return np.full(count, max(1.0, k / max(count, 1)))
    else:
        raise ValueError(f"Argument `targets` must be 'uniform', 'proportional' or a mapping, but got {targets!r}.")
    if not weights.sum() > 0:
        raise ValueError(f"Argument `targets` must have a weight > 0, but got {targets!r}.")
    return k * weights / weights.sum()


def round_targets(targets: np.ndarray, draw: float) -> np.ndarray:
    """Whole numbers of samples that are the targets on average and have their sum: fp64 ``[V]``.

    The gain of a concept without a sample is 1 whatever its target, so of the many concepts with ``t_c < 1`` each
    would be wanted in every batch, and a batch with targets proportional to the corpus would be far from it.

    Args:
        targets: fp64 ``[V]`` with a whole sum.
        draw: Uniform in [0, 1).

    Example:
        >>> round_targets(np.array([0.5, 0.5, 1.0]), 0.6).tolist()
        [1.0, 0.0, 1.0]
    """
    return np.diff(np.floor(np.cumsum(targets) + draw + 1e-9), prepend=0.0)


def choose_diverse(
    candidates: ConceptIndex,
    k: int,
    targets: np.ndarray,
    penalties: np.ndarray | None = None,
    cap: int | None = None,
) -> np.ndarray:
    r"""The greedy batch of Eq. 3 of arXiv 2511.20643, in the order of choice: int64 ``[k]``.

    Each step takes the candidate with the largest

    .. math:: h(i) = \frac{1}{|C_i|} \sum_{c \in C_i, n_c < t_c} \frac{t_c - n_c}{t_c} + \frac{1}{F_c}

    less its penalty, where ``n_c`` samples with concept ``c`` were chosen so far and ``F_c`` candidates have it; ties
    go to the earlier one. The paper leaves open what follows when no candidate with ``h > 0`` is left: all targets
    grow by another ``t_c``, as often as needed. Candidates without a wanted concept come last. A candidate with a
    concept that was chosen ``cap`` times waits until no other is left; then ``cap`` doubles, triples and so on.

    As ``h`` never rises while candidates are chosen, a queue of old values gives the exact maximum (lazy greedy).
    Where no candidate has more than one concept the order is a sort. Cost: ``O(B P log B)`` in practice, for ``P``
    concepts per candidate.

    Args:
        candidates: Concepts of ``B`` candidates.
        k: At most ``B``.
        targets: fp64 ``[V]``, as from :func:`target_counts`.
        penalties: fp64 ``[B]``; None for none.
        cap: See above; None for none.
    """
    size = len(candidates)
    if not 0 <= k <= size:
        raise ValueError(f"Argument `k` must be in [0, {size}], the number of candidates, but got {k!r}.")
    penalties = np.zeros(size) if penalties is None else penalties
    limit = _NO_CAP if cap is None else cap
    offsets, ids = candidates.offsets, candidates.ids
    frequencies = np.bincount(ids, minlength=len(targets))
    rarity = 1 / np.maximum(frequencies, 1)
    if (np.diff(offsets) <= 1).all():
        return _sorted_classes(offsets, ids, targets, rarity, penalties, limit)[:k]
    counts, taken, chosen = np.zeros(len(targets), np.int64), np.zeros(size, np.bool_), np.zeros(k, np.int64)
    greedy = _compiled()
    if greedy is not _greedy:
        greedy(offsets, ids, targets, rarity, penalties, counts, taken, chosen, limit)
        return chosen
    arrays = (offsets, ids, targets, rarity, penalties, counts, taken, chosen)  # items of lists are read faster
    lists = [array.tolist() for array in arrays]
    greedy(*lists, limit)
    return np.array(lists[-1], np.int64)


def _sorted_classes(
    offsets: np.ndarray, ids: np.ndarray, targets: np.ndarray, rarity: np.ndarray, penalties: np.ndarray, cap: int
) -> np.ndarray:
    """All candidates with at most one concept each, in the order in which the greedy choice would take them."""
    size = len(offsets) - 1
    concept = np.full(size, -1)
    concept[np.diff(offsets) == 1] = ids
    # The n-th candidate of a concept is the one that is chosen when n of it are.
    order = np.lexsort((penalties, concept))
    first = np.flatnonzero(np.diff(concept[order], prepend=-2))
    n = np.empty(size, np.int64)
    n[order] = np.arange(size) - np.repeat(first, np.diff(first, append=size))
    n[concept < 0] = 0
    wanted = (concept >= 0) & (targets[concept] > 0)
    t = np.where(wanted, targets[concept], 1.0)
    rounds = np.floor(n / t) + 1
    rounds += n >= rounds * t
    rounds -= (rounds > 1) & (n < (rounds - 1) * t)
    gain = (rounds * t - n) / (rounds * t) + rarity[concept]
    gain[~wanted], rounds[~wanted] = 0, np.inf
    return np.lexsort((np.arange(size), penalties - gain, rounds, n // cap))


def _greedy(
    offsets: Any,
    ids: Any,
    targets: Any,
    rarity: Any,
    penalties: Any,
    counts: Any,
    taken: Any,
    chosen: Any,
    cap: int,
) -> None:
    """Fill ``chosen``. Compiled by numba where there is numba, hence plain loops."""

    def is_full(i, limit):  # type: ignore[no-untyped-def]
        for j in range(offsets[i], offsets[i + 1]):  # noqa: SIM110 - numba has no any()
            if counts[ids[j]] >= limit:
                return True
        return False

    def gain(i, rounds):  # type: ignore[no-untyped-def]
        total = 0.0
        for j in range(offsets[i], offsets[i + 1]):
            target = rounds * targets[ids[j]]
            if counts[ids[j]] < target:
                total += (target - counts[ids[j]]) / target + rarity[ids[j]]
        return total / max(offsets[i + 1] - offsets[i], 1)

    def rounds_needed(i):  # type: ignore[no-untyped-def]
        """After how many growths of the targets one of its concepts is wanted."""
        fewest = np.inf
        for j in range(offsets[i], offsets[i + 1]):
            target, count = targets[ids[j]], counts[ids[j]]
            if target > 0:
                rounds = count // target + 1.0
                if count >= rounds * target:
                    rounds += 1
                elif rounds > 1 and count < (rounds - 1) * target:
                    rounds -= 1
                fewest = min(fewest, rounds)
        return fewest

    size, filled, limit, rounds = len(taken), 0, cap, 1.0
    while filled < len(chosen):
        nearest = np.inf
        heap = [(0.0, 0) for _ in range(0)]
        for i in range(size):
            if not taken[i] and not is_full(i, limit):
                nearest = min(nearest, rounds_needed(i))
        if nearest < np.inf:
            rounds = max(rounds, nearest)
        for i in range(size):
            if not taken[i] and not is_full(i, limit):
                now = gain(i, rounds)
                if now > 0 or nearest == np.inf:
                    heap.append((penalties[i] - now, i))
        if len(heap) == 0:
            limit += cap
            rounds = 1.0
        heapq.heapify(heap)
        while len(heap) > 0 and filled < len(chosen):
            _, i = heapq.heappop(heap)
            if is_full(i, limit):
                continue
            now = gain(i, rounds)
            if now <= 0 and nearest < np.inf:
                continue  # waits for the next round
            entry = (penalties[i] - now, i)
            if len(heap) > 0 and entry > heap[0]:
                heapq.heappush(heap, entry)
                continue
            chosen[filled] = i
            filled += 1
            taken[i] = True
            for j in range(offsets[i], offsets[i + 1]):
                counts[ids[j]] += 1


@functools.cache
def _compiled() -> Callable[..., None]:
    try:
        import numba
    except ImportError:
        warnings.warn(
            "numba is not installed, so concept-aware batches are chosen by plain Python, several times slower: "
            "`pip install 'lightning-curation[select]'`.",
            stacklevel=3,
        )
        return _greedy
    return numba.njit(cache=True)(_greedy)
