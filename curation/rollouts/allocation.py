"""How many rollouts each prompt gets, from the successes of its first ones (DARS, arXiv 2508.13755).

With ``u`` the accuracy of a prompt and ``n`` rollouts, the advantages of a group sum to ``2 n u (1 - u)`` in absolute
value (``2 n sqrt(u (1 - u))`` where they are divided by their standard deviation), so hard prompts hardly count.
Schedules give them more rollouts. Everything here is NumPy on the CPU and deterministic: processes with the same
counts make the same plan.
"""

from collections.abc import Iterable
from typing import Literal, Protocol, get_args

import numpy as np

from curation.checks import check_choice, check_flag, check_integer, check_number

Objective = Literal["accuracy", "logit", "log"]
MAX_ROLLOUTS = 2**31  # exclusive; sums over prompts stay within int64


class Schedule(Protocol):
    """A rule for the number of rollouts to add to the first ones."""

    def extra(self, successes: np.ndarray, n: int) -> np.ndarray:
        """Rollouts to add to each prompt: int64 ``[P]``.

        Args:
            successes: fp64 ``[P]``, the sum of the rewards of each prompt's first rollouts, in [0, n].
            n: Number of first rollouts of every prompt.
        """
        ...

    def cap(self, n: int) -> int:
        """The largest number of rollouts that may be added to a prompt."""
        ...


class Uniform:
    """The same number of rollouts for every prompt.

    Args:
        rollouts: Number of rollouts of a prompt, the first ones included; below 2^31.

    Raises:
        ValueError: If ``rollouts`` is out of its range.

    Example:
        >>> Uniform(16).extra(np.arange(4), 8).tolist()
        [8, 8, 8, 8]
    """

    def __init__(self, rollouts: int) -> None:
        self.rollouts = check_integer("rollouts", rollouts, 1, MAX_ROLLOUTS)

    def extra(self, successes: np.ndarray, n: int) -> np.ndarray:
        """``rollouts - n`` for each prompt, at least 0."""
        return np.full(len(successes), self.cap(n), np.int64)

    def cap(self, n: int) -> int:
        """``rollouts - n``, at least 0."""
        return max(self.rollouts - n, 0)


class EqualTreatment:
    r"""Equal treatment (ET): every prompt below accuracy 1/2 has the sum of absolute advantages of one at 1/2.

    The number of rollouts in all, rounded up, is

    .. math:: \frac{n}{4 u (1 - u)} \quad \text{or, with } \texttt{std}, \quad \frac{n}{2 \sqrt{u (1 - u)}}.

    With ``u`` known, the gradient is that of ``logit u``.

    Args:
        max_rollouts: Largest number of rollouts of a prompt, the first ones included; below 2^31.
        std: The formula for advantages that are divided by their standard deviation.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> EqualTreatment().extra(np.arange(9), 8).tolist()
        [24, 11, 3, 1, 0, 0, 0, 0, 0]
    """

    def __init__(self, max_rollouts: int = 32, std: bool = False) -> None:
        self.max_rollouts = check_integer("max_rollouts", max_rollouts, 1, MAX_ROLLOUTS)
        self.std = check_flag("std", std)

    def extra(self, successes: np.ndarray, n: int) -> np.ndarray:
        """0 for prompts with ``n / 2`` successes or more; no success counts as half a success."""
        k = np.maximum(np.asarray(successes, np.float64), 0.5)
        k = np.minimum(k, n / 2)
        # One division and at most one root: whole numbers stay whole, so that they are not rounded up.
        total = np.sqrt(n**4 / (4 * k * (n - k))) if self.std else n**3 / (4 * k * (n - k))
        return np.clip(np.ceil(total).astype(np.int64) - n, 0, self.cap(n))

    def cap(self, n: int) -> int:
        """``max_rollouts - n``, at least 0."""
        return max(self.max_rollouts - n, 0)


