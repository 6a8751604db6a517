"""How long every run is, so that all arms spend the same budget."""

import itertools
import math
from pathlib import Path
from typing import Any

from curation.recipes.compare.arms import SHORT, Arm
from curation.recipes.compare.options import Options
from curation.recipes.compare.processes import execute
from curation.recipes.compare.resume import prepare
from curation.recipes.compare.run import Run
from curation.recipes.compare.warm import Server
from curation.recipes.compare.workload import Workload

NO_LIMITS = {"max_steps": -1, "max_epochs": -1}


def schedule(workload: Workload, options: Options, server: Server | None = None) -> None:
    """Give every run its length, so that all spend the same; learning-rate schedules end with it.

    Args:
        workload: A workload that was rehearsed; gets its ``amount``, its ``runs`` and its ``sweep``.
        options: The options of the comparison.
        server: What runs are forked from.

    Raises:
        ValueError: If the length of the recipe is not known, two budgets of a sweep are as long, or the folder holds
            another comparison.
    """
    costs = costs_per_step(workload)
    workload.amount = budget_amount(workload, options, costs, server)
    for name in workload.swept if options.budget[0] != "epochs" else ():
        lengths = [steps_of(workload, name, share, options, costs) for share in options.budget_sweep]
        if any(a >= b for a, b in itertools.pairwise(lengths)):
            raise ValueError(
                "Argument `--budget-sweep` must give every arm different lengths, but the runs of "
                f"{workload.name}, arm {name!r}, would have {', '.join(map(str, lengths))} steps."
            )
    for share in options.budget_sweep or (1.0,):
        for seed in range(options.seeds):
            for arm in workload.arms:
                if share == 1 or arm.name in workload.swept:
                    _add_run(workload, make_scheduled_run(workload, arm, seed, options, costs, share), share)


def _add_run(workload: Workload, run: Run, share: float) -> None:
    """Prepare a run, and note it where it belongs: the runs with the whole budget, the sweep, or both."""
    prepare(run)
    if share == 1:
        workload.runs.append(run)
    if run.arm in workload.swept:
        workload.sweep.setdefault(share, []).append(run)


def costs_per_step(workload: Workload) -> dict[str, dict[str, float]]:
    """What a step of each arm costs in its rehearsal: arm, then unit of the budget, then amount."""
    return {
        arm: {
            "steps": 1.0,
            "samples": workload.samples_per_step(arm),
            "flops": workload.rehearsed(arm)["flops_per_step"],
        }
        for arm in workload.rehearsals
    }


def budget_amount(
    workload: Workload, options: Options, costs: dict[str, dict[str, float]], server: Server | None = None
) -> float:
    """What every run spends: the amount that was asked for, or what uniform selection spends on the recipe.

    Raises:
        ValueError: If the unit cannot be counted, the recipe has no length, or the run that is timed fails.
    """
    unit, amount = options.budget
    if unit == "epochs":
        amount = workload.recipe["trainer"]["max_epochs"] if amount is None else amount
        lengths = [share * (amount or -1) for share in options.budget_sweep or (1.0,)]
        if any(length < 1 or length != int(length) for length in lengths):
            raise ValueError(
                f"Argument `--budget` must give every run of {workload.name} a whole number of epochs, such as "
                f"epochs=8, but the runs would have {', '.join(f'{length:g}' for length in lengths)}."
            )
        return amount
    length = workload.rehearsed("uniform")["total_steps"]
    if unit == "flops" and not all(cost["flops"] > 0 for cost in costs.values()):
        raise ValueError(f"Argument `--budget` must not be flops: torch counts none in {workload.name}.")
    if amount is not None:
        return amount
    if not 0 < length < float("inf"):
        raise ValueError(
            f"Argument `--budget` must be an amount, such as {unit}=1000: {workload.name} has no length."
        )
    return uniform_seconds(workload, options, server) if unit == "seconds" else length * costs["uniform"][unit]


