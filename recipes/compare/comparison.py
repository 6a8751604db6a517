"""A comparison from its options to the content of its report."""

from typing import Any

from curation.recipes.compare.arms import Arm
from curation.recipes.compare.options import Options
from curation.recipes.compare.processes import execute
from curation.recipes.compare.rehearsal import rehearse
from curation.recipes.compare.resume import check_same
from curation.recipes.compare.run import Run
from curation.recipes.compare.schedule import schedule
from curation.recipes.compare.summary import build
from curation.recipes.compare.warm import Server
from curation.recipes.compare.workload import Workload, is_validation, mode_of_name


def compare(workloads: list[Workload], options: Options, command: str) -> dict[str, Any]:
    """Rehearse, give every run its length, execute what is not finished, and sum up.

    Args:
        workloads: The workloads.
        options: The options of the comparison.
        command: The command line, for the report.

    Returns:
        The content of the report.

    Raises:
        ValueError: If an arm fails its rehearsal, or the folder holds another comparison.
    """
    with Server() as server:
        rehearse(workloads, options, server)
        for workload in workloads:
            schedule(workload, options, server)
        if options.jobs > 1:  # their seconds stand for those of all seeds, since runs side by side slow one another
            alone = [r for w in workloads for runs in w.sweep.values() for r in runs if r.seed == 0]
            if alone:
                execute(alone, "runs of seed 0, one at a time", options.backend, 1, server)
        runs = [run for workload in workloads for run in workload.all_runs]
        execute(runs, "runs", options.backend, options.jobs, server)
    return build(command, [collect(workload, options) for workload in workloads])


def collect(workload: Workload, options: Options) -> dict[str, Any]:
    """Everything that the runs of a workload wrote, by seed and arm."""
    order = {arm.name: i for i, arm in enumerate(workload.arms)}
    runs = sorted(workload.runs, key=lambda run: (run.seed, order[run.arm]))
    content = {
        "name": workload.name,
        "sources": workload.sources,
        "metric": workload.metric,
        "mode": workload.mode,
        "budget": {"unit": options.budget[0], "amount": workload.amount},
        "target": options.target,
        "jobs": options.jobs,
        "arms": list(order),
        "settings": {arm.name: settings_of(arm) for arm in workload.arms},
        "runs": [collect_run(workload, run) for run in runs],
    }
    return {**content, "sweep": collect_sweep(workload)} if workload.sweep else content


def settings_of(arm: Arm) -> dict[str, Any]:
    """What an arm changes in the recipe, by the names of options; the arguments of callbacks by their class."""
    settings = dict(arm.overrides)
    for callback in arm.callbacks or []:
        name = callback["class_path"].rpartition(".")[2]
        options = callback.get("init_args") or {}
        settings |= {f"{name}.{key}": value for key, value in options.items()} or {name: ""}
    return settings


def collect_sweep(workload: Workload) -> dict[str, Any]:
    """What the runs of a sweep cost and reached, and the metrics that all of them have, with what is better.

    The metrics are that of the comparison and those of validation whose names say what is better.
    """
    runs = [collect_swept_run(workload, run, share) for share, runs in workload.sweep.items() for run in runs]
    modes = {name: mode_of_name(name) for run in runs for name in run["metrics"] if is_validation(name)}
    modes[workload.metric] = workload.mode
    whole = [run["metrics"] for run in runs if not run["error"]]
    known = {name: mode for name, mode in modes.items() if mode and all(name in metrics for metrics in whole)}
    for run in runs:
        run["metrics"] = {name: value for name, value in run["metrics"].items() if name in known}
    return {
        "shares": list(workload.sweep),
        "arms": workload.swept,
        "metrics": dict(sorted(known.items())),
        "runs": runs,
    }


def collect_swept_run(workload: Workload, run: Run, share: float) -> dict[str, Any]:
    """The costs of a run and its last metrics."""
    collected, points = collect_run(workload, run), run.result["points"]
    last = points[-1] if points else {"step": 0, "samples_trained": 0, "seconds": 0.0, "metrics": {}}
    return {
        "share": share,
        **{name: collected[name] for name in ("arm", "seed", "error", "wall_seconds")},
        **{name: last[name] for name in ("step", "samples_trained", "seconds", "metrics")},
        "flops": last["step"] * collected["flops_per_step"],
    }


def collect_run(workload: Workload, run: Run) -> dict[str, Any]:
    """What a run measured: its points with the value of the metric, its costs, and why it does not count, if so.

    Points of validations that did not log the metric are left out.

    Raises:
        ValueError: If another comparison has changed the run.
    """
    check_same(run)
    result = run.result
    points = []
    for point in result["points"]:
        if workload.metric in point["metrics"]:
            costs = {name: value for name, value in point.items() if name != "metrics"}
            points.append({**costs, "value": point["metrics"][workload.metric]})
    flops = workload.rehearsed(run.arm)["flops_per_step"]
    if run.counts_epochs and result["points"]:  # steps may be larger than those of the rehearsal
        last = result["points"][-1]
        flops *= last["samples_trained"] / last["step"] / workload.samples_per_step(run.arm)
    return {
        "arm": run.arm,
        "seed": run.seed,
        "error": run_error(run, result, workload.metric),
        "flops_per_step": flops,
        **{name: result.get(name) for name in ("wall_seconds", "peak_memory", "device", "torch")},
        "points": points,
    }


def run_error(run: Run, result: dict[str, Any], metric: str) -> str | None:
    """Why a run does not count; None if it does."""
    if not result["finished"]:
        return run.failure
    if not result["points"] or result["points"][-1]["step"] != result["steps"]:
        return "it ended without an evaluation of its last weights"
    if run.spent < 1:
        return f"it ended before its budget was spent, after {result['steps']} steps"
    if metric not in result["points"][-1]["metrics"]:
        return f"its last validation did not log {metric}, so that of its last weights is not known"
    return None
