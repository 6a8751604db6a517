"""``curation compare RECIPE``: does a method help on this data? Every arm over the same seeds, beside its baselines.

Each run is an ordinary ``curation fit`` in a process and a folder of its own, so that a run that dies takes nothing
with it and an interrupted comparison goes on where it was.
"""

import argparse
import shlex
from pathlib import Path

import torch
from lightning.pytorch.loggers import WandbLogger

from curation.recipes.compare.arms import METHODS, is_a
from curation.recipes.compare.comparison import compare
from curation.recipes.compare.options import BACKENDS, Options, read_budget
from curation.recipes.compare.report import log_to_wandb, show, write
from curation.recipes.compare.summary import failures
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
    if any(failures(workload, arm) for workload in content["workloads"] for arm in workload["arms"]):
        raise SystemExit(1)


def wandb_projects(workloads: list[Workload]) -> set[str]:
    """The W&B projects of the runs."""
    loggers = [logger for workload in workloads for logger in workload.runs[0].config["trainer"]["logger"]]
    return {logger["init_args"].get("project", "lightning_logs") for logger in loggers if is_a(logger, WandbLogger)}


def parse(args: list[str]) -> tuple[Options, list[str]]:
    """The options of the command, and the overrides of the recipe.

    Raises:
        ValueError: If an option is out of its range.
    """
    given, overrides = parser().parse_known_args(args)
    if any(word.startswith("--seed_everything") for word in overrides):
        raise ValueError("Argument `--seed_everything` must be left out: every run has its own; see `--seeds`.")
    out = given.out or Path("runs/compare") / "-".join(Path(recipe).stem for recipe in given.recipes)
    options = Options(
        given.recipes,
        methods=None if given.methods is None else given.methods.split(","),
        keep=given.keep,
        seeds=given.seeds,
        budget=read_budget(given.budget),
        metric=given.metric,
        mode=given.mode,
        target=given.target,
        backend=given.backend,
        jobs=max(1, torch.cuda.device_count()) if given.jobs is None else given.jobs,
        out=out,
    )
    return options, overrides


def parser() -> argparse.ArgumentParser:
    """The parser of the command's own options."""
    parser = argparse.ArgumentParser(
        "curation compare",
        description="Does a method help on this data? Trains every arm with the same seeds, beside `full` (every "
        "candidate) and `uniform` (as many at random), and writes report.html, .json, .png and .svg.",
        epilog="Options of `curation fit` (--trainer.max_steps=50) hold for every run; {seed} in them is its seed. "
        "Write them with =. An interrupted comparison goes on when it is started again.",
        allow_abbrev=False,
    )
    parser.add_argument("recipes", nargs="+", help="names of recipes, or files")
    parser.add_argument(
        "--methods",
        help=f"separated by commas: {', '.join(METHODS)}, `recipe` (what the recipe itself does), one of its `arms`, "
        "or the class path of a callback or a sampler (default: the arms, or `recipe`)",
    )
    parser.add_argument("--keep", type=float, help="fraction of each candidate batch (default: the recipe's)")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each arm (%(default)s)")
    parser.add_argument(
        "--budget",
        default="steps",
        help="what is held equal: steps, samples, flops or seconds; with an amount as in steps=500 (default: steps, "
        "as many as uniform selection spends on the recipe)",
    )
    parser.add_argument("--metric", help="metric of validation (default: what the recipe monitors, or val_loss)")
    parser.add_argument("--mode", choices=("min", "max"), help="what is better (default: as the recipe monitors it)")
    parser.add_argument(
        "--target", type=float, help="for the time to a target (default: what uniform always reaches)"
    )
    parser.add_argument("--backend", choices=BACKENDS, default="threading", help="backend of joblib (%(default)s)")
    parser.add_argument("--jobs", type=int, help="runs side by side (default: one for every GPU, or one)")
    parser.add_argument("--out", type=Path, help="folder (default: runs/compare/RECIPE)")
    return parser
