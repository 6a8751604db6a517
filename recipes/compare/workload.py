"""A recipe with the arms that are compared on it."""

import re
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from curation.recipes.catalogue import find_recipe
from curation.recipes.compare.arms import (
    SHORT,
    Arm,
    chooses,
    configure,
    entries,
    make_arm,
    resolve,
    resolve_arm,
    with_seed,
)
from curation.recipes.compare.options import Options
from curation.recipes.compare.run import Run
from curation.recipes.sources import AUTO, find_source, named_sources, with_sources

BASELINES = ("full", "uniform")
MODES = {"loss": "min", "nll": "min", "acc": "max", "accuracy": "max"}  # words of a metric's name
TURNS = {"drop", "error", "gap", "improvement", "neg", "negative", "reduction"}  # words that turn the others round


@dataclass
class Workload:
    """A recipe with its arms.

    Args:
        name: Name of the recipe.
        folder: Folder of its runs.
        args: Recipe and overrides, as for ``curation fit``.
        recipe: The resolved configuration.
        arms: The arms, the two baselines first.
        keep: Fraction of each candidate batch, where it was asked for; None leaves the recipe's.
        metric: Metric of validation.
        mode: ``"min"`` or ``"max"``, what is better.
        rehearsals: The rehearsal of each arm.
        runs: The runs of all arms and seeds.
        amount: What every run spends, in the unit of the budget.
        swept: Names of the arms that run at every share of a sweep; empty without one.
        sweep: Their runs at each share of the budget, those of the whole budget too.
        resolved: Configurations of arms with their seeds, which take a while to make and are those of every budget.
    """

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
    swept: list[str] = field(default_factory=list)
    sweep: dict[float, list[Run]] = field(default_factory=dict)
    resolved: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict, repr=False)

    @property
    def all_runs(self) -> list[Run]:
        """The runs with the whole budget, then those of the sweep with other shares of it."""
        return self.runs + [run for share, runs in self.sweep.items() if share != 1 for run in runs]

    def configure(self, arm: Arm, seed: int, folder: Path, group: str, **meter: Any) -> dict[str, Any]:
        """The configuration of one run.

        Args:
            arm: The arm.
            seed: Seed of the run.
            folder: Folder of the run.
            group: Group of the W&B runs.
            meter: Arguments of the run's ``RunMeter``.

        Raises:
            ValueError: If the parser refuses it; the message has the arm's name.
        """
        try:
            if (arm.name, seed) not in self.resolved:
                self.resolved[arm.name, seed] = resolve_arm(self.args, arm, seed)
            config = deepcopy(self.resolved[arm.name, seed])
            return configure(self.args, arm, seed, self.keep, folder, group, meter, config)
        except ValueError as error:
            raise ValueError(f"{self.name}, arm {arm.name!r}: {error}") from error

    @property
    def sources(self) -> dict[str, Any]:
        """The data and models that the recipe names, by the dotted names of their options."""
        return named_sources(self.recipe)

    def arm(self, name: str) -> Arm:
        """The arm of a name."""
        return next(arm for arm in self.arms if arm.name == name)

    def rehearsed(self, arm: str) -> dict[str, Any]:
        """What the rehearsal of an arm measured."""
        return self.rehearsals[arm].result

    def samples_per_step(self, arm: str) -> float:
        """Samples that an arm trains on in a step, of all processes."""
        last = self.rehearsed(arm)["points"][-1]
        return last["samples_trained"] / last["step"]


def make_workload(config: str, overrides: list[str], options: Options) -> Workload:
    """Read a recipe and what is to be compared on it.

    Args:
        config: Name of a recipe, or a file.
        overrides: Options of ``curation fit`` that hold for every run.
        options: The options of the comparison.

    Raises:
        ValueError: If the recipe, an override, a method or an option is wrong.
    """
    file = config if Path(config).is_file() else str(find_recipe(config))
    args = [f"--config={file}", *overrides]
    try:
        recipe = resolve(with_seed(args, 0))
    except ValueError as error:
        raise ValueError(f"{config}: {error}") from error
    if recipe["trainer"]["fast_dev_run"]:
        raise ValueError("Argument `--trainer.fast_dev_run` must be false: it would end every run after a step.")
    if recipe["ckpt_path"] is not None:
        raise ValueError(
            f"Argument `ckpt_path` must be null, since every run of a comparison starts anew, but in {config} it is "
            f"{recipe['ckpt_path']!r}. Weights to start from belong to the arguments of the model."
        )
    callbacks = entries(recipe["trainer"]["callbacks"])
    names = arm_names(config, recipe, callbacks, options.methods)
    if SHORT in names and options.budget[0] in ("seconds", "epochs"):
        raise ValueError(
            f"Argument `--budget` must not be {options.budget[0]} with the arm {SHORT!r}: it trains on as many "
            "samples as uniform selection, which is not known before."
        )
    metric, mode = metric_and_mode(callbacks, options.metric, options.mode)
    name = Path(file).stem
    arms = [make_arm(arm, recipe, kept_fraction(callbacks, options.keep)) for arm in names]
    folder, swept = (options.out / name).resolve(), swept_arms(config, names, options)
    refuse_auto(config, recipe)
    return Workload(name, folder, args, recipe, arms, options.keep, metric, mode, swept=swept)