class HardnessWeighted(EqualTreatment):
    r"""Hardness weighted (HW): the sum of absolute advantages is ``2 (1 - u)`` times that of a prompt at 1/2.

    The number of rollouts in all, rounded up, is

    .. math:: \frac{n}{2 u} \quad \text{or, with } \texttt{std}, \quad n \sqrt{(1 - u) / u}.

    With ``u`` known, the gradient is that of ``log u``.

    Args:
        max_rollouts: Largest number of rollouts of a prompt, the first ones included; below 2^31.
        std: The formula for advantages that are divided by their standard deviation.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> HardnessWeighted(std=True).extra(np.arange(9), 8).tolist()
        [23, 14, 6, 3, 0, 0, 0, 0, 0]
    """

    def __init__(self, max_rollouts: int = 64, std: bool = False) -> None:
        super().__init__(max_rollouts, std)

    def extra(self, successes: np.ndarray, n: int) -> np.ndarray:
        """0 for prompts with ``n / 2`` successes or more; no success counts as half a success."""
        k = np.maximum(np.asarray(successes, np.float64), 0.5)
        k = np.minimum(k, n / 2)
        total = np.sqrt(n**2 * (n - k) / k) if self.std else n**2 / (2 * k)
        return np.clip(np.ceil(total).astype(np.int64) - n, 0, self.cap(n))


class Neyman:
    r"""Neyman allocation: the gradient of an objective has the least variance, at a given number of rollouts.

    The number of rollouts of a prompt is in proportion to

    .. math:: w(u) \sqrt{u (1 - u)}.

    Args:
        objective: The sum over prompts of ``"accuracy"``, with the weight ``w = 1``; of its ``"logit"``, with
            ``w = 1 / (u (1 - u))``; or of its ``"log"``, with ``w = 1 / u``.
        rollouts: Mean number of rollouts of a prompt, the first ones included; below 2^31.
        max_rollouts: Largest number of rollouts of a prompt; below 2^31.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> Neyman("log", rollouts=16).extra(np.arange(0.0, 9, 2), 8).tolist()
        [29, 9, 2, 0, 0]
    """

    def __init__(
        self,
        objective: Objective = "log",
        rollouts: int = 16,
        max_rollouts: int = 64,
    ) -> None:
        self.objective = check_choice("objective", objective, get_args(Objective))
        self.rollouts = check_integer("rollouts", rollouts, 1, MAX_ROLLOUTS)
        self.max_rollouts = check_integer("max_rollouts", max_rollouts, 1, MAX_ROLLOUTS)

    def extra(self, successes: np.ndarray, n: int) -> np.ndarray:
        """The rollouts that a prompt lacks for its proportion; 0 and ``n`` successes count as 1/2 and ``n - 1/2``."""
        k = np.clip(np.asarray(successes, np.float64), 0.5, n - 0.5)
        u = k / n
        power = {"accuracy": (0.5, 0.5), "logit": (-0.5, -0.5), "log": (-0.5, 0.5)}[self.objective]
        weights = u ** power[0] * (1 - u) ** power[1]
        return fill(weights, np.full(len(u), n), np.full(len(u), self.max_rollouts), self.rollouts * len(u)) - n

    def cap(self, n: int) -> int:
        """``max_rollouts - n``, at least 0."""
        return max(self.max_rollouts - n, 0)


def fill(weights: np.ndarray, least: np.ndarray, most: np.ndarray, total: int) -> np.ndarray:
    """Integers in proportion to weights, within bounds, with a given sum: int64 ``[P]``.

    The sum is ``total``, or the nearest sum that the bounds allow. Where the weight is 0, the integer is the lower
    bound. Rounded by largest remainder; of equal remainders the first is rounded up first.

    Args:
        weights: ``[P]``, >= 0 and finite.
        least: int64 ``[P]``, the lower bounds.
        most: int64 ``[P]``, the upper bounds; where they are below the lower bound, the lower bound holds.
        total: The sum.

    Example:
        >>> fill(np.array([1.0, 1.0, 6.0]), np.zeros(3, int), np.full(3, 5), 10).tolist()
        [3, 2, 5]
    """
    weights = np.asarray(weights, np.float64)
    least, most = np.asarray(least, np.int64), np.maximum(most, least)
    most = np.where(weights > 0, most, least)
    total = int(np.clip(total, least.sum(), most.sum()))
    # `sum clip(s w, least, most)` rises with s, piecewise linear: its corners, and the piece that holds the total.
    with np.errstate(divide="ignore", invalid="ignore"):
        corners = np.sort(np.concatenate([least / weights, most / weights]))
    corners = np.concatenate([[0.0], corners[np.isfinite(corners)]])
    low, high = 0, len(corners) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (
            (middle, high) if np.clip(corners[middle] * weights, least, most).sum() <= total else (low, middle)
        )
    start, end = (np.clip(corners[i] * weights, least, most) for i in (low, high))
    rise = end.sum() - start.sum()
    fraction = (total - start.sum()) / rise if rise > 0 else 0.0
    ideal = start + min(max(fraction, 0.0), 1.0) * (end - start)
    whole = np.clip(np.floor(ideal + 1e-9).astype(np.int64), least, most)
    missing = total - int(whole.sum())
    if missing > 0:
        order = np.argsort(-np.where(whole < most, ideal - whole, -np.inf), kind="stable")
        whole[order[:missing]] += 1
    return whole


