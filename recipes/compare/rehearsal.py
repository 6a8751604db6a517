"""The rehearsal: a few steps of every arm, which find what is wrong before a run starts and count FLOPs."""

from curation.recipes.compare.arms import Arm, resolve
from curation.recipes.compare.options import Options
from curation.recipes.compare.processes import execute
from curation.recipes.compare.resume import forget, prepare
from curation.recipes.compare.run import FIT, Run
from curation.recipes.compare.schedule import NO_LIMITS
from curation.recipes.compare.warm import Server
from curation.recipes.compare.workload import Workload

STEPS = 8
VALIDATION_BATCHES = 2


def rehearse(workloads: list[Workload], options: Options, server: Server | None = None) -> None:
    """Run a few steps and two validation batches of every arm.

    Args:
        workloads: The workloads; each gets its ``rehearsals``.
        options: The options of the comparison.
        server: What runs are forked from.

    Raises:
        ValueError: If an arm fails, or does not log the metric.
    """
    for workload in workloads:
        for arm in workload.arms:
            workload.rehearsals[arm.name] = make_rehearsal(workload, arm, options)
    for workload in workloads:
        for name, run in workload.rehearsals.items():
            prepare(run)
            try:
                resolve([f"--config={run.folder / FIT}"])  # with its callbacks
            except ValueError as error:
                raise ValueError(f"{workload.name}, arm {name!r}: {error}") from error
    rehearsals = [run for workload in workloads for run in workload.rehearsals.values()]
    execute(rehearsals, "rehearsal", options.backend, options.jobs, server)
    errors = [error for workload in workloads for error in rehearsal_errors(workload)]
    if errors:
        for run in rehearsals:
            forget(run)  # what is mended is rehearsed again
        raise ValueError("nothing was started:\n" + "\n".join(errors))


def make_rehearsal(workload: Workload, arm: Arm, options: Options) -> Run:
    """The rehearsal of an arm: its run with seed 0, cut short, with one logger."""
    folder = workload.folder / "rehearsal" / arm.name
    config = workload.configure(arm, 0, folder, "", max_steps=STEPS, count_flops=True)
    trainer = config["trainer"]
    trainer["logger"] = trainer["logger"][:1]
    if options.budget[0] == "seconds" and arm.name != "uniform":
        trainer |= NO_LIMITS  # as in the runs, to see a schedule that cannot work
    if trainer["limit_val_batches"] is None or trainer["limit_val_batches"] == 1.0:
        trainer["limit_val_batches"] = VALIDATION_BATCHES
    return Run(arm.name, 0, folder, config)


def rehearsal_errors(workload: Workload) -> list[str]:
    """What is wrong with the arms of a workload, a sentence for each that failed or does not log the metric."""
    errors = []
    for name, run in workload.rehearsals.items():
        result = run.result
        logged = {name for point in result["points"] for name in point["metrics"]}
        if not result["finished"]:
            errors.append(f"{workload.name}, arm {name!r}: {run.failure} (all of it: {run.folder / 'log.txt'})")
        elif workload.metric not in logged:
            known = ", ".join(sorted(logged)) or "no validation"
            errors.append(
                f"{workload.name}, arm {name!r}: Argument `--metric` must be logged in validation, but "
                f"{workload.metric!r} is not; there is {known}"
            )
    return errors
