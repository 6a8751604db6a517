"""``curation compare RECIPE``: does a method help on this data? Every arm over the same seeds, beside its baselines.

Each run is an ordinary ``curation fit`` in a process and a folder of its own, so that a run that dies takes nothing
with it and an interrupted comparison goes on where it was.
"""

import argparse
import math
import re
import shlex
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import WandbLogger

from curation.recipes.cli import main as cli
from curation.recipes.compare import report
from curation.recipes.compare.arms import (
    METHODS,
    Arm,
    chooses,
    configure,
    entries,
    is_a,
    make_arm,
    resolve,
    with_seed,
)
from curation.recipes.compare.processes import FIT, Run, execute, last_words

BASELINES = ("full", "uniform")
BUDGETS = ("steps", "samples", "flops", "seconds")
REHEARSED_STEPS = 8
NO_LIMITS = {"max_steps": -1, "max_epochs": -1}


@dataclass
class Workload:
    """A recipe with its arms."""

    name: str
    folder: Path
    args: list[str]
    recipe: dict[str, Any]
    arms: list[Arm]
    keep: float | None
    metric: str
    mode: str
    rehearsals: dict[str, Run] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    amount: float = 0.0

    def configure(self, arm: Arm, seed: int, folder: Path, group: str, **meter: Any) -> dict[str, Any]:
        """The configuration of one run; what is wrong with it is said with the arm's name."""
        try:
            return configure(self.args, arm, seed, self.keep, folder, group, meter)
        except ValueError as error:
            raise ValueError(f"{self.name}, arm {arm.name!r}: {error}") from error

    def arm(self, name: str) -> Arm:
        """By name."""
        return next(arm for arm in self.arms if arm.name == name)

    def rehearsed(self, arm: str) -> dict[str, Any]:
        """What its rehearsal measured."""
        return self.rehearsals[arm].result

    def samples_per_step(self, arm: str) -> float:
        """Trained on, of all processes."""
        last = self.rehearsed(arm)["points"][-1]
        return last["samples_trained"] / last["step"]


def make_workload(config: str, overrides: list[str], options: argparse.Namespace) -> Workload:
    """Read a recipe and what is to be compared on it.

    Raises:
        ValueError: If the recipe, an override, a method or an option is wrong.
    """
    file = config if Path(config).is_file() else str(cli.find_recipe(config))
    args = [f"--config={file}", *overrides]
    try:
        recipe = resolve(with_seed(args, 0))
    except ValueError as error:
        raise ValueError(f"{config}: {error}") from error
    if recipe["trainer"]["fast_dev_run"]:
        raise ValueError("Argument `--trainer.fast_dev_run` must be false: it would end every run after a step.")
    callbacks = entries(recipe["trainer"]["callbacks"])
    keeps = [c["init_args"]["keep"] for c in callbacks if chooses(c) and "keep" in c["init_args"]]
    keep = options.keep if options.keep is not None else next(iter(keeps), None)
    names = (
        options.methods.split(",") if options.methods is not None else list(recipe.get("arms") or {}) or ["recipe"]
    )
    names = list(dict.fromkeys([*BASELINES, *(str(name).strip() for name in names)]))
    for name in names:
        if not re.fullmatch(r"[\w.+-]+", name) or name.startswith("."):
            raise ValueError(
                f"Argument `--methods` must hold names of letters, digits, _, ., + and -, but got {name!r}."
            )
    if names[2:] == ["recipe"] and not any(map(chooses, callbacks)):
        raise ValueError(f"Argument `--methods` must be given: {config} has no selection of its own.")
    watched = [c["init_args"] for c in callbacks if c["init_args"].get("monitor")]
    metric = options.metric or (watched[0]["monitor"] if watched else "val_loss")
    mode = options.mode or next((w["mode"] for w in watched if w["monitor"] == metric and "mode" in w), None)
    mode = mode or ("min" if "loss" in metric else "max" if "acc" in metric else None)
    if mode is None:
        raise ValueError(
            f"Argument `--mode` must be given: whether a {metric!r} is better large or small is not known."
        )
    name = Path(file).stem
    arms = [make_arm(arm, recipe, keep) for arm in names]
    return Workload(name, (options.out / name).resolve(), args, recipe, arms, options.keep, metric, mode)


