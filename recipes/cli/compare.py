"""``curation compare RECIPE``: does a method help on this data? Every arm over the same seeds, beside its baselines.

Each run is an ordinary ``curation fit`` in a process and a folder of its own, so that a run that dies takes nothing
with it and an interrupted comparison goes on where it was.
"""

import shlex

from lightning.pytorch.loggers import WandbLogger

from curation.recipes.compare.arms import is_a
from curation.recipes.compare.comparison import compare
from curation.recipes.compare.options import parse
from curation.recipes.compare.report import failed, log_to_wandb, show, write
from curation.recipes.compare.workload import Workload, make_workload


def main(args: list[str]) -> None:
    """``curation compare RECIPE ... [--methods ...] [--keep ...] [--seeds N] [--budget ...] [overrides]``.

    Raises:
        ValueError: If anything is wrong with a recipe, a method or an option, before an arm starts.
        OSError: If the folder cannot be written.
        SystemExit: With status 1, if a run failed or diverged.
    """
    options, overrides = parse(args)
    workloads = [make_workload(recipe, overrides, options) for recipe in options.recipes]
    content = compare(workloads, options, shlex.join(["curation", "compare", *args]))
    report = options.out / "report"
    write(content, report)
    show(content, report)
    for project in wandb_projects(workloads):
        log_to_wandb(content, report, project, options.out.name)
    if any(map(failed, content["workloads"])):
        raise SystemExit(1)


def wandb_projects(workloads: list[Workload]) -> set[str]:
    """The W&B projects of the runs."""
    loggers = [logger for workload in workloads for logger in workload.runs[0].config["trainer"]["logger"]]
    return {logger["init_args"].get("project", "lightning_logs") for logger in loggers if is_a(logger, WandbLogger)}
