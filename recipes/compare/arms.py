"""What a method changes in a recipe: from the names of ``curation compare`` to the configuration of each run."""

import contextlib
import inspect
import io
import json
import logging
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import yaml
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ProgressBar, Timer
from lightning.pytorch.loggers import WandbLogger
from torch.utils.data import Sampler

from curation.callbacks import (
    AdaptiveBatchSize,
    BatchSizeScheduler,
    DifficultyAdaptiveRollouts,
    DynamicDataPruning,
    GlobalBatchLoadBalancing,
    HardBatchTraining,
    InstanceSelection,
    OnlineSelection,
    TrainingDynamics,
)
from curation.recipes.cli.lightning_cli import run

CALLBACKS = "curation.callbacks."
METHODS: dict[str, dict[str, Any]] = {
    # bit-identical to no callback
    "full": {"class_path": CALLBACKS + "UniformSelection", "init_args": {"keep": 1.0}},
    "uniform": {"class_path": CALLBACKS + "UniformSelection"},
    "short": {"class_path": CALLBACKS + "UniformSelection", "init_args": {"keep": 1.0}},
    "utility_diversity": {"class_path": CALLBACKS + "UtilityDiversitySelection"},
    "concept_aware": {"class_path": CALLBACKS + "ConceptAwareSelection"},
    "loss": {"class_path": CALLBACKS + "HardSampleSelection", "init_args": {"rule": "top"}},
    "grad_norm": {
        "class_path": CALLBACKS + "HardSampleSelection",
        "init_args": {"rule": "top", "score": "grad_norm"},
    },
    "rank": {"class_path": CALLBACKS + "HardSampleSelection", "init_args": {"rule": "rank"}},
    "cdf": {"class_path": CALLBACKS + "HardSampleSelection", "init_args": {"rule": "selective_backprop"}},
    "importance": {
        "class_path": CALLBACKS + "HardSampleSelection",
        "init_args": {"rule": "importance", "score": "grad_norm"},
    },
}


SHORT = "short"  # as full, for as many samples as uniform selection trains on
# Callbacks that end a fit, that nobody would see, or that write to one file for all runs.
LEFT_OUT = (Checkpoint, EarlyStopping, ProgressBar, Timer, TrainingDynamics)


@dataclass
class Arm:
    """What one method changes in a recipe.

    Args:
        name: Name of the arm.
        callbacks: Callbacks that take the place of the recipe's selection; None leaves it.
        overrides: Values of options of ``curation fit``, by dotted name.
    """

    name: str
    callbacks: list[dict[str, Any]] | None = None
    overrides: dict[str, Any] = field(default_factory=dict)


def _import(class_path: str) -> Any:
    module, _, name = class_path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except Exception as error:  # whatever a module of the user's own does
        raise ValueError(f"{class_path!r} cannot be imported: {error!r}") from error


def _with_defaults(callback: dict[str, Any], keep: float | None) -> dict[str, Any]:
    """A callback with the ``keep`` of the comparison and the seed of the run, where it takes them."""
    given = dict(callback.get("init_args") or {})
    accepted = inspect.signature(_import(callback["class_path"])).parameters
    if "keep" in accepted and "keep" not in given:
        if keep is None:
            raise ValueError(
                f"Argument `--keep` must be given: {callback['class_path']} needs it, and the recipe has none."
            )
        given["keep"] = keep
    if "seed" in accepted:
        given.setdefault("seed", "{seed}")
    return {"class_path": callback["class_path"], "init_args": given}


def make_arm(name: str, recipe: dict[str, Any], keep: float | None) -> Arm:
    """The arm of a method.

    Args:
        name: One of the recipe's ``arms``, ``"recipe"``, a name in ``METHODS``, or the class path of a callback or
            of a sampler.
        recipe: The resolved configuration.
        keep: Fraction of each candidate batch.

    Raises:
        ValueError: If the name stands for nothing, or an argument is missing.
    """
    arms = recipe.get("arms") or {}
    if name in arms:
        return _recipe_arm(name, arms[name], keep)
    if name == "recipe":
        return Arm(name)
    if name == SHORT and "full" in arms:
        return _recipe_arm(name, arms["full"], keep)
    if name in METHODS:
        return Arm(name, [_with_defaults(METHODS[name], keep)])
    if "." not in name:
        known = ", ".join([*arms, "recipe", *METHODS])
        raise ValueError(f"Argument `--methods` must name {known}, or class paths, but got {name!r}.")
    cls = _import(name)
    if isinstance(cls, type) and issubclass(cls, Sampler):
        return Arm(name, [], {"data.sampler": {"class_path": name}})
    if isinstance(cls, type) and issubclass(cls, Callback):
        return Arm(name, [_with_defaults({"class_path": name}, keep)])
    raise ValueError(f"Argument `--methods` must name callbacks or samplers, but {name!r} is {cls!r}.")


def _recipe_arm(name: str, options: Any, keep: float | None) -> Arm:
    """An entry of the recipe's ``arms``."""
    callbacks = options.get("callbacks") or [] if isinstance(options, dict) else None
    if not isinstance(callbacks, list) or any(not isinstance(c, dict) or "class_path" not in c for c in callbacks):
        raise ValueError(
            f"Argument `arms` must map a name to options, with `callbacks` a list of class paths, but {name!r} "
            f"is {options!r}."
        )
    overrides = {key: value for key, value in options.items() if key not in ("callbacks", "by_default")}
    return Arm(name, [_with_defaults(c, keep) for c in callbacks], overrides)


