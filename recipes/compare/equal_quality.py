"""What follows from the sweep of a comparison: at what share of full's cost a method is as good, and the sentence.

The *sweep* of a workload in ``report.json`` has ``shares`` of the budget, the ``arms`` that ran at each, ``metrics``
with what is better, and ``runs`` (the whole budget is the share 1). From it follow

* ``equal_quality``: for each metric what is read off the curve of ``full`` (``quality``, ``rise``, ``plateau``), and
  for each arm a ratio of ``flops`` and one of ``seconds``, with ``bound`` (``">"`` or ``"<"``) and ``reason`` (why
  there is none);
* ``cost_ratio``: the ratios in the metric of the comparison that are worth something, as mean, low and high.
"""

import math
from dataclasses import asdict
from typing import Any

import numpy as np

from curation.evaluation.cost_ratio import cost_ratio

READ = "full"  # whose quality is read, at the whole budget
UNITS = {"seconds": "time", "flops": "FLOPs"}


def equal_quality(workload: dict[str, Any]) -> dict[str, Any]:
    """For each metric what is read off the curve of ``full``, and the cost ratios of all other arms.

    Args:
        workload: A workload with a ``sweep``.
    """
    sweep = workload["sweep"]
    return {metric: _in_metric(workload, metric, mode) for metric, mode in sweep["metrics"].items()}


def _in_metric(workload: dict[str, Any], metric: str, mode: Any) -> dict[str, Any]:
    read: dict[str, Any] = {"quality": math.nan, "rise": None, "plateau": False}
    arms: dict[str, dict[str, Any]] = {}
    for arm in swept_methods(workload):
        arms[arm] = {}
        for unit in UNITS:
            ratio, arms[arm][unit] = _ratio(workload, arm, metric, mode, unit)
            if ratio is not None:
                read = {"quality": ratio.quality, "rise": ratio.rise, "plateau": ratio.plateau}
    return {**read, "arms": arms}


def swept_methods(workload: dict[str, Any]) -> list[str]:
    """The arms of the sweep beside ``full``."""
    return [arm for arm in workload["sweep"]["arms"] if arm != READ]


def _ratio(workload: dict[str, Any], arm: str, metric: str, mode: Any, unit: str) -> tuple[Any, dict[str, Any]]:
    """The cost ratio of an arm, None where there is none, and how it stands in the report."""
    nothing = {"ratio": math.nan, "low": math.nan, "high": math.nan, "bound": ""}
    values = {name: table(workload, name, metric) for name in (READ, arm)}
    costs = {name: table(workload, name, unit) for name in (READ, arm)}
    reason = no_ratio(workload, arm, metric) or next(
        (f"the {unit} of {name} do not rise with the budget" for name in costs if not _rise(costs[name])), ""
    )
    if reason:
        return None, {**nothing, "reason": reason}
    read = workload["sweep"]["shares"].index(1)
    ratio = cost_ratio(costs[READ], values[READ], costs[arm], values[arm], mode, read)
    return ratio, {**{key: value for key, value in asdict(ratio).items() if key in nothing}, "reason": ""}


def table(workload: dict[str, Any], arm: str, name: str) -> np.ndarray:
    """A metric, ``"flops"`` or ``"seconds"`` of the runs of an arm: fp64 ``[S, B]``; NaN for runs that failed.

    Seconds of runs side by side are those of seed 0, which ran alone.
    """
    sweep = workload["sweep"]
    runs = {(run["seed"], run["share"]): run for run in sweep["runs"] if run["arm"] == arm}
    seeds = sorted({seed for seed, _ in runs})

    def cell(seed: int, share: float) -> float:
        run = runs[0 if name == "seconds" and workload["jobs"] > 1 else seed, share]
        value = run[name] if name in UNITS else run["metrics"].get(name)
        return math.nan if run["error"] or value is None else value

    return np.array([[cell(seed, share) for share in sweep["shares"]] for seed in seeds])


def _rise(costs: np.ndarray) -> bool:
    return bool((costs > 0).all()) and bool((np.diff(np.log(costs).mean(0)) > 0).all())


def no_ratio(workload: dict[str, Any], arm: str, metric: str) -> str:
    """Why an arm has no cost ratio in a metric at all: failed and diverged runs, or a single seed; or nothing."""
    lost = []
    for name in (READ, arm):
        broken = ~np.isfinite(table(workload, name, metric))
        if broken.any():
            lost.append(f"{broken.sum()} of {broken.size} runs of {name} failed or diverged")
    if not lost and len(table(workload, arm, metric)) < 2:
        return "one seed says nothing about a difference"
    return ", ".join(lost)


def cost_ratios(workload: dict[str, Any]) -> dict[str, Any]:
    """The ratios in the metric of the comparison: arm, then ``"flops"`` or ``"seconds"``, then mean, low and high.

    None where there is none, on a plateau, and where only a bound is known.
    """
    found = workload["equal_quality"][workload["metric"]]
    return {
        arm: {
            unit: None
            if found["plateau"] or ratio["reason"] or ratio["bound"]
            else [ratio["ratio"], ratio["low"], ratio["high"]]
            for unit, ratio in sorted(ratios.items())
        }
        for arm, ratios in found["arms"].items()
    }


