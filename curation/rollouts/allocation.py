"""How many rollouts each prompt gets, from how many of its first ones succeeded (DARS, arXiv 2508.13755).

With ``u`` the accuracy of a prompt and ``n`` rollouts, the advantages of a group sum to ``2 n u (1 - u)`` in absolute
value (``2 n sqrt(u (1 - u))`` where they are divided by their standard deviation), so hard prompts hardly count.
Schedules give them more rollouts. Everything here is NumPy on the CPU and deterministic, so that processes which have
the same counts make the same plan.
"""

from collections.abc import Iterable
from typing import Any, Literal, Protocol

import numpy as np


class Schedule(Protocol):
    """Which rollouts to add to the first ones."""

    def extra(self, successes: np.ndarray, n: int) -> np.ndarray:
        """Rollouts to add to each prompt: int64 ``[P]``.

        Args:
            successes: fp64 ``[P]``, sum of the rewards of the first rollouts, in [0, n].
            n: Rollouts that every prompt has had.
        """
        ...

    def cap(self, n: int) -> int:
        """The most that may be added to a prompt."""
        ...


class Uniform:
    """As many rollouts for every prompt.

    Args:
        rollouts: Of each prompt, the first ones among them.

    Raises:
        ValueError: If ``rollouts`` is not a positive integer.
    """

    def __init__(self, rollouts: int) -> None:
        self.rollouts = _positive("rollouts", rollouts)

    def extra(self, successes: np.ndarray, n: int) -> np.ndarray:
        """``rollouts - n`` for each."""
        return np.full(len(successes), self.cap(n), np.int64)

    def cap(self, n: int) -> int:
        """``rollouts - n``."""
        return max(self.rollouts - n, 0)


class EqualTreatment:
    """As many as make the sum of absolute advantages of every prompt below 1/2 that of one at 1/2 (ET).

    ``n / (4 u (1 - u))`` in all, or ``n / (2 sqrt(u (1 - u)))`` with ``std``, rounded up. With ``u`` known, the
    gradient is that of ``logit u``.

    Args:
        max_rollouts: Of a prompt, the first ones among them.
        std: For advantages that are divided by their standard deviation.

    Raises:
        ValueError: If ``max_rollouts`` is not a positive integer.

    Example:
        >>> EqualTreatment().extra(np.arange(9), 8).tolist()
        [24, 11, 3, 1, 0, 0, 0, 0, 0]
    """

    def __init__(self, max_rollouts: int = 32, std: bool = False) -> None:
        self.max_rollouts = _positive("max_rollouts", max_rollouts)
        self.std = std

    def extra(self, successes: np.ndarray, n: int) -> np.ndarray:
        """0 from half of ``n`` on; no success counts as half a one."""
        k = np.maximum(np.asarray(successes, np.float64), 0.5)
        k = np.minimum(k, n / 2)
        # One division and at most one root: whole numbers stay whole, so that they are not rounded up.
        total = np.sqrt(n**4 / (4 * k * (n - k))) if self.std else n**3 / (4 * k * (n - k))
        return np.clip(np.ceil(total).astype(np.int64) - n, 0, self.cap(n))

    def cap(self, n: int) -> int:
        """``max_rollouts - n``."""
        return max(self.max_rollouts - n, 0)


class HardnessWeighted(EqualTreatment):
    """As many as make the sum of absolute advantages ``2 (1 - u)`` times that of a prompt at 1/2 (HW).

    ``n / (2 u)`` in all, or ``n sqrt((1 - u) / u)`` with ``std``, rounded up. With ``u`` known, the gradient is that
    of ``log u``.

    Args:
        max_rollouts: Of a prompt, the first ones among them.
        std: For advantages that are divided by their standard deviation.

    Raises:
        ValueError: If ``max_rollouts`` is not a positive integer.

    Example:
        >>> HardnessWeighted(std=True).extra(np.arange(9), 8).tolist()
        [23, 14, 6, 3, 0, 0, 0, 0, 0]
    """

    def __init__(self, max_rollouts: int = 64, std: bool = False) -> None:
        super().__init__(max_rollouts, std)

    def extra(self, successes: np.ndarray, n: int) -> np.ndarray:
        """0 from half of ``n`` on; no success counts as half a one."""
        k = np.maximum(np.asarray(successes, np.float64), 0.5)
        k = np.minimum(k, n / 2)
        total = np.sqrt(n**2 * (n - k) / k) if self.std else n**2 / (2 * k)
        return np.clip(np.ceil(total).astype(np.int64) - n, 0, self.cap(n))


