"""What a comparison is asked for: recipes, methods, seeds, the budget, and how the runs are executed."""

import argparse
import itertools
import math
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from curation.checks import check_choice, check_integer, check_number
from curation.recipes.compare.arms import METHODS

BUDGETS = ("steps", "samples", "epochs", "flops", "seconds")
WANTED_BUDGETS = 4  # of a sweep; fewer say little of the curves between them
OF_FIT = ("arms", "config", "data", "lr_scheduler", "model", "optimizer", "trainer")  # and not those of `compare`
BACKENDS = ("threading", "dask", "ray", "loky")  # the last is the old name of the first


@dataclass
class Options:
    """The options of ``curation compare``.

    Args:
        recipes: Names of recipes, or files.
        methods: Names of methods, of the recipe's arms, or class paths; None for the recipe's arms.
        keep: Fraction of each candidate batch that is kept; None for the recipe's.
        seeds: Number of runs of each arm.
        budget: What every run has the same amount of (``"steps"``, ``"samples"``, ``"epochs"``, ``"flops"`` or
            ``"seconds"``), and the amount; None for as much as uniform selection spends on the recipe. With
            ``"epochs"`` the arms may differ in steps, which no rehearsal has to know before.
        budget_sweep: Shares of the budget, rising, at each of which the arms of the sweep run; empty for no sweep.
        sweep_arms: Names of the arms that run at every share, beside ``full``; the others have the whole budget only.
            None for all arms.
        metric: Metric of validation; None for what the recipe monitors.
        mode: ``"min"`` or ``"max"``, what is better; None for what the recipe says.
        target: Value of the metric for the time to a target; None for what uniform selection always reaches.
        backend: Backend of joblib: ``"threading"``, ``"dask"`` or ``"ray"``.
        jobs: Runs side by side.
        out: Folder of the comparison.

    Raises:
        ValueError: If an option is out of its range, or its package is missing.
    """

    recipes: list[str]
    methods: list[str] | None = None
    keep: float | None = None
    seeds: int = 5
    budget: tuple[str, float | None] = ("steps", None)
    budget_sweep: tuple[float, ...] = ()
    sweep_arms: list[str] | None = None
    metric: str | None = None
    mode: str | None = None
    target: float | None = None
    backend: str = "threading"
    jobs: int = 1
    out: Path = Path("runs/compare")

    def __post_init__(self) -> None:
        gpus = max(1, torch.cuda.device_count())
        names = [Path(recipe).stem for recipe in self.recipes]
        check_integer("--seeds", self.seeds, 1)
        check_integer("--jobs", self.jobs, 1)
        if self.budget[0] == "seconds" and self.jobs > gpus:
            raise ValueError(
                f"Argument `--jobs` must be at most {gpus} with a budget of seconds, since runs on one device slow "
                f"each other, but got {self.jobs}."
            )
        self._check_sweep()
        check_choice("--backend", self.backend, BACKENDS)
        package = {"dask": "distributed", "ray": "ray"}.get(self.backend)
        if package is not None and find_spec(package) is None:
            raise ValueError(f"Argument `--backend={self.backend}` needs `pip install {package}`.")
        if self.keep is not None:  # on the command line there is no None to name
            check_number("--keep", self.keep, "(0, 1]")
        if self.target is not None and not math.isfinite(self.target):
            raise ValueError(f"Argument `--target` must be a finite number, but got {self.target!r}.")
        if len(set(names)) < len(names):
            raise ValueError(f"Argument `recipes` must have different names, but got {' '.join(self.recipes)}.")

    def _check_sweep(self) -> None:
        shares = self.budget_sweep
        if self.sweep_arms is not None and not shares:
            raise ValueError("Argument `--sweep-arms` must be left out without `--budget-sweep`.")
        if shares and self.budget[0] == "seconds":
            raise ValueError(
                "Argument `--budget-sweep` needs a `--budget` in steps, samples or flops: with seconds the length of "
                "a run is not known before, and no schedule can end with it."
            )
        if 0 < len(shares) < WANTED_BUDGETS:
            rank_zero_warn(
                f"Sweep: {len(shares)} budgets say little of the curves between; {WANTED_BUDGETS} are a start."
            )