def plan(schedule: Schedule, successes: np.ndarray, n: int, budget: int | None = None) -> np.ndarray:
    """The rollouts to add to each prompt: int64 ``[P]``.

    Args:
        schedule: The rule for the number of added rollouts.
        successes: ``[P]``, the sum of the rewards of each prompt's first rollouts, in [0, n].
        n: Number of first rollouts of every prompt; below 2^31.
        budget: Number of all rollouts of the step, at least ``n P``. Additions are in proportion to the schedule's,
            within its cap, and sum to what the first rollouts leave of the budget, if the schedule adds any. None
            for the numbers of the schedule.

    Raises:
        ValueError: If ``n`` is out of its range, a number of successes is not in [0, n], or the budget does not cover
            the first rollouts.

    Example:
        >>> plan(HardnessWeighted(), np.array([0, 2, 8]), 8, budget=48).tolist()
        [21, 3, 0]
    """
    n = check_integer("n", n, 1, MAX_ROLLOUTS)
    successes = np.asarray(successes, np.float64)
    if successes.ndim != 1:
        raise ValueError(f"Argument `successes` must be [P], but got {list(successes.shape)}.")
    if not ((successes >= 0) & (successes <= n)).all():
        outside = successes[~((successes >= 0) & (successes <= n))][0]
        raise ValueError(f"Rewards of {n} rollouts must sum to [0, {n}], but sum to {outside}.")
    extra = schedule.extra(successes, n)
    if budget is None:
        return extra
    first = n * len(successes)
    left = check_number("budget", budget, f"[{first}, inf)") - first
    return fill(extra, np.zeros_like(extra), np.full_like(extra, schedule.cap(n)), int(left))


class DifficultyMemory:
    """A Beta posterior of each prompt's accuracy that forgets.

    Args:
        forgetting: Factor in [0, 1) by which earlier observations of a prompt count less with every update of it.

    Raises:
        ValueError: If ``forgetting`` is out of its range.

    Example:
        >>> memory = DifficultyMemory(forgetting=0.5)
        >>> memory.update([7], [6.0], 8)
        >>> memory.successes([3, 7], [4.0, 4.0], 8).tolist()
        [4.0, 4.666666666666667]
    """

    def __init__(self, forgetting: float = 0.5) -> None:
        self.forgetting: float = check_number("forgetting", forgetting, "[0, 1)")
        self.counts: dict[int, tuple[float, float]] = {}  # prompt id -> successes, rollouts

    def update(self, ids: Iterable[int], successes: Iterable[float], n: int) -> None:
        """Enter first rollouts. Added ones would bias the posterior: a prompt that fails at first gets more of them.

        Args:
            ids: The ids of ``P`` prompts.
            successes: The sum of the rewards of each prompt's first rollouts, in [0, n].
            n: Number of first rollouts of every prompt.

        Raises:
            ValueError: If ``n`` is not a positive integer, or a number of successes is out of its range; then nothing
                is entered.
        """
        check_integer("n", n, 1)
        successes = list(successes)
        outside = [k for k in successes if not 0 <= k <= n]
        if outside:
            raise ValueError(f"Rewards of {n} rollouts must sum to [0, {n}], but sum to {outside[0]}.")
        for i, k in zip(ids, successes, strict=True):
            old_k, old_n = self.counts.get(i, (0.0, 0.0))
            self.counts[i] = self.forgetting * (old_k + k), self.forgetting * (old_n + n)

    def successes(self, ids: Iterable[int], successes: Iterable[float], n: int) -> np.ndarray:
        """``n`` times the posterior accuracy of each prompt, given its first rollouts as well: fp64 ``[P]``.

        Args:
            ids: The ids of ``P`` prompts.
            successes: The sum of the rewards of each prompt's first rollouts, in [0, n].
            n: Number of first rollouts of every prompt.
        """
        counts = [(*self.counts.get(i, (0.0, 0.0)), k) for i, k in zip(ids, successes, strict=True)]
        return np.array(
            [min(n * (old_k + k) / (old_n + n), n) for old_k, old_n, k in counts]
        )  # rounding may exceed n
