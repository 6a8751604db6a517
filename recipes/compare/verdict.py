"""The sentences of a report: the verdict on each arm, and what a reader must know to read the figures right."""

import math
from typing import Any

from curation.recipes.compare.summary import BASE, failures, time_ratio


def verdict(workload: dict[str, Any], arm: str) -> tuple[str, str]:
    """``"won"``, ``"lost"``, ``"even"`` or ``"failed"``, and the sentence.

    Args:
        workload: A workload with its summary.
        arm: Name of the arm.
    """
    reasons = ", ".join(filter(None, (failures(workload, name) for name in dict.fromkeys((arm, BASE)))))
    if reasons or workload["summary"][arm]["difference"] is None:
        return "failed" if reasons else "even", f"{arm}: {_no_verdict(workload, arm, reasons)}"
    kind, text = _by_interval(workload, arm)
    return kind, f"{arm}: {text}{_beside_full(workload, arm)}{_time(workload, arm)}."


def verdicts(workload: dict[str, Any]) -> list[tuple[str, str]]:
    """The verdict on every arm; on the baseline only if a run of it failed."""
    return [verdict(workload, arm) for arm in workload["arms"] if arm != BASE or failures(workload, BASE)]


def _no_verdict(workload: dict[str, Any], arm: str, reasons: str) -> str:
    """Why there is no verdict, and what is known all the same."""
    summary = workload["summary"][arm]
    text = f"no verdict, {reasons or 'one seed says nothing about a difference'}."
    known = "" if math.isnan(summary["final"]) else f" {workload['metric']} {number(summary['final'])}"
    if summary["difference"] is not None:
        known += f", minus {BASE} {interval(summary['difference'])} over the {summary['pairs']} pairs that are left"
    return text + (f"{known}." if known else "")


def _by_interval(workload: dict[str, Any], arm: str) -> tuple[str, str]:
    """What the interval of the differences says: it decides unless it crosses zero."""
    summary, metric = workload["summary"][arm], workload["metric"]
    mean, low, high = summary["difference"]
    difference = f"{interval(summary['difference'])}, {summary['pairs']} paired seeds"
    if math.isinf(high - low):
        return "even", (
            f"no detectable difference to {BASE} in {metric}: {mean:+.4g} in each of {summary['pairs']} paired "
            "seeds, and equal differences say nothing about their spread"
        )
    if low <= 0 <= high:
        return "even", f"no detectable difference to {BASE} in {metric}: {difference}"
    kind = "won" if (mean > 0) == (workload["mode"] == "max") else "lost"
    return kind, f"{kind} against {BASE}: {metric} {difference}"


def _beside_full(workload: dict[str, Any], arm: str) -> str:
    difference = workload["summary"][arm]["minus_full"]
    return "" if difference is None else f"; minus full {interval(difference)}"


def _time(workload: dict[str, Any], arm: str) -> str:
    ratio, target = time_ratio(workload, arm), number(workload["summary"]["target"])
    if ratio == math.inf:
        return f". It does not reach {target} in most seeds"
    if ratio == 0:
        return f". It reaches {target}, {BASE} does not in most seeds"
    return f". Time to {target}: {ratio:.2f} times that of {BASE}" if math.isfinite(ratio) else ""


def notes(workload: dict[str, Any]) -> list[str]:
    """What a reader must know to read the figures right."""
    unit, amount = workload["budget"]["unit"], workload["budget"]["amount"]
    seeds = len({run["seed"] for run in workload["runs"]})
    compared = sum(workload["summary"][arm]["difference"] is not None for arm in workload["arms"])
    places = sorted({f"{run['device']}, torch {run['torch']}" for run in workload["runs"] if run["device"]})
    other = " (short: as many samples as uniform)" if "short" in workload["arms"] else ""
    estimated = ", by the cost of an arm's first steps" if unit in ("samples", "flops") else ""
    sources = ", ".join(f"{name}={value}" for name, value in workload.get("sources", {}).items())
    return [
        *([f"Data and models: {sources}."] if sources else []),
        f"Every run had {number(amount)} {unit}{other}{estimated}; {seeds} seed{'s' * (seeds > 1)}; "
        f"{'; '.join(places)}; {duration(workload['summary']['hours'])} of runs, {workload['jobs']} side by side.",
        "Intervals are 95 % Student t intervals of differences between runs with the same seed, not corrected for "
        f"{compared} comparisons. What lies outside an interval is ruled out, at that confidence.",
        f"The target, {number(workload['summary']['target'])}, is "
        + (f"what {BASE} reaches with every seed" if workload["target"] is None else "the one asked for")
        + "; the time is the median over seeds of the first evaluation that reaches it, so it is as coarse as they "
        "are far apart.",
        "FLOPs: matrix products, convolutions and attention, counted by torch in the first steps of each arm.",
        *(["Seconds are those of runs beside each other."] if workload["jobs"] > 1 else []),
    ]


def number(value: float) -> str:
    """Four digits, with k, M, G, T or P from ten thousand on.

    Example:
        >>> number(0.12345), number(2.5e12), number(float("inf"))
        ('0.1235', '2.5 T', 'never')
    """
    if not math.isfinite(value):
        return "never" if value == math.inf else "-"
    for power, name in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(value) >= 10 ** (power + (1 if power == 3 else 0)):
            return f"{value / 10**power:.4g} {name}"
    return f"{value:.4g}"


def interval(difference: tuple[float, float, float]) -> str:
    """A mean with the ends of its interval, as exact as the interval is wide.

    Example:
        >>> interval((0.02, -0.001, 0.041))
        '+0.020 [-0.001, +0.041]'
        >>> interval((0.004, -math.inf, math.inf))
        '+0.004 [-inf, +inf]'
    """
    mean, low, high = difference
    width = (high - low) / 2
    if math.isinf(width):
        return f"{mean:+.4g} [-inf, +inf]"
    digits = min(max(0, 1 - math.floor(math.log10(width))), 8)
    return f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def duration(hours: float) -> str:
    """Hours, or minutes where it is less than an hour."""
    return f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.0f} minutes"