def read_shares(text: str) -> tuple[float, ...]:
    """Shares of the budget.

    Args:
        text: As on the command line: numbers with commas.

    Raises:
        ValueError: If they are not at least two, positive, finite, rising, or 1 is not among them.

    Example:
        >>> read_shares("0.25,0.5,1,2")
        (0.25, 0.5, 1.0, 2.0)
    """
    try:
        shares = tuple(map(float, text.split(",")))
    except ValueError:
        shares = ()
    rising = all(a < b for a, b in itertools.pairwise((0.0, *shares, math.inf)))  # NaN is not
    if len(shares) < 2 or not rising or 1 not in shares:
        raise ValueError(
            "Argument `--budget-sweep` must be at least two positive shares of the budget, rising, with 1 among "
            f"them, as in 0.25,0.5,1,2, but got {text!r}."
        )
    return shares


def read_budget(text: str) -> tuple[str, float | None]:
    """Unit and amount of a budget.

    Args:
        text: As on the command line: a unit, or a unit with an amount.

    Raises:
        ValueError: If the unit is unknown, or the amount is not positive and finite (for steps, samples and epochs,
            below 1).

    Example:
        >>> read_budget("steps=500"), read_budget("flops")
        (('steps', 500.0), ('flops', None))
    """
    unit, equals, amount = text.partition("=")
    try:
        value = float(amount) if equals else None
    except ValueError:
        value = 0.0
    least = 1.0 if unit in ("steps", "samples", "epochs") else 0.0
    if unit not in BUDGETS or (value is not None and not (least <= value < math.inf and value > 0)):
        raise ValueError(
            f"Argument `--budget` must be {', '.join(BUDGETS)}, "
            f"or one with an amount, as in steps=500, but got {text!r}."
        )
    return unit, value


def parse(args: list[str]) -> tuple[Options, list[str]]:
    """The options of the command, and the overrides of the recipe.

    Raises:
        ValueError: If an option is out of its range, or seems to be misspelt.
    """
    given, overrides = parser().parse_known_args(args)
    if any(word.startswith("--seed_everything") for word in overrides):
        raise ValueError("Argument `--seed_everything` must be left out: every run has its own; see `--seeds`.")
    own = [name.replace("_", "-") for name in vars(given)]
    for name in (word.partition("=")[0].removeprefix("--") for word in overrides if word.startswith("--")):
        near = get_close_matches(name, own, 1, 0.7) if "." not in name and name not in OF_FIT else []
        if near:
            raise ValueError(f"`--{name}` is no option; the nearest is `--{near[0]}`.")
    out = given.out or Path("runs/compare") / "-".join(Path(recipe).stem for recipe in given.recipes)
    options = Options(
        given.recipes,
        methods=None if given.methods is None else given.methods.split(","),
        keep=given.keep,
        seeds=given.seeds,
        budget=read_budget(given.budget),
        budget_sweep=() if given.budget_sweep is None else read_shares(given.budget_sweep),
        sweep_arms=None if given.sweep_arms is None else given.sweep_arms.split(","),
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
        help="what is held equal: steps, samples, epochs, flops or seconds; with an amount as in steps=500 (default: "
        "steps, as many as uniform selection spends on the recipe)",
    )
    parser.add_argument(
        "--budget-sweep",
        help="shares of the budget, as in 0.25,0.5,1,2: every arm runs at each, its schedule annealed to it, and the "
        "report says at what share of full's cost a method is as good",
    )
    parser.add_argument("--sweep-arms", help="arms that run at every share, beside full (default: all)")
    parser.add_argument("--metric", help="metric of validation (default: what the recipe monitors, or val_loss)")
    parser.add_argument("--mode", choices=("min", "max"), help="what is better (default: as the recipe monitors it)")
    parser.add_argument(
        "--target", type=float, help="for the time to a target (default: what uniform always reaches)"
    )
    parser.add_argument("--backend", choices=BACKENDS, default="threading", help="backend of joblib (%(default)s)")
    parser.add_argument("--jobs", type=int, help="runs side by side (default: one for every GPU, or one)")
    parser.add_argument("--out", type=Path, help="folder (default: runs/compare/RECIPE)")
    return parser
