"""The statistics of a comparison between training methods. Needs SciPy, of the ``[recipes]`` extra."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np


def paired_interval(differences: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean of paired differences with its Student t interval: mean, lower end, upper end.

    Args:
        differences: One per seed, a method's result minus the baseline's with the same seed; at least two.
        confidence: Of the interval, in (0, 1).

    Raises:
        ValueError: If there are fewer than two differences, one is not finite, or ``confidence`` is outside (0, 1).

    Example:
        >>> [round(x, 3) for x in paired_interval([1.0, 2.0, 3.0])]
        [2.0, -0.484, 4.484]
    """
    from scipy import stats

    if not 0 < confidence < 1:
        raise ValueError(f"Argument `confidence` must be in (0, 1), but got {confidence!r}.")
    if len(differences) < 2 or not np.isfinite(differences).all():
        raise ValueError(f"Argument `differences` must be at least two finite numbers, but got {differences!r}.")
    mean = float(np.mean(differences))
    half = float(stats.t.ppf((1 + confidence) / 2, len(differences) - 1) * stats.sem(differences))
    return mean, mean - half, mean + half


def time_to_target(
    times: Sequence[float], values: Sequence[float], target: float, mode: Literal["min", "max"]
) -> float:
    """Time of the first evaluation that reaches the target; infinite if none does (arXiv 2306.07179, section 4).

    Args:
        times: Of the evaluations, rising; any unit.
        values: The metric at each; NaN reaches no target.
        target: To reach or surpass.
        mode: Whether smaller or larger is better.

    Raises:
        ValueError: If ``mode`` is neither, or there is not one value for every time.

    Example:
        >>> time_to_target([1, 2, 3], [0.9, 0.5, 0.4], 0.5, "min"), time_to_target([1, 2], [0.1, 0.2], 0.5, "max")
        (2.0, inf)
    """
    if mode not in ("min", "max"):
        raise ValueError(f"Argument `mode` must be 'min' or 'max', but got {mode!r}.")
    if len(times) != len(values):
        raise ValueError(f"Argument `values` must be one for each of {len(times)} times, but got {len(values)}.")
    for time, value in zip(times, values, strict=True):
        if value <= target if mode == "min" else value >= target:
            return float(time)
    return float("inf")


def performance_profile(times: Mapping[str, Mapping[str, float]], ratios: Sequence[float]) -> dict[str, list[float]]:
    """Share of the workloads that a method solves within a multiple of the fastest one's time.

    Dolan and More's profile, as in arXiv 2306.07179, section 4.

    Args:
        times: Workload, then method, then its time to the target, infinite for a miss; the same methods everywhere.
        ratios: Multiples of the fastest time, each >= 1.

    Returns:
        For each method one share per ratio, in [0, 1]. A workload that nobody solves counts for nobody.

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