class Neyman:
    """As many as give an objective's gradient the least variance: in proportion to ``w sqrt(u (1 - u))``.

    Args:
        objective: The sum over prompts of ``"accuracy"``, whose weight ``w`` is 1, of its ``"logit"``,
            ``1 / (u (1 - u))``, or its ``"log"``, ``1 / u``.
        rollouts: Of a prompt on average, the first ones among them.
        max_rollouts: Of a prompt.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        objective: Literal["accuracy", "logit", "log"] = "log",
        rollouts: int = 16,
        max_rollouts: int = 64,
    ) -> None:
        if objective not in ("accuracy", "logit", "log"):
            raise ValueError(f"Argument `objective` must be 'accuracy', 'logit' or 'log', but got {objective!r}.")
        self.objective = objective
        self.rollouts = _positive("rollouts", rollouts)
        self.max_rollouts = _positive("max_rollouts", max_rollouts)

    def extra(self, successes: np.ndarray, n: int) -> np.ndarray:
        """What is missing to the proportion, of prompts that have too few; sure ones count as half a success off."""
        k = np.clip(np.asarray(successes, np.float64), 0.5, n - 0.5)
        u = k / n
        power = {"accuracy": (0.5, 0.5), "logit": (-0.5, -0.5), "log": (-0.5, 0.5)}[self.objective]
        weights = u ** power[0] * (1 - u) ** power[1]
        return fill(weights, np.full(len(u), n), np.full(len(u), self.max_rollouts), self.rollouts * len(u)) - n

    def cap(self, n: int) -> int:
        """``max_rollouts - n``."""
        return max(self.max_rollouts - n, 0)


def fill(weights: np.ndarray, least: np.ndarray, most: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers in proportion to weights, within bounds, of a given sum: int64 ``[P]``.

    The sum is ``total`` where the bounds allow, else the nearest that they allow; where the weight is 0 it is the
    lower bound. Rounded by largest remainder, the first of equals first.

    Args:
        weights: ``[P]``, >= 0 and finite.
        least: int64 ``[P]``.
        most: int64 ``[P]``.
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
    at = [np.clip(corners[i] * weights, least, most) for i in (low, high)]
    sums = at[0].sum(), at[1].sum()
    share = (total - sums[0]) / (sums[1] - sums[0]) if sums[1] > sums[0] else 0.0
    ideal = at[0] + min(max(share, 0.0), 1.0) * (at[1] - at[0])
    whole = np.clip(np.floor(ideal + 1e-9).astype(np.int64), least, most)
    missing = total - int(whole.sum())
    if missing > 0:
        order = np.argsort(-np.where(whole < most, ideal - whole, -np.inf), kind="stable")
        whole[order[:missing]] += 1
    return whole


def plan(schedule: Schedule, successes: np.ndarray, n: int, budget: int | None = None) -> np.ndarray:
    """The rollouts to add to each prompt: int64 ``[P]``.

    Args:
        schedule: Says how many.
        successes: ``[P]``, sum of the rewards of the first rollouts of each prompt, in [0, n].
        n: Number of these.
        budget: All rollouts together, the first ones among them. Then additions are in proportion to the schedule's,
            within its cap, and their sum is what is left of the budget where any is asked for. None for the
            schedule's own.

    Raises:
        ValueError: If ``n`` is no positive integer, a reward is out of range, or the budget does not cover the first
            rollouts.
    """
    n = _positive("n", n)
    successes = np.asarray(successes, np.float64)
    if successes.ndim != 1:
        raise ValueError(f"Argument `successes` must be [P], but got {list(successes.shape)}.")
    if not ((successes >= 0) & (successes <= n)).all():
        wrong = successes[~((successes >= 0) & (successes <= n))][0]
        raise ValueError(f"Rewards of {n} rollouts must sum to [0, {n}], but sum to {wrong}.")
    extra = schedule.extra(successes, n)
    if budget is None:
        return extra
    left = check_budget(budget, n, len(successes)) - n * len(successes)
    return fill(extra, np.zeros_like(extra), np.full_like(extra, schedule.cap(n)), left)


def check_budget(budget: int, n: int, prompts: int) -> int:
    """A budget that covers the first rollouts.

    Raises:
        ValueError: If it does not.
    """
    if not budget >= n * prompts:
        raise ValueError(
            f"Argument `budget` must be at least n * prompts, {n} * {prompts} = {n * prompts}, but got {budget!r}."
        )
    return budget


class DifficultyMemory:
    """What is known of each prompt's accuracy: a Beta posterior that forgets.

    Args:
        forgetting: What an observation still counts for after another update of its prompt, in [0, 1).

    Raises:
        ValueError: If ``forgetting`` is out of its range.

    Example:
        >>> memory = DifficultyMemory(forgetting=0.5)
        >>> memory.update([7], [6.0], 8)
        >>> memory.successes([3, 7], [4.0, 4.0], 8).tolist()
        [4.0, 4.666666666666667]
    """

    def __init__(self, forgetting: float = 0.5) -> None:
        if not 0 <= forgetting < 1:
            raise ValueError(f"Argument `forgetting` must be in [0, 1), but got {forgetting!r}.")
        self.forgetting = forgetting
        self.counts: dict[int, tuple[float, float]] = {}  # of a prompt: successes and rollouts

    def update(self, ids: Iterable[int], successes: Iterable[float], n: int) -> None:
        """Enter first rollouts, never the added ones: a prompt that began badly got more of them.

        Args:
            ids: Of prompts.
            successes: Sum of the rewards of each.
            n: Rollouts of each.

        Raises:
            ValueError: If a reward is out of range, upon which nothing is entered.
        """
        successes = list(successes)
        wrong = [seen for seen in successes if not 0 <= seen <= n]
        if wrong:
            raise ValueError(f"Rewards of {n} rollouts must sum to [0, {n}], but sum to {wrong[0]}.")
        for i, seen in zip(ids, successes, strict=True):
            k, of = self.counts.get(i, (0.0, 0.0))
            self.counts[i] = self.forgetting * (k + seen), self.forgetting * (of + n)

    def successes(self, ids: Iterable[int], successes: Iterable[float], n: int) -> np.ndarray:
        """The first rollouts' successes as they would be at the accuracy that memory and they tell: fp64 ``[P]``."""
        known = [(*self.counts.get(i, (0.0, 0.0)), seen) for i, seen in zip(ids, successes, strict=True)]
        return np.array([min(n * (k + seen) / (of + n), n) for k, of, seen in known])  # rounding may exceed n


def _positive(name: str, value: Any) -> int:
    if not (hasattr(value, "__index__") and 1 <= value < 2**31):
        raise ValueError(f"Argument `{name}` must be an integer >= 1, but got {value!r}.")
    return int(value)
