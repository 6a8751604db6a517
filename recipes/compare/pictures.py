"""The pictures of a comparison: learning curves, paired differences and performance profiles."""

import io
from typing import Any

import numpy as np

from curation.evaluation.statistics import performance_profile

BASE = "uniform"
AXES = {
    "steps": "optimizer steps",
    "samples": "samples trained on",
    "flops": "floating-point operations",
    "seconds": "training seconds, selection included",
}


def axis(run: dict[str, Any], unit: str) -> list[float]:
    """Where the evaluations of a run lie: in steps, samples, flops or seconds."""
    if unit == "flops":
        return [point["step"] * run["flops_per_step"] for point in run["points"]]
    return [point[{"steps": "step", "samples": "samples_trained"}.get(unit, unit)] for point in run["points"]]


def draw(content: dict[str, Any]) -> Any:
    """Learning curves with bands from the smallest to the largest of the seeds, and the paired differences."""
    from matplotlib.figure import Figure

    workloads = content["workloads"]
    profiled = len(workloads) > 1 and len({tuple(sorted(w["arms"])) for w in workloads}) == 1
    rows = len(workloads) + profiled
    figure = Figure(figsize=(14, 4.3 * rows), layout="constrained")
    grid = figure.subplots(rows, 3, squeeze=False)
    for w, (left, middle, right) in zip(workloads, grid, strict=False):
        unit = w["budget"]["unit"]
        colours = _colours(w["arms"])
        for axes, x in ((left, unit), (middle, "samples" if unit == "seconds" else "seconds")):
            for arm in w["arms"]:
                _curve(
                    axes, [run for run in w["runs"] if run["arm"] == arm and not run["error"]], x, arm, colours[arm]
                )
            axes.set(xlabel=AXES[x], ylabel=w["metric"])
            axes.grid(alpha=0.3)
        left.set_title(w["name"], loc="left")
        if left.lines:
            left.legend(frameon=False, fontsize=8)
        others = [arm for arm in w["arms"] if w["summary"][arm]["difference"]]
        for y, arm in enumerate(reversed(others)):
            mean, low, high = w["summary"][arm]["difference"]
            right.errorbar(mean, y, xerr=[[mean - low], [high - mean]], fmt="o", capsize=4, color=colours[arm])
        if not others:
            right.text(0, 0, "an interval needs two seeds", ha="center")
        right.axvline(0, color="black", linewidth=1)
        right.set(
            yticks=range(len(others)), yticklabels=others[::-1], xlabel=f"{w['metric']} minus {BASE}, paired, 95 %",
            title="better ←" if w["mode"] == "min" else "→ better", ylim=(-0.6, max(0.6, len(others) - 0.4)),
        )  # fmt: skip
        right.locator_params(axis="x", nbins=5)
        right.grid(axis="x", alpha=0.3)
    if profiled:
        _profile(grid[-1][0], workloads)
        for axes in grid[-1][1:]:
            axes.axis("off")
    return figure


def _colours(arms: list[str]) -> dict[str, Any]:
    fixed = {"uniform": "black", "full": "0.6"}
    others = [arm for arm in arms if arm not in fixed]
    return {**fixed, **{arm: f"C{i}" for i, arm in enumerate(others)}}


def _curve(axes: Any, runs: list[dict[str, Any]], unit: str, arm: str, colour: Any) -> None:
    curves = [(axis(run, unit), [point["value"] for point in run["points"]]) for run in runs]
    if not curves:
        return
    low = max(x[0] for x, _ in curves)  # all have begun; a seed that has ended keeps its last value
    places = np.unique([low, *(p for x, _ in curves for p in x if p >= low)])
    values = np.array([np.interp(places, x, y) for x, y in curves])
    marker = "o" if len(places) < 3 else None
    axes.plot(places, values.mean(0), color=colour, label=arm, marker=marker, markersize=4)
    axes.fill_between(places, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)


def _profile(axes: Any, workloads: list[dict[str, Any]]) -> None:
    ratios = np.linspace(1, 4, 301).tolist()
    colours = _colours(workloads[0]["arms"])
    times = {w["name"]: {arm: w["summary"][arm]["time_to_target"] for arm in w["arms"]} for w in workloads}
    for arm, shares in performance_profile(times, ratios).items():
        axes.step(ratios, shares, where="post", label=arm, color=colours[arm])
    axes.set(xlabel="times the fastest arm's time to the target", ylabel="share of workloads", ylim=(-0.03, 1.03))
    axes.set_title("performance profile", loc="left")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)


def picture(figure: Any, kind: str) -> bytes:
    """A figure whose bytes depend on nothing but what it shows."""
    from matplotlib import rc_context

    file = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "curation"}):
        figure.savefig(file, format=kind, dpi=120, metadata=metadata)
    return file.getvalue()