def rehearse(workloads: list[Workload], options: argparse.Namespace) -> None:
    """A few steps and two validation batches of every arm: everything that is wrong is found before an arm starts.

    Raises:
        ValueError: If an arm fails, or does not log the metric.
    """
    for w in workloads:
        for arm in w.arms:
            folder = w.folder / "rehearsal" / arm.name
            config = w.configure(arm, 0, folder, "", max_steps=REHEARSED_STEPS, count_flops=True)
            trainer = config["trainer"]
            trainer["logger"] = trainer["logger"][:1]
            if options.budget[0] == "seconds" and arm.name != "uniform":
                trainer |= NO_LIMITS  # as in the runs, to see a schedule that cannot work
            if trainer["limit_val_batches"] is None or trainer["limit_val_batches"] == 1.0:
                trainer["limit_val_batches"] = 2
            w.rehearsals[arm.name] = Run(arm.name, 0, folder, config)
    every = [run for w in workloads for run in w.rehearsals.values()]
    for w in workloads:
        for name, run in w.rehearsals.items():
            run.prepare()
            try:
                resolve([f"--config={run.folder / FIT}"])  # with its callbacks
            except ValueError as error:
                raise ValueError(f"{w.name}, arm {name!r}: {error}") from error
    execute(every, "rehearsal", options.backend, options.jobs)
    wrong = []
    for w in workloads:
        for name, run in w.rehearsals.items():
            result = run.result
            logged = result["points"][-1]["metrics"] if result["points"] else {}
            if not result["finished"]:
                wrong.append(f"{w.name}, arm {name!r}: {last_words(run)} (all of it: {run.folder / 'log.txt'})")
            elif w.metric not in logged:
                found = ", ".join(sorted(logged)) or "no validation"
                wrong.append(
                    f"{w.name}, arm {name!r}: Argument `--metric` must be logged in validation, but {w.metric!r} "
                    f"is not; there is {found}"
                )
    if wrong:
        for run in every:
            (run.folder / "run.json").unlink(missing_ok=True)  # what is mended is rehearsed again
        raise ValueError("nothing was started:\n" + "\n".join(wrong))


def schedule(w: Workload, options: argparse.Namespace) -> None:
    """Give every run its length, so that all spend the same; learning-rate schedules end with it.

    Raises:
        ValueError: If the length of the recipe is not known.
    """
    unit, amount = options.budget
    rate = {}
    for name in w.rehearsals:
        flops = w.rehearsed(name)["flops_per_step"]
        rate[name] = {"steps": 1.0, "samples": w.samples_per_step(name), "flops": flops}
    length = w.rehearsed("uniform")["total_steps"]
    if unit == "flops" and not all(rates["flops"] > 0 for rates in rate.values()):
        raise ValueError(f"Argument `--budget` must not be flops: torch counts none in {w.name}.")
    if amount is None and not 0 < length < float("inf"):
        raise ValueError(f"Argument `--budget` must be an amount, such as {unit}=1000: {w.name} has no length.")
    if unit == "seconds" and amount is None:
        timing = make_run(w, w.arm("uniform"), 0, options, "timing", {"max_steps": int(length)})
        timing.prepare()
        execute([timing], "timing of uniform selection", options.backend, options.jobs)
        if not timing.finished:
            raise ValueError(f"{w.name}, arm 'uniform': {last_words(timing)}")
        amount = timing.result["points"][-1]["seconds"]
    w.amount = amount if amount is not None else length * rate["uniform"][unit]
    for seed in range(options.seeds):
        for arm in w.arms:
            name = f"{arm.name}-{seed}"
            if unit == "seconds":
                run = make_run(w, arm, seed, options, name, {"max_seconds": w.amount})
                run.seconds = w.amount
            else:
                steps = max(1, round(w.amount / rate[arm.name][unit]))
                run = make_run(w, arm, seed, options, name, {"max_steps": steps})
                _validate_as_often(run.config["trainer"], steps * rate["uniform"][unit] / w.amount)
                run.seconds = steps * w.rehearsed(arm.name)["seconds_per_step"]
            run.prepare()
            w.runs.append(run)


def make_run(w: Workload, arm: Arm, seed: int, options: argparse.Namespace, name: str, budget: dict[str, Any]) -> Run:
    """A run that ends when its budget is spent; the trainer's own limits are left where they say the same."""
    folder = w.folder / name
    config = w.configure(arm, seed, folder, options.out.name, **budget)
    steps, trainer = budget.get("max_steps"), config["trainer"]
    if steps is None:
        trainer |= NO_LIMITS
    elif steps != w.rehearsed(arm.name)["total_steps"]:
        epochs = trainer["max_epochs"]
        if epochs not in (None, -1):
            epochs = math.ceil(steps / w.rehearsed(arm.name)["steps_per_epoch"])
        trainer |= {"max_steps": steps, "max_epochs": epochs}
    return Run(arm.name, seed, folder, config)


def _validate_as_often(trainer: dict[str, Any], ratio: float) -> None:
    """Where validation is every so many batches, scale that with the number of steps: as many looks for every arm."""
    if trainer["check_val_every_n_epoch"] is None and isinstance(trainer["val_check_interval"], int):
        trainer["val_check_interval"] = max(1, round(trainer["val_check_interval"] * ratio))