def sentences(workload: dict[str, Any]) -> list[tuple[str, str]]:
    """``"won"``, ``"lost"``, ``"even"`` or ``"failed"`` (by time), and the sentence, for each method of the sweep.

    One sentence for all, where full is on a plateau.
    """
    if "sweep" not in workload:
        return []
    metric = workload["metric"]
    found = workload["equal_quality"][metric]
    if not found["plateau"]:
        return [_sentence(workload, arm) for arm in swept_methods(workload)]
    mean, low, high = found["rise"]
    return [
        (
            "even",
            f"No cost ratio, plateau: the rise of full's {metric} from the budget before, {mean:+.2g} [{low:+.2g}, "
            f"{high:+.2g}] with positive as better, cannot be told from 0. Many budgets may have its quality, and a "
            "ratio is worth nothing.",
        )
    ]


def _sentence(workload: dict[str, Any], arm: str) -> tuple[str, str]:
    metric = workload["metric"]
    ratios = workload["equal_quality"][metric]["arms"][arm]
    known = {UNITS[unit]: ratio for unit, ratio in ratios.items() if not ratio["reason"]}
    if not known:
        reason = no_ratio(workload, arm, metric)
        return "failed" if "failed" in reason else "even", f"{arm}: no cost ratio, {ratios['seconds']['reason']}."
    first = next(iter(known.values()))
    kind = "won" if first["high"] < 1 else "lost" if first["low"] > 1 else "even"
    if first["bound"] == ">":
        within = " and ".join(f"{number(r['ratio'])} times its {unit}" for unit, r in known.items())
        return kind, f"{arm}: does not reach full's {metric} within {within}."
    if first["bound"] == "<":
        below = " and ".join(f"{number(r['ratio'])} of full's {unit}" for unit, r in known.items())
        return kind, f"{arm}: is better than full's {metric} with its smallest budget already, {below}."
    at = " and ".join(f"{shown(r)} of its {unit}" for unit, r in known.items())
    return kind, f"{arm}: reaches full's {metric} at {at}."


def number(value: float) -> str:
    """A ratio to two decimals, or two digits below .1.

    Example:
        >>> number(0.618), number(0.0123), number(0.0), number(float("inf"))
        ('0.62', '0.012', '0', 'inf')
    """
    return f"{value:.2f}" if 0.1 <= value < math.inf else f"{value:.2g}"


def shown(ratio: dict[str, Any]) -> str:
    """A ratio with its interval, or its bound.

    Example:
        >>> shown({"ratio": 0.618, "low": 0.5, "high": 0.7, "bound": "", "reason": ""})
        '0.62 [0.50, 0.70]'
    """
    if ratio["reason"]:
        return ""
    if ratio["bound"]:
        return f"{ratio['bound']} {number(ratio['ratio'])}"
    return f"{number(ratio['ratio'])} [{number(ratio['low'])}, {number(ratio['high'])}]"


def rows(workload: dict[str, Any]) -> list[list[str]]:
    """A table of all metrics and methods: arm, metric, full's quality, ratios of time and of FLOPs."""
    return [
        [
            arm,
            metric,
            f"{found['quality']:.4g}",
            *("plateau" * found["plateau"] or shown(ratios[unit]) or ratios[unit]["reason"] for unit in UNITS),
        ]
        for metric, found in workload["equal_quality"].items()
        for arm, ratios in found["arms"].items()
    ]


def failed_runs(workload: dict[str, Any]) -> list[str]:
    """The runs of the sweep with other shares of the budget that failed or diverged, a sentence for each."""
    if "sweep" not in workload:
        return []
    return [
        f"{run['arm']}, seed {run['seed']}, {run['share']:g} of the budget: " + (run["error"] or "it diverged")
        for run in workload["sweep"]["runs"]
        if run["share"] != 1 and (run["error"] or not _finite(run["metrics"].get(workload["metric"])))
    ]


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def notes(workload: dict[str, Any]) -> list[str]:
    """What a reader must know to read the ratios right."""
    if "sweep" not in workload:
        return []
    shares = workload["sweep"]["shares"]
    return [
        f"Sweep: {', '.join(workload['sweep']['arms'])} ran at {', '.join(f'{share:g}' for share in shares)} of the "
        "budget, each schedule annealed to it. Cost ratio: the cost at which an arm's curve (monotone, through the "
        "means over seeds, against the logarithm of the cost) has the quality of full's at the whole budget, over "
        "full's cost there, with the costs that a paired 95 % Student t interval does not rule out; 0 or inf where "
        "they leave the budgets of the arm. Not corrected for the number of ratios.",
        *(["Fewer than four budgets say little of the curves between them."] if len(shares) < 4 else []),
        *(
            [
                "In the ratios, seconds are those of seed 0, whose runs went one at a time. How such seconds vary is "
                "not in the intervals."
            ]
            if workload["jobs"] > 1
            else []
        ),
    ]