def uniform_seconds(workload: Workload, options: Options, server: Server | None = None) -> float:
    """Training seconds of uniform selection on the recipe, measured by a run.

    Raises:
        ValueError: If the run fails.
    """
    length = int(workload.rehearsed("uniform")["total_steps"])
    timing = make_run(workload, workload.arm("uniform"), 0, options, "timing", {"max_steps": length})
    prepare(timing)
    execute([timing], "timing of uniform selection", options.backend, options.jobs, server)
    if not timing.finished:
        raise ValueError(f"{workload.name}, arm 'uniform': {timing.failure}")
    return timing.result["points"][-1]["seconds"]


def steps_of(workload: Workload, arm: str, share: float, options: Options, costs: dict[str, dict[str, float]]) -> int:
    """Steps in which an arm spends a share of the amount; ``short``, as many samples as uniform selection."""
    amount = share * workload.amount
    if arm != SHORT:
        return max(1, round(amount / costs[arm][options.budget[0]]))
    samples = steps_of(workload, "uniform", share, options, costs) * costs["uniform"]["samples"]
    return max(1, round(samples / costs[arm]["samples"]))


def make_scheduled_run(
    workload: Workload,
    arm: Arm,
    seed: int,
    options: Options,
    costs: dict[str, dict[str, float]],
    share: float = 1.0,
) -> Run:
    """The run of an arm with a seed, that spends a share of the workload's amount."""
    unit, name = options.budget[0], f"{arm.name}-{seed}"
    if share != 1:
        name = f"budget-{share:.12g}/{name}"
    if unit == "seconds":
        run = make_run(workload, arm, seed, options, name, {"max_seconds": workload.amount})
        run.seconds = workload.amount
        return run
    if unit == "epochs":
        run = make_run(workload, arm, seed, options, name, {})
        run.config["trainer"] |= {"max_steps": -1, "max_epochs": int(share * workload.amount)}
        rehearsed = workload.rehearsed(arm.name)
        run.seconds = share * workload.amount * rehearsed["steps_per_epoch"] * rehearsed["seconds_per_step"]
        return run
    steps = steps_of(workload, arm.name, share, options, costs)
    run = make_run(workload, arm, seed, options, name, {"max_steps": steps})
    _validate_as_often(run.config["trainer"], steps * costs["uniform"][unit] / workload.amount)
    run.seconds = steps * workload.rehearsed(arm.name)["seconds_per_step"]
    return run


def make_run(workload: Workload, arm: Arm, seed: int, options: Options, name: str, budget: dict[str, Any]) -> Run:
    """A run that ends when its budget is spent; the trainer's own limits are left where they say the same.

    Args:
        workload: The workload.
        arm: The arm.
        seed: Seed of the run.
        options: The options of the comparison.
        name: Name of the run's folder.
        budget: ``max_steps`` or ``max_seconds`` of the run's ``RunMeter``; nothing where the trainer counts epochs.
    """
    folder = workload.folder / name
    group = "/".join([options.out.name, *Path(name).parts[:-1]])  # of W&B, one for each budget
    config = workload.configure(arm, seed, folder, group, **budget)
    steps, trainer = budget.get("max_steps"), config["trainer"]
    rehearsed = workload.rehearsed(arm.name)
    if steps is None:
        trainer |= NO_LIMITS
    elif steps != rehearsed["total_steps"]:
        epochs = trainer["max_epochs"]
        if epochs not in (None, -1):
            epochs = math.ceil(steps / rehearsed["steps_per_epoch"])
        trainer |= {"max_steps": steps, "max_epochs": epochs}
    return Run(arm.name, seed, folder, config)


def _validate_as_often(trainer: dict[str, Any], ratio: float) -> None:
    """Where validation is every so many batches, scale that with the number of steps: as many looks for every arm."""
    if trainer["check_val_every_n_epoch"] is None and isinstance(trainer["val_check_interval"], int):
        trainer["val_check_interval"] = max(1, round(trainer["val_check_interval"] * ratio))
