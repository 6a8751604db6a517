"""The pictures of a comparison: learning curves, paired differences and performance profiles."""

import math
from typing import Any

import numpy as np

from curation.evaluation.statistics import performance_profile
from curation.recipes.compare.summary import BASE
from curation.recipes.compare.sweep_picture import draw_sweep
from curation.recipes.compare.verdict import number

FAR = 4  # times as far as any other arm

AXES = {
    "steps": "optimizer steps",
    "samples": "samples trained on",
    "epochs": "samples trained on",
    "flops": "FLOPs, scoring included",
    "seconds": "training seconds, selection included",
}


def axis(run: dict[str, Any], unit: str) -> list[float]:
    """Positions of the evaluations of a run, in steps, samples (of epochs, too), flops or seconds."""
    if unit == "flops":
        return [point["step"] * run["flops_per_step"] for point in run["points"]]
    return [
        point[{"steps": "step", "samples": "samples_trained", "epochs": "samples_trained"}.get(unit, unit)]
        for point in run["points"]
    ]


def draw(content: dict[str, Any]) -> Any:
    """Learning curves and paired differences of every workload, and the performance profile of several.

    Args:
        content: The content of a report.

    Returns:
        A ``matplotlib.figure.Figure``.
    """
    from matplotlib import rc_context

    with rc_context({"text.parse_math": False}):  # names are shown as they are
        return _draw(content)


def _draw(content: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    workloads = content["workloads"]
    profiled = len(workloads) > 1 and len({tuple(sorted(workload["arms"])) for workload in workloads}) == 1
    count = len(workloads) + sum("sweep" in workload for workload in workloads) + profiled
    figure = Figure(figsize=(14, 4.3 * count), layout="constrained")
    grid = figure.subplots(count, 3, squeeze=False)
    rows = iter(grid)
    named: dict[str, Any] = {}
    for workload in workloads:
        left, middle, right = next(rows)
        unit = workload["budget"]["unit"]
        _draw_curves(left, workload, unit)
        _draw_curves(middle, workload, "samples" if unit == "seconds" else "seconds")
        left.set_title(workload["name"], loc="left")
        named |= dict(zip(*reversed(left.get_legend_handles_labels()), strict=True))
        _draw_differences(right, workload)
        if "sweep" in workload:
            draw_sweep(next(rows), workload, colours(workload["arms"]))
    if profiled:
        _draw_profile(grid[-1][0], workloads)
        for axes in grid[-1][1:]:
            axes.axis("off")
    if named:  # above everything, where no line is
        figure.legend(list(named.values()), list(named), loc="outside upper center", ncols=8, frameon=False)
    return figure


def far_off(workload: dict[str, Any]) -> list[str]:
    """Arms that are so much worse than all others that a common axis would show nothing of these.

    They are worse than the baseline by more than four times as far as any end of the other arms' intervals, and at
    most half of the arms.
    """
    sign = -1 if workload["mode"] == "min" else 1
    summary = {arm: workload["summary"][arm]["difference"] for arm in workload["arms"]}
    ends = {arm: max(map(abs, known)) for arm, known in summary.items() if known and all(map(math.isfinite, known))}
    order = sorted(ends, key=lambda arm: sign * summary[arm][0])  # the worst first
    for count in range(len(order) // 2, 0, -1):
        worse, rest = order[:count], order[count:]
        if min(-sign * summary[arm][0] for arm in worse) > FAR * max(ends[arm] for arm in rest):
            return worse
    return []


def colours(arms: list[str]) -> dict[str, Any]:
    """The colours of arms: grey and black for the baselines."""
    baselines = {"uniform": "black", "full": "0.6"}
    methods = [arm for arm in arms if arm not in baselines]
    return {**baselines, **{arm: f"C{i}" for i, arm in enumerate(methods)}}


def _draw_curves(axes: Any, workload: dict[str, Any], unit: str) -> None:
    """The metric of every arm: the mean over seeds, in a band from the smallest to the largest."""
    of_arm, far = colours(workload["arms"]), far_off(workload)
    for arm in workload["arms"]:
        runs = [run for run in workload["runs"] if run["arm"] == arm and not run["error"]]
        if runs:
            _draw_curve(axes, runs, unit, arm, of_arm[arm])
    axes.set(xlabel=AXES[unit], ylabel=workload["metric"])
    axes.grid(alpha=0.3)
    if far:
        near = [line.get_ydata() for line in axes.lines if line.get_label() not in far]
        values = np.concatenate([np.asarray(y, float) for y in near])
        low, high = np.nanmin(values), np.nanmax(values)
        axes.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))
        axes.text(0.98, 0.02, f"axis cut: {', '.join(far)} far off", transform=axes.transAxes, ha="right", fontsize=8)


def _draw_curve(axes: Any, runs: list[dict[str, Any]], unit: str, arm: str, colour: Any) -> None:
    curves = [(axis(run, unit), [point["value"] for point in run["points"]]) for run in runs]
    low = max(x[0] for x, _ in curves)  # all have begun; a seed that has ended keeps its last value
    places = np.unique([low, *(p for x, _ in curves for p in x if p >= low)])
    values = np.array([np.interp(places, x, y) for x, y in curves])
    marker = "o" if len(places) < 3 else None
    axes.plot(places, values.mean(0), color=colour, label=arm, marker=marker, markersize=4)
    axes.fill_between(places, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)


def _draw_differences(axes: Any, workload: dict[str, Any]) -> None:
    """The paired difference of every arm to the baseline, with its interval."""
    of_arm, is_min = colours(workload["arms"]), workload["mode"] == "min"
    arms = [arm for arm in workload["arms"] if workload["summary"][arm]["difference"]]
    far = [arm for arm in far_off(workload) if arm in arms]
    for y, arm in enumerate(reversed(arms)):
        mean, low, high = workload["summary"][arm]["difference"]
        if arm in far:
            place = {"xycoords": ("axes fraction", "data"), "va": "center", "ha": "right" if mean > 0 else "left"}
            text = f"{number(mean)} →" if mean > 0 else f"← {number(mean)}"
            axes.annotate(text, (0.98 if mean > 0 else 0.02, y), color=of_arm[arm], **place)
            continue
        ends = [[mean - low], [high - mean]] if math.isfinite(high - low) else None
        axes.errorbar(mean, y, xerr=ends, fmt="o", capsize=4, color=of_arm[arm])
    if not arms:
        axes.text(0, 0, "an interval needs two seeds", ha="center")
    axes.axvline(0, color="black", linewidth=1)
    axes.set(
        yticks=range(len(arms)), yticklabels=arms[::-1], xlabel=f"{workload['metric']} minus {BASE}, paired, 95 %",
        title="better ←" if is_min else "→ better", ylim=(-0.6, max(0.6, len(arms) - 0.4)),
    )  # fmt: skip
    axes.locator_params(axis="x", nbins=5)
    axes.grid(axis="x", alpha=0.3)


def _draw_profile(axes: Any, workloads: list[dict[str, Any]]) -> None:
    """Dolan and More's performance profile: the share of workloads that an arm solves within a multiple of a time."""
    ratios = np.linspace(1, 4, 301).tolist()
    of_arm = colours(workloads[0]["arms"])
    times = {w["name"]: {arm: w["summary"][arm]["time_to_target"] for arm in w["arms"]} for w in workloads}
    for arm, shares in performance_profile(times, ratios).items():
        axes.step(ratios, shares, where="post", label=arm, color=of_arm[arm])
    axes.set(xlabel="times the fastest arm's time to the target", ylabel="share of workloads", ylim=(-0.03, 1.03))
    axes.set_title("performance profile", loc="left")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
