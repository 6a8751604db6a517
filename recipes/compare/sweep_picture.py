"""The row of a sweep in the picture of a comparison: quality against cost, and the cost ratios at equal quality."""

from typing import Any

import numpy as np

from curation.evaluation.cost_ratio import fit_curve
from curation.recipes.compare.equal_quality import READ, UNITS, number, swept_methods, table
from curation.recipes.compare.verdict import number as short

AXES = {"flops": "FLOPs of a run, scoring included", "seconds": "training seconds of a run, selection included"}
MARKERS = {"seconds": "o", "flops": "s"}


def draw_sweep(row: Any, workload: dict[str, Any], colours: dict[str, Any]) -> None:
    """Quality against FLOPs and against seconds, and the cost ratios.

    Args:
        row: Three axes.
        workload: A workload with its ``sweep`` and what follows from it.
        colours: Colours of the arms.
    """
    for axes, unit in zip(row, AXES, strict=False):
        _draw_quality(axes, workload, unit, colours)
    _draw_ratios(row[-1], workload, colours)
    row[0].set_title("cost at equal quality", loc="left")


def _draw_quality(axes: Any, workload: dict[str, Any], unit: str, colours: dict[str, Any]) -> None:
    """Every run as a dot, the fitted curves, the quality that is read, and an arrow from full's cost to the arm's."""
    sweep, metric = workload["sweep"], workload["metric"]
    found = workload["equal_quality"][metric]
    for arm in sweep["arms"]:
        costs, values = table(workload, arm, unit), table(workload, arm, metric)
        axes.scatter(costs, values, s=9, alpha=0.4, linewidths=0, color=colours[arm])
        x = np.log(np.where(costs > 0, costs, np.nan)).mean(0)
        drawn = np.isfinite(values).all() and np.isfinite(x).all() and (np.diff(x) > 0).all()
        inside = np.linspace(x[0], x[-1], 200) if drawn else np.array([np.nan])
        curve = fit_curve(np.exp(x), values.mean(0), sweep["metrics"][metric])(inside) if drawn else inside
        axes.plot(np.exp(inside), curve, color=colours[arm], label=arm)
    if np.isfinite(found["quality"]):
        axes.axhline(found["quality"], color="black", linewidth=0.8, linestyle="--")
    places = np.exp(np.log(table(workload, READ, unit)).mean(0))  # full's costs
    at = places[sweep["shares"].index(1)]
    for i, (arm, ratios) in enumerate(found["arms"].items()):
        ratio = ratios[unit]
        if not (found["plateau"] or ratio["reason"] or ratio["bound"]):
            _draw_arrow(axes, at, ratio["ratio"], found["quality"], colours[arm], i)
    if found["plateau"]:
        axes.text(0.98, 0.03, "plateau: a ratio is worth nothing", transform=axes.transAxes, ha="right")
    axes.set(xscale="log", xlabel=AXES[unit], ylabel=metric)
    apart = np.log(axes.get_xlim()[1] / axes.get_xlim()[0]) / 8
    ticks: list[float] = []
    for place in places[np.isfinite(places)]:
        if not ticks or np.log(place / ticks[-1]) > apart:
            ticks.append(float(place))
    _set_ticks(axes, ticks, [short(float(f"{place:.3g}")) for place in ticks])
    axes.grid(alpha=0.3)


def _set_ticks(axes: Any, places: Any, labels: list[str]) -> None:
    """Ticks at some places of a logarithmic axis, and no others."""
    axes.set_xticks(places, labels)
    axes.set_xticks([], minor=True)


def _draw_arrow(axes: Any, at: float, ratio: float, quality: float, colour: Any, i: int) -> None:
    """An arrow along the line of equal quality, with the ratio at its head."""
    style = {"arrowstyle": "-|>", "color": colour, "shrinkA": 0, "shrinkB": 0, "linewidth": 1.8}
    axes.annotate("", (at * ratio, quality), (at, quality), arrowprops=style)
    place = {"xytext": (0, 6 + 11 * i), "textcoords": "offset points", "ha": "right", "color": colour, "fontsize": 9}
    axes.annotate(number(ratio), (at * ratio, quality), **place)


def _draw_ratios(axes: Any, workload: dict[str, Any], colours: dict[str, Any]) -> None:
    """The cost ratio of every arm with its interval, in time and in FLOPs; a bound is an arrow without one."""
    found = workload["equal_quality"][workload["metric"]]
    arms = swept_methods(workload)
    shown = [
        (len(arms) - 1 - y + 0.12 - 0.24 * j, arm, unit, found["arms"][arm][unit])
        for y, arm in enumerate(arms)
        for j, unit in enumerate(UNITS)
        if not (found["plateau"] or found["arms"][arm][unit]["reason"])
    ]
    ends = [r[k] for _, _, _, r in shown for k in ("ratio", "low", "high") if 0 < r[k] < np.inf]
    low, high = min([0.8, *ends]) / 1.1, max([1.25, *ends]) * 1.1
    for y, arm, unit, ratio in shown:
        marker = ratio["bound"] or MARKERS[unit]
        axes.plot(
            ratio["ratio"], y, marker=marker, color=colours[arm], fillstyle="full" if unit == "seconds" else "none"
        )
        axes.hlines(y, max(ratio["low"], low / 2), min(ratio["high"], 2 * high), color=colours[arm])
    if not shown:
        text = "plateau" if found["plateau"] else "no ratio"
        axes.text(0.6, 0.5, text, transform=axes.transAxes, ha="center")
    axes.axvline(1, color="black", linewidth=1)
    axes.set(xscale="log", xlim=(low, high), ylim=(-0.6, max(0.6, len(arms) - 0.4)), yticks=range(len(arms)),
             yticklabels=arms[::-1], title="cheaper ←",
             xlabel="cost over full's (● time, □ FLOPs), paired, 95 %")  # fmt: skip
    ticks = [t for t in (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10) if low < t < high]
    _set_ticks(axes, ticks, [f"{t:g}" for t in ticks])
    axes.grid(axis="x", alpha=0.3)
