"""What follows from the runs of a comparison: differences between paired seeds, time to the target, and costs.

A *workload* here is an entry of ``report.json``: ``name``, ``metric``, ``mode``, ``budget``, ``arms``, ``runs``.
"""

import math
import statistics
from typing import Any

from curation.evaluation.statistics import paired_interval, time_to_target
from curation.recipes.compare.equal_quality import cost_ratios, equal_quality

BASE = "uniform"
COSTS = {"steps": "step", "samples_trained": "samples_trained", "samples_scored": "samples_scored",
         "seconds": "seconds"}  # fmt: skip


def build(command: str, workloads: list[dict[str, Any]]) -> dict[str, Any]:
    """The content of a report: the runs of every workload with what follows from them.

    Args:
        command: The command line that made the runs.
        workloads: The runs of each workload, and how they were made; each gets its ``summary``,
            and with a ``sweep`` its ``equal_quality`` and ``cost_ratio``.
    """
    for workload in workloads:
        for point in (point for run in workload["runs"] for point in run["points"]):
            point["value"] = math.nan if point["value"] is None else point["value"]
        workload["summary"] = summarise(workload)
        if "sweep" in workload:
            workload["equal_quality"] = equal_quality(workload)
            workload["cost_ratio"] = cost_ratios(workload)
    return {"command": command, "workloads": workloads}


def summarise(workload: dict[str, Any]) -> dict[str, Any]:
    """The target, the hours of all runs, and for every arm what :func:`summarise_arm` computes."""
    runs = {arm: {run["seed"]: run for run in workload["runs"] if run["arm"] == arm} for arm in workload["arms"]}
    finals = {arm: final_values(runs[arm]) for arm in runs}
    others = [run for run in workload.get("sweep", {"runs": []})["runs"] if run["share"] != 1]
    target = find_target(workload, [runs[BASE][seed] for seed in finals[BASE]])
    return {
        "target": target,
        "hours": sum(run["wall_seconds"] or 0 for run in [*workload["runs"], *others]) / 3600,
        **{arm: summarise_arm(arm, runs[arm], finals, target, workload["mode"]) for arm in runs},
    }


def summarise_arm(
    arm: str, runs: dict[int, dict[str, Any]], finals: dict[str, dict[int, float]], target: float, mode: Any
) -> dict[str, Any]:
    """The final metric of an arm, its paired differences, the time to the target, and the cost.

    Args:
        arm: Name of the arm.
        runs: Its runs by seed.
        finals: Final values of all arms by seed.
        target: Value of the metric for the time to a target.
        mode: ``"min"`` or ``"max"``.
    """
    values = finals[arm]
    to_base, to_full = (difference_interval(values, finals.get(name, {})) for name in (BASE, "full"))
    costs = mean_costs([runs[seed] for seed in values])
    return {
        "runs": len(runs),
        "failed": sum(run["error"] is not None for run in runs.values()),
        "diverged": sum(run["error"] is None and not math.isfinite(final_value(run)) for run in runs.values()),
        "final": statistics.mean(values.values()) if values else math.nan,
        "deviation": statistics.stdev(values.values()) if len(values) > 1 else math.nan,
        "pairs": len(paired_differences(values, finals[BASE])),
        "difference": to_base if arm != BASE else None,
        "minus_full": to_full if arm != "full" else None,
        "time_to_target": statistics.median(seconds_to_target(run, target, mode) for run in runs.values()),
        **costs,
        "flops": costs["steps"] * next(run["flops_per_step"] for run in runs.values()),
        "peak_memory": max(run["peak_memory"] or 0 for run in runs.values()),
    }


def final_value(run: dict[str, Any]) -> float:
    """The metric of the last weights; NaN if the run failed."""
    return math.nan if run["error"] else run["points"][-1]["value"]


def final_values(runs: dict[int, dict[str, Any]]) -> dict[int, float]:
    """Final values by seed, of the runs that neither failed nor diverged."""
    return {seed: final_value(run) for seed, run in runs.items() if math.isfinite(final_value(run))}


def find_target(workload: dict[str, Any], base_runs: list[dict[str, Any]]) -> float:
    """The target that was asked for, or the best value that the baseline reaches with every seed; NaN without one."""
    if workload["target"] is not None:
        return workload["target"]
    better, worse = (min, max) if workload["mode"] == "min" else (max, min)
    best = [better(p["value"] for p in run["points"] if math.isfinite(p["value"])) for run in base_runs]
    return worse(best, default=math.nan)


def seconds_to_target(run: dict[str, Any], target: float, mode: Any) -> float:
    """Training seconds to the target; infinite for a miss, and for a run that failed or diverged."""
    if not math.isfinite(final_value(run)) or math.isnan(target):
        return math.inf
    points = run["points"]
    return time_to_target([p["seconds"] for p in points], [p["value"] for p in points], target, mode)


def paired_differences(values: dict[int, float], base: dict[int, float]) -> list[float]:
    """Differences between two arms, a number for each seed that both have."""
    return [value - base[seed] for seed, value in values.items() if seed in base]


def difference_interval(values: dict[int, float], base: dict[int, float]) -> tuple[float, float, float] | None:
    """The interval of the differences between two arms; None with fewer than two pairs.

    Metrics are numbers of 32 bits, whose differences are equal up to rounding.
    """
    differences = paired_differences(values, base)
    largest = max(map(abs, [*values.values(), *base.values()]), default=0.0)
    return paired_interval(differences, resolution=2**-22 * largest) if len(differences) > 1 else None


def mean_costs(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Steps, samples and seconds at the last point, means over runs; NaN without a run."""
    last = [run["points"][-1] for run in runs]
    return {name: statistics.mean(point[key] for point in last) if last else math.nan for name, key in COSTS.items()}


def failures(workload: dict[str, Any], arm: str) -> str:
    """How many runs of an arm failed or diverged; empty if none did."""
    summary = workload["summary"][arm]
    return ", ".join(
        f"{summary[kind]} of {summary['runs']} runs of {arm} {kind}"
        for kind in ("failed", "diverged")
        if summary[kind]
    )


def time_ratio(workload: dict[str, Any], arm: str) -> float:
    """Median time to the target over that of ``uniform``; NaN where neither reaches it in most seeds."""
    time, base = (workload["summary"][name]["time_to_target"] for name in (arm, BASE))
    return math.nan if time == base == math.inf else time / base