def resolve(args: list[str]) -> dict[str, Any]:
    """The configuration that arguments stand for, without making anything.

    Args:
        args: Options of ``curation fit``.

    Raises:
        ValueError: If the parser refuses them.
    """
    messages = io.StringIO()
    logging.disable(logging.INFO)  # of the seed, once for every run
    try:
        with contextlib.redirect_stderr(messages):
            cli = run(args, execute=False, instantiate=False)
    except SystemExit as error:
        if not error.code:
            raise  # help, or a configuration that was to be printed
        raise ValueError(f"\n{messages.getvalue().strip()}".rpartition("\ncuration: ")[2]) from error
    finally:
        logging.disable(logging.NOTSET)
    return yaml.safe_load(cli.parser.dump(cli.config, skip_unset=False))


def entries(section: Any) -> list[dict[str, Any]]:
    """Callbacks or loggers of a configuration as a list, each with its ``init_args``."""
    if section in (None, True, False):
        return []
    return [{"init_args": {}, **entry} for entry in (section if isinstance(section, list) else [section])]


def is_a(entry: dict[str, Any], *classes: type) -> bool:
    """Whether a callback or logger of a configuration is of one of the classes."""
    cls = _import(entry["class_path"])
    return isinstance(cls, type) and issubclass(cls, classes)


def chooses(entry: dict[str, Any]) -> bool:
    """Whether a callback decides what is trained on, so that an arm takes its place."""
    return is_a(
        entry,
        OnlineSelection,
        DynamicDataPruning,
        HardBatchTraining,
        InstanceSelection,
        DifficultyAdaptiveRollouts,
        GlobalBatchLoadBalancing,
        BatchSizeScheduler,
        AdaptiveBatchSize,
    )


def with_seed(value: Any, seed: int) -> Any:
    """Arguments or a part of a configuration, with the seed in the place of ``{seed}``."""
    return json.loads(json.dumps(value).replace('"{seed}"', str(seed)).replace("{seed}", str(seed)))


def resolve_arm(args: list[str], arm: Arm, seed: int) -> dict[str, Any]:
    """The configuration of an arm with a seed, before callbacks and loggers are those of a run.

    Raises:
        ValueError: If the parser refuses the arguments.
    """
    with NamedTemporaryFile("w", suffix=".json") as file:  # as options, strings would be read as what they look like
        file.write(json.dumps(with_seed(arm.overrides, seed)))
        file.flush()
        return resolve([*with_seed(args, seed), f"--config={file.name}", f"--seed_everything={seed}"])


def configure(
    args: list[str],
    arm: Arm,
    seed: int,
    keep: float | None,
    folder: Path,
    group: str,
    meter: dict[str, Any],
    config: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The configuration of one run.

    Args:
        args: Recipe and overrides, as for ``curation fit``.
        arm: The arm.
        seed: Seed of the run; takes the place of ``{seed}`` anywhere, and of the recipe's ``seed_everything``.
        keep: Takes the place of the ``keep`` of the recipe's own selection; None leaves it.
        folder: Folder of the run.
        group: Group of the W&B runs.
        meter: Arguments of the run's ``RunMeter``.
        config: What :func:`resolve_arm` has returned; it is changed. None to call it.

    Raises:
        ValueError: If the parser refuses the arguments.
    """
    config = resolve_arm(args, arm, seed) if config is None else config
    for name in ("arms", "ckpt_path", "same_wandb_run", "weights_only"):
        config.pop(name)
    for name in ("optimizer", "lr_scheduler"):  # of the command line; absent as they are by default
        if config[name] is None:
            config.pop(name)
    trainer = config["trainer"]
    meter = {"class_path": CALLBACKS + "RunMeter", "init_args": {"path": str(folder / "run.json"), **meter}}
    callbacks = _callbacks(entries(trainer["callbacks"]), arm, seed, keep)
    trainer |= {
        "callbacks": [*callbacks, meter],  # last, so that what others do before a validation ends is off the clock
        "logger": _loggers(entries(trainer["logger"]), folder, f"{arm.name}-{seed}", group, arm.name),
        "default_root_dir": str(folder),
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "num_sanity_val_steps": 0,
        "max_time": None,
        "min_steps": None,
        "min_epochs": None,
    }
    return config


def _callbacks(callbacks: list[dict[str, Any]], arm: Arm, seed: int, keep: float | None) -> list[dict[str, Any]]:
    """The recipe's callbacks with those of the arm, without what ends a fit or nobody would see."""
    callbacks = [c for c in callbacks if not is_a(c, *LEFT_OUT)]
    if arm.callbacks is not None:
        return [c for c in callbacks if not chooses(c)] + with_seed(arm.callbacks, seed)
    if keep is None:
        return callbacks
    return [{**c, "init_args": {**c["init_args"], "keep": keep}} if chooses(c) else c for c in callbacks]


def _loggers(
    loggers: list[dict[str, Any]], folder: Path, name: str, group: str, job_type: str
) -> list[dict[str, Any]]:
    """A CSV logger, and the recipe's W&B loggers under the name of the run."""
    place = {"save_dir": str(folder)}
    csv = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {**place, "name": "", "version": ""},
    }
    wandb = []
    for logger in loggers:
        if is_a(logger, WandbLogger):
            given = {k: v for k, v in logger["init_args"].items() if k not in ("id", "version", "resume", "dir")}
            named = {**given, **place, "name": name, "group": group, "job_type": job_type}
            wandb.append({"class_path": logger["class_path"], "init_args": named})
    return [csv, *wandb]
