"""Statistics of comparisons between training methods. Needs SciPy, from the ``[recipes]`` extra."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from curation.checks import check_choice, check_number


def paired_interval(
    differences: Sequence[float], confidence: float = 0.95, resolution: float = 0.0
) -> tuple[float, float, float]:
    """Mean of paired differences with its Student t interval: mean, lower end, upper end.

    Differences that are all equal say nothing about their spread, as happens with few seeds and a coarse metric (one
    image more of 256 in both): their interval is ``(-inf, inf)``. A t interval of no width would leave zero out in up
    to 12 % of all comparisons of two identical arms with two seeds.

    Args:
        differences: One per seed, a method's result minus the baseline's with the same seed; at least two.
        confidence: Confidence level of the interval, in (0, 1).
        resolution: Differences that are no further apart than this, or than 1e-9 of their mean, are equal.

    Raises:
        ValueError: If there are fewer than two differences, one is not finite, or ``confidence`` or ``resolution`` is
            out of its range.

    Example:
        >>> [round(x, 3) for x in paired_interval([1.0, 2.0, 3.0])]
        [2.0, -0.484, 4.484]
        >>> paired_interval([0.5, 0.5])
        (0.5, -inf, inf)
    """
    from scipy import stats

    check_number("confidence", confidence, "(0, 1)")
    check_number("resolution", resolution, "[0, inf)")
    if len(differences) < 2 or not np.isfinite(differences).all():
        raise ValueError(f"Argument `differences` must be at least two finite numbers, but got {differences!r}.")
    mean = float(np.mean(differences))
    if np.ptp(differences) <= max(resolution, 1e-9 * abs(mean)):
        return mean, -math.inf, math.inf
    half = float(stats.t.ppf((1 + confidence) / 2, len(differences) - 1) * stats.sem(differences))
    return mean, mean - half, mean + half


def time_to_target(
    times: Sequence[float], values: Sequence[float], target: float, mode: Literal["min", "max"]
) -> float:
    """Time of the first evaluation that reaches the target; infinite if none does (arXiv 2306.07179, section 4).

    Args:
        times: Times of the evaluations, rising; any unit.
        values: Values of the metric at these times; NaN reaches no target.
        target: Value to reach or surpass.
        mode: ``"min"`` if smaller values are better, ``"max"`` if larger values are.

    Raises:
        ValueError: If ``mode`` or ``target`` is something else, or there is not one value for every time.

    Example:
        >>> time_to_target([1, 2, 3], [0.9, 0.5, 0.4], 0.5, "min"), time_to_target([1, 2], [0.1, 0.2], 0.5, "max")
        (2.0, inf)
    """
    check_choice("mode", mode, ("min", "max"))
    check_number("target", target, "[-inf, inf]")
    if len(times) != len(values):
        raise ValueError(f"Argument `values` must be one for each of {len(times)} times, but got {len(values)}.")
    for time, value in zip(times, values, strict=True):
        if value <= target if mode == "min" else value >= target:
            return float(time)
    return float("inf")


def performance_profile(times: Mapping[str, Mapping[str, float]], ratios: Sequence[float]) -> dict[str, list[float]]:
    """Fraction of the workloads that a method solves within a multiple of the fastest method's time.

    Dolan and More's profile, as in arXiv 2306.07179, section 4.

    Args:
        times: Time to the target by workload and method, infinite for a miss; every workload has the same methods.
        ratios: Multiples of the fastest time, each >= 1.

    Returns:
        For each method one fraction per ratio, in [0, 1]. A workload that no method solves counts for none.

    Raises:
        ValueError: If there is no workload, the methods differ, or a ratio is below 1.

    Example:
        >>> performance_profile({"a": {"x": 1.0, "y": 2.0}, "b": {"x": 3.0, "y": float("inf")}}, [1, 2])
        {'x': [1.0, 1.0], 'y': [0.0, 0.5]}
    """
    workloads = list(times.values())
    if not workloads or any(w.keys() != workloads[0].keys() for w in workloads):
        raise ValueError("Argument `times` must hold the same methods for at least one workload.")
    if any(not ratio >= 1 for ratio in ratios):
        raise ValueError(f"Argument `ratios` must be >= 1, but got {list(ratios)}.")
    best = [min(w.values()) for w in workloads]
    return {
        method: [
            sum(w[method] <= ratio * b and math.isfinite(b) for w, b in zip(workloads, best, strict=True)) / len(best)
            for ratio in ratios
        ]
        for method in workloads[0]
    }