def refuse_auto(config: str, recipe: dict[str, Any]) -> None:
    """Refuse a recipe that leaves data or a model to what the machine has: a comparison says what it ran on.

    Args:
        config: Name of the recipe, or a file.
        recipe: The resolved configuration.

    Raises:
        ValueError: If ``auto`` is in the recipe; the message has the options that take its place.
    """
    options = {}
    for path, arguments, sources in with_sources(recipe):
        for argument in (name for name in sources if arguments.get(name) == AUTO):
            source = find_source(argument, sources[argument], bool(arguments.get("download")))
            options[f"--{path}.{argument}"] = source.name
    if options:
        given = " ".join(f"{name}={value}" for name, value in options.items())
        raise ValueError(
            f"Argument `{next(iter(options))}` must be given, since a comparison says what it ran on, but in "
            f"{config} it is 'auto'. A fit takes {given} on this machine."
        )


def arm_names(
    config: str, recipe: dict[str, Any], callbacks: list[dict[str, Any]], methods: list[str] | None
) -> list[str]:
    """Names of the arms: the baselines, and the methods or what the recipe has, but for ``by_default: false``.

    Raises:
        ValueError: If a name cannot be the name of a folder, or there is nothing to compare.
    """
    if methods is None:
        arms = recipe.get("arms") or {}
        methods = [name for name, arm in arms.items() if not isinstance(arm, dict) or arm.get("by_default", True)]
        methods = methods or ["recipe"]
    names = list(dict.fromkeys([*BASELINES, *(str(name).strip() for name in methods)]))
    for name in names:
        if not re.fullmatch(r"[\w.+-]+", name) or name.startswith("."):
            raise ValueError(
                f"Argument `--methods` must hold names of letters, digits, _, ., + and -, but got {name!r}."
            )
    if names[len(BASELINES) :] == ["recipe"] and not any(map(chooses, callbacks)):
        raise ValueError(f"Argument `--methods` must be given: {config} has no selection of its own.")
    return names


def swept_arms(config: str, names: list[str], options: Options) -> list[str]:
    """The arms that run at every share of a sweep: those asked for and ``full``, or all.

    Raises:
        ValueError: If one that was asked for is no arm.
    """
    if not options.budget_sweep:
        return []
    asked = names if options.sweep_arms is None else [name.strip() for name in options.sweep_arms]
    for name in asked:
        if name not in names:
            raise ValueError(
                f"Argument `--sweep-arms` must name arms of {config}, {', '.join(names)}, but got {name!r}."
            )
    return [name for name in names if name == "full" or name in asked]


def kept_fraction(callbacks: list[dict[str, Any]], keep: float | None) -> float | None:
    """The ``keep`` that was asked for, or else that of the recipe's selection; None without one."""
    if keep is not None:
        return keep
    return next((c["init_args"]["keep"] for c in callbacks if chooses(c) and "keep" in c["init_args"]), None)


def metric_and_mode(callbacks: list[dict[str, Any]], metric: str | None, mode: str | None) -> tuple[str, str]:
    """The metric that was asked for or that the recipe monitors, and whether small or large is better.

    Raises:
        ValueError: If it is not known which is better.
    """
    monitors = [c["init_args"] for c in callbacks if c["init_args"].get("monitor")]
    metric = metric or (monitors[0]["monitor"] if monitors else "val_loss")
    modes = {monitor["mode"] for monitor in monitors if monitor["monitor"] == metric and "mode" in monitor}
    modes |= {mode_of_name(metric)} - {None}
    if mode is None and len(modes) == 1:
        (mode,) = modes
    if mode is None:
        reason = "is said differently by the recipe and by its name" if modes else "is not known"
        raise ValueError(f"Argument `--mode` must be given: whether a {metric!r} is better large or small {reason}.")
    return metric, mode


def is_validation(metric: str) -> bool:
    """Whether the name of a metric says, in a whole word, that it is one of validation."""
    return not {"val", "valid", "validation"}.isdisjoint(re.split(r"[\W_]+", metric.lower()))


def mode_of_name(metric: str) -> str | None:
    """``"min"`` or ``"max"`` where the name of a metric says it in a whole word; None where it says nothing or more.

    Example:
        >>> mode_of_name("val_loss"), mode_of_name("val/acc"), mode_of_name("val/inaccuracy")
        ('min', 'max', None)
    """
    words = set(re.split(r"[\W_]+", metric.lower()))
    modes = {MODES[word] for word in words & MODES.keys()}
    return modes.pop() if len(modes) == 1 and not words & TURNS else None