def collect(w: Workload, options: argparse.Namespace) -> dict[str, Any]:
    """Everything that the runs of a workload wrote."""
    runs = []
    for run in sorted(w.runs, key=lambda run: (run.seed, [arm.name for arm in w.arms].index(run.arm))):
        result = run.result
        points = [
            {
                **{k: v for k, v in point.items() if k != "metrics"},
                "value": point["metrics"].get(w.metric),
            }
            for point in result["points"]
        ]
        error = None
        if not result["finished"]:
            error = last_words(run)
        elif not points or points[-1]["step"] != result["steps"]:
            error = "it ended without an evaluation of its last weights"
        elif run.spent < 1:
            error = f"it ended before its budget was spent, after {result['steps']} steps"
        runs.append(
            {
                "arm": run.arm,
                "seed": run.seed,
                "error": error,
                "flops_per_step": w.rehearsed(run.arm)["flops_per_step"],
                **{key: result.get(key) for key in ("wall_seconds", "peak_memory", "device", "torch")},
                "points": points,
            }
        )
    unit, _ = options.budget
    return {
        "name": w.name,
        "metric": w.metric,
        "mode": w.mode,
        "budget": {"unit": unit, "amount": w.amount},
        "target": options.target,
        "jobs": options.jobs,
        "arms": [arm.name for arm in w.arms],
        "runs": runs,
    }


def _budget(text: str) -> tuple[str, float | None]:
    unit, equals, amount = text.partition("=")
    try:
        value = float(amount) if equals else None
    except ValueError:
        value = 0.0
    least = 1.0 if unit in ("steps", "samples") else 0.0
    if unit not in BUDGETS or (value is not None and not (least <= value < math.inf and value > 0)):
        raise ValueError(
            f"Argument `--budget` must be {', '.join(BUDGETS)}, "
            f"or one with an amount, as in steps=500, but got {text!r}."
        )
    return unit, value


def parse(args: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of the command, and the overrides of the recipe.

    Raises:
        ValueError: If an option is out of its range.
    """
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
    parser.add_argument("--metric", help="of validation (default: what the recipe monitors, or val_loss)")
    parser.add_argument("--mode", choices=("min", "max"), help="what is better (default: as the recipe monitors it)")
    parser.add_argument(
        "--target", type=float, help="for the time to a target (default: what uniform always reaches)"
    )
    parser.add_argument("--backend", choices=("loky", "dask", "ray"), default="loky", help="of joblib (%(default)s)")
    parser.add_argument("--jobs", type=int, help="runs side by side (default: one for every GPU, or one)")
    parser.add_argument("--out", type=Path, help="folder (default: runs/compare/RECIPE)")
    options, overrides = parser.parse_known_args(args)
    gpus = torch.cuda.device_count()
    options.jobs = options.jobs if options.jobs is not None else max(1, gpus)
    options.budget = _budget(options.budget)
    options.out = options.out or Path("runs/compare") / "-".join(Path(r).stem for r in options.recipes)
    for name, value, least in (("seeds", options.seeds, 1), ("jobs", options.jobs, 1)):
        if value < least:
            raise ValueError(f"Argument `--{name}` must be >= {least}, but got {value}.")
    if options.budget[0] == "seconds" and options.jobs > max(1, gpus):
        raise ValueError(
            f"Argument `--jobs` must be at most {max(1, gpus)} with a budget of seconds, since runs on one device "
            f"slow each other, but got {options.jobs}."
        )
    package = {"dask": "distributed"}.get(options.backend, options.backend)
    if options.backend != "loky" and find_spec(package) is None:
        raise ValueError(f"Argument `--backend={options.backend}` needs `pip install {package}`.")
    if options.keep is not None and not 0 < options.keep <= 1:
        raise ValueError(f"Argument `--keep` must be in (0, 1], but got {options.keep!r}.")
    if options.target is not None and not math.isfinite(options.target):
        raise ValueError(f"Argument `--target` must be a finite number, but got {options.target!r}.")
    if any(word.startswith("--seed_everything") for word in overrides):
        raise ValueError("Argument `--seed_everything` must be left out: every run has its own; see `--seeds`.")
    if len({Path(r).stem for r in options.recipes}) < len(options.recipes):
        raise ValueError(f"Argument `recipes` must have different names, but got {' '.join(options.recipes)}.")
    return options, overrides


def main(args: list[str]) -> None:
    """``curation compare RECIPE ... [--methods ...] [--keep ...] [--seeds N] [--budget ...] [overrides]``.

    Raises:
        ValueError: If anything is wrong with a recipe, a method or an option, before an arm starts.
        OSError: If the folder cannot be written.
    """
    options, overrides = parse(args)
    workloads = [make_workload(recipe, overrides, options) for recipe in options.recipes]
    rehearse(workloads, options)
    for w in workloads:
        schedule(w, options)
    execute([run for w in workloads for run in w.runs], "runs", options.backend, options.jobs)
    content = report.build(shlex.join(["curation", "compare", *args]), [collect(w, options) for w in workloads])
    report.write(content, options.out / "report")
    report.show(content, options.out / "report")
    loggers = [
        logger for w in workloads for logger in w.runs[0].config["trainer"]["logger"] if is_a(logger, WandbLogger)
    ]
    for project in {logger["init_args"].get("project", "lightning_logs") for logger in loggers}:
        report.log_to_wandb(content, options.out / "report", project, options.out.name)
    if any(report.broken(w, arm) for w in content["workloads"] for arm in w["arms"]):
        raise SystemExit(1)
