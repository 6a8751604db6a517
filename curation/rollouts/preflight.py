"""What a schedule will cost, and how often a step will teach nothing, estimated before training."""

from dataclasses import dataclass
from math import comb

import numpy as np

from curation.checks import check_integer
from curation.rollouts.allocation import EqualTreatment, HardnessWeighted, Schedule, Uniform, plan


@dataclass(frozen=True)
class Forecast:
    """Expectations of a schedule, means over prompts.

    Attributes:
        rollouts: Number of rollouts of a prompt.
        all_wrong: Probability that no rollout of a prompt succeeds.
        all_right: Probability that every rollout of a prompt succeeds.
    """

    rollouts: float
    all_wrong: float
    all_right: float


def forecast(schedule: Schedule | None, accuracy: np.ndarray, n: int, budget: int | None = None) -> Forecast:
    """The expectations of a schedule on prompts of known accuracy.

    Exact, over every number of successes, for no schedule and for the paper's schedules without a budget: a prompt
    of accuracy ``p`` without additions has ``(1 - p)^n`` all wrong and ``p^n`` all right. Otherwise the mean of 20
    simulated steps.

    Args:
        schedule: The schedule; None for ``n`` rollouts of every prompt.
        accuracy: ``[P]`` in [0, 1].
        n: Number of first rollouts of every prompt.
        budget: Number of all rollouts of a step, as in :func:`~curation.rollouts.allocation.plan`; None for the
            numbers of the schedule.

    Raises:
        ValueError: If ``n`` is not a positive integer, or the budget does not cover the first rollouts.

    Example:
        >>> forecast(None, np.array([0.5, 1.0]), 2)
        Forecast(rollouts=2.0, all_wrong=0.125, all_right=0.625)
    """
    check_integer("n", n, 1)
    p = np.asarray(accuracy, np.float64)
    k = np.arange(n + 1)
    probability = np.array([comb(n, int(i)) for i in k]) * p[:, None] ** k * (1 - p[:, None]) ** (n - k)
    if schedule is None or (budget is None and isinstance(schedule, (Uniform, EqualTreatment))):
        extra = np.zeros(n + 1) if schedule is None else schedule.extra(k.astype(np.float64), n)
        rollouts = n + probability @ extra
        all_wrong, all_right = probability[:, 0] * (1 - p) ** extra[0], probability[:, n] * p ** extra[n]
        return Forecast(float(rollouts.mean()), float(all_wrong.mean()), float(all_right.mean()))
    generator, steps = np.random.default_rng(0), []
    for _ in range(20):
        successes = generator.binomial(n, p)
        extra = plan(schedule, successes, n, budget)
        all_wrong, all_right = (successes == 0) * (1 - p) ** extra, (successes == n) * p**extra
        steps.append(((n + extra).mean(), all_wrong.mean(), all_right.mean()))
    return Forecast(*(float(mean) for mean in np.mean(steps, axis=0)))


def compare_schedules(
    schedule: Schedule, accuracy: np.ndarray, n: int, budget: int | None = None
) -> dict[str, Forecast]:
    """The forecasts of the usual schedules without a budget, and as ``"this fit"`` that of one schedule with its own.

    Args:
        schedule: The schedule of the fit.
        accuracy: ``[P]`` in [0, 1].
        n: Number of first rollouts of every prompt.
        budget: Number of all rollouts of a step of the fit; None for the numbers of ``schedule``.

    Raises:
        ValueError: As :func:`forecast`.

    Example:
        >>> list(compare_schedules(Uniform(12), np.array([0.5]), 8))[:3]
        ['8 each', '16 each', 'equal treatment']
    """
    usual: dict[str, Schedule | None] = {
        f"{n} each": None,
        f"{2 * n} each": Uniform(2 * n),
        "equal treatment": EqualTreatment(),
        "equal treatment, std": EqualTreatment(std=True),
        "hardness weighted": HardnessWeighted(),
        "hardness weighted, std": HardnessWeighted(std=True),
    }
    forecasts = {name: forecast(candidate, accuracy, n) for name, candidate in usual.items()}
    return forecasts | {"this fit": forecast(schedule, accuracy, n, budget)}


def accuracies(successes: np.ndarray, n: int) -> np.ndarray:
    """The accuracy of each prompt, estimated from a few rollouts: fp64 ``[P]``.

    The posterior mean under a Beta(1/2, 1/2) prior, ``(k + 1/2) / (n + 1)``.

    Args:
        successes: ``[P]``, the sum of the rewards of each prompt's rollouts, in [0, n].
        n: Number of rollouts of every prompt.

    Raises:
        ValueError: If ``n`` is not a positive integer.
    """
    check_integer("n", n, 1)
    return (np.asarray(successes, np.float64) + 0.5) / (n + 1)
