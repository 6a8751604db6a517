"""What a schedule will cost, and how often it will learn nothing, before anything is trained."""

from dataclasses import dataclass
from math import comb

import numpy as np

from curation.rollouts.allocation import EqualTreatment, Schedule, Uniform, plan


@dataclass(frozen=True)
class Forecast:
    """Of a schedule, means over prompts.

    Attributes:
        rollouts: Of a prompt.
        all_wrong: Chance that no rollout of a prompt is right.
        all_right: That all are.
    """

    rollouts: float
    all_wrong: float
    all_right: float


def forecast(schedule: Schedule | None, accuracy: np.ndarray, n: int, budget: int | None = None) -> Forecast:
    """What a schedule is expected to do with prompts of known accuracy.

    Exact, over every count of successes, where what a prompt gets depends on its own: ``p^n`` and ``(1 - p)^n`` with
    no additions. With a budget, or another schedule than the paper's, it is the mean of 20 draws.

    Args:
        schedule: None for ``n`` each.
        accuracy: ``[P]`` in [0, 1].
        n: First rollouts.
        budget: As in :func:`~curation.rollouts.allocation.plan`.

    Example:
        >>> forecast(None, np.array([0.5, 1.0]), 2)
        Forecast(rollouts=2.0, all_wrong=0.125, all_right=0.625)
    """
    p = np.asarray(accuracy, np.float64)
    k = np.arange(n + 1)
    chances = np.array([comb(n, int(i)) for i in k]) * p[:, None] ** k * (1 - p[:, None]) ** (n - k)
    if schedule is None or (budget is None and isinstance(schedule, (Uniform, EqualTreatment))):
        extra = np.zeros(n + 1) if schedule is None else schedule.extra(k.astype(np.float64), n)
        rollouts = n + chances @ extra
        none, every = chances[:, 0] * (1 - p) ** extra[0], chances[:, n] * p ** extra[n]
        return Forecast(float(rollouts.mean()), float(none.mean()), float(every.mean()))
    draw, parts = np.random.default_rng(0), []
    for _ in range(20):
        seen = draw.binomial(n, p)
        extra = plan(schedule, seen, n, budget)
        none, every = (seen == 0) * (1 - p) ** extra, (seen == n) * p**extra
        parts.append(((n + extra).mean(), none.mean(), every.mean()))
    return Forecast(*(float(v) for v in np.mean(parts, axis=0)))


def accuracies(successes: np.ndarray, n: int) -> np.ndarray:
    """Accuracies of prompts from a few rollouts each: the posterior means of a Beta(1/2, 1/2) prior, fp64 ``[P]``."""
    return (np.asarray(successes, np.float64) + 0.5) / (n + 1)
