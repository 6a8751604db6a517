"""``curation select``: the samples of a recipe's training set that are worth training on, in an index file.

``curation select --config RECIPE --output FILE.parquet`` keeps 4 %, and says what a probe that is trained on them
retains, beside as many at random; both are drawn anew for every seed. The file holds the selection of the first seed,
and ``curation.callbacks.InstanceSelection(index="FILE.parquet")`` trains on it. The same command again, after it was
interrupted, goes on with the index that is there.

``curation select --config RECIPE --target FILE --output FILE.parquet`` keeps the 10 % that rank first for examples of
a target (``curation.instances.TargetedSelector``), of a file or a data set on the hub; or with ``--losses BEFORE
AFTER`` those whose loss training on the target lowers most; the files are those of ``curation irreducible``. No probe
measures these: they are chosen for the target alone. Near-duplicates are reported, and left out with
``--duplicates=.95``; with ``--decontaminate FILE`` texts are left out that share 13 words in a row with one of the
file.

``curation select --features FILE --labels FILE.npy --memory 4GB --output FILE.parquet`` keeps 4 % of features that
need not fit in memory, by coverage, without a recipe and unprobed. After it was killed the same command goes on.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import pickle
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from curation.callbacks.lightning.loggers import log_image, takes_media
from curation.checks import check_integer, check_number
from curation.evaluation.retention import Part, Retention, retention
from curation.instances import FeatureShards, contaminated, near_duplicates
from curation.instances.contamination import WORD
from curation.instances.selection import index_of_selector, read_selection
from curation.instances.selection_index import SelectionIndex, fingerprint
from curation.recipes.cli.lightning_cli import run
from curation.recipes.instance_selection.features import (
    features_and_labels,
    in_order,
    load_weights,
    read_array,
    read_features,
)
from curation.recipes.instance_selection.from_files import check_options, select_from_files, shards_of
from curation.recipes.instance_selection.retention_report import draw_retention, kept_report, retention_report
from curation.recipes.instance_selection.selecting import make_object, takes
from curation.recipes.instance_selection.target_picture import draw_target
from curation.recipes.pictures import save_picture

BUDGET = 0.04
FILES = (".npy", ".jsonl", ".json", ".parquet")  # of a target
SIMILARITY, WORDS = 0.95, 13  # of near-duplicates; words in a row that are shared with a test
TARGETED = "curation.instances.TargetedSelector"
COVERAGE = "curation.instances.CoverageInstanceSelector"
SELECTOR = "curation.instances.GraphAttentionInstanceSelector"
PROBE, REGRESSION_PROBE = "sklearn.ensemble.RandomForestClassifier", "sklearn.ensemble.RandomForestRegressor"
REPEATS = 5
HUB_PARTS = re.compile(r":(?![^\[]*\])")  # of org/name:configuration:train[:64]
REPORT = ("output", "picture", "probe", "repeats")  # options that change the report, but not the selection


def main(args: list[str]) -> None:
    """``curation select --config RECIPE --output FILE [options] [overrides]``.

    Raises:
        ValueError: If an option is wrong, or the recipe cannot be selected from.
        OSError: If a file to write exists or cannot be written.
    """
    options, overrides = parse(args)
    if options.memory is not None:
        select_from_files(options, make_selector(options))
        return
    targeted = bool(options.target or options.losses)
    if targeted:
        options.selector = TARGETED
    selector: Any = None if options.index else make_selector(options)
    make_object("probe", options.probe, {}, {})
    if options.output.exists():
        made_before(options, overrides, selector)  # raises now
    trainer, module, data = make_recipe(overrides)
    for file in filter(None, (options.output, options.picture)):
        file.parent.mkdir(parents=True, exist_ok=True)  # what cannot be written is said before the work
    began = time.perf_counter()
    if options.ckpt_path is not None:
        load_weights(module, options.ckpt_path)
    elif options.layer is not None:
        print(f"layer {options.layer} of the model as the recipe makes it; --ckpt_path takes a trained one")
    needs_classes = selector is not None and getattr(selector, "needs_classes", True)

    def read(part: str, title: str) -> tuple[Any, Part]:
        samples = in_order(loader(data, part))
        return samples, features_and_labels(trainer, module, samples, options.layer, title, needs_classes)

    if options.target:  # what cannot be read is said before the pool is
        selector.targets = {name: examples(name, data) for name in options.target}
        selector.weights = options.weights
    train_loader, train = read("train", "training")
    x, y = train
    labels = None if np.isnan(y).all() else y
    validation = None if labels is None or targeted else read("val", "validation")[1]
    features = x if options.features is None else given_features(options, len(y))
    if options.losses:
        selector.losses = [read_losses(file, len(y)) for file in options.losses]
    if targeted:
        selector.exclude = left_out(options, features, data)
    seconds = time.perf_counter() - began
    if options.output.exists():
        index = made_before(options, overrides, selector, train_loader.dataset)
        print(f"index: {options.output}, made before by this command", flush=True)
    else:
        began = time.perf_counter()
        index = select(options, overrides, selector, features, labels, train_loader.dataset)
        print(
            f"{options.index or options.selector}: features in {seconds:.1f} s, selected in "
            f"{time.perf_counter() - began:.1f} s"
        )
        print(f"index: {options.output}", flush=True)
    retained = None
    if targeted:
        print("\n".join(kept_report(y, index.indices)))
    if options.losses:
        return
    if options.target:
        targets = np.concatenate(list(selector.targets.values()))
        figure = draw_target(features, labels, index.indices, targets, getattr(data, "names", None))
        log_image(trainer, "instances/selection", figure)
        if options.picture is not None:
            save_picture(figure, options.picture)
            print(f"picture: {options.picture}")
        return
    if validation is None:
        print("\n".join([*kept_report(y, index.indices), "no labels, so no probe says what is retained"]))
    else:
        if y.dtype.kind == "f" and options.probe == PROBE:
            options.probe = REGRESSION_PROBE
        retained = measure(options, train, validation, selections(options, index, features, labels))
        name = f"{options.probe}, on {len(validation[1]):,} validation samples"
        print(retention_report(y, index.indices, retained, name))
    if options.picture is not None or takes_media(trainer):
        colours = np.zeros(len(y), np.int64) if labels is None else y
        figure = draw_retention(features, colours, index.indices, retained)
        log(trainer, figure, retained)
        if options.picture is not None:
            save_picture(figure, options.picture)
            print(f"picture: {options.picture}")


def parse(args: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of the command, and the arguments for the recipe.

    Raises:
        ValueError: If an option is out of its range.
        OSError: If the picture exists.
    """
    options, overrides = parser().parse_known_args(args)
    if options.picture is not None and options.picture.exists():
        raise FileExistsError(f"Argument `--picture` must name a new file, but {str(options.picture)!r} exists.")
    for name in ("ckpt_path", "features", "index", "decontaminate"):
        file = getattr(options, name)
        shards = name == "features" and (options.target or options.memory) and Path(file or "").is_dir()
        if file is not None and not shards and not Path(file).is_file():
            raise ValueError(f"Argument `--{name}` must name a file, but there is no {file!r}.")
    if options.ckpt_path is not None and options.layer is None:
        raise ValueError("Argument `--layer` must be given with `--ckpt_path`, but got None.")
    for file in options.losses or ():
        if not Path(file).is_file():
            raise ValueError(f"Argument `--losses` must name a file, but there is no {file!r}.")
    for name in options.target or ():
        if not Path(name).is_file() and (":" not in name or Path(name).suffix in FILES):
            raise ValueError(
                "Argument `--target` must name a file, or a data set of the hub and its split as in org/name:train, "
                f"but there is no {name!r}."
            )
    if options.weights is not None:
        options.weights = _weights(options.weights, len(options.target or ()))
    _check_target(options)
    check_options(options, overrides)
    if options.index is not None and (options.selector, options.budget, options.options) != (SELECTOR, None, "{}"):
        raise ValueError(
            "Argument `--index` must be left out with `--selector`, `--budget` and `--options`, but got "
            f"{options.index!r}."
        )
    if options.budget is not None:
        check_number("--budget", options.budget, "(0, 1)")
    check_integer("--repeats", options.repeats, 2)
    check_integer("--seed", options.seed, 0, 2**63)
    try:
        options.options = dict(json.loads(options.options))
    except (ValueError, TypeError) as error:
        raise ValueError(f"Argument `--options` must be a JSON object, but got {options.options!r}.") from error
    return options, overrides


def _weights(text: str, count: int) -> list[float]:
    """A weight for each target."""
    try:
        weights = [float(weight) for weight in text.split(",")]
    except ValueError:
        weights = []
    if len(weights) != count or not all(0 < weight < np.inf for weight in weights):
        raise ValueError(
            f"Argument `--weights` must be a number > 0 for each of {count} `--target`, as in 3,1, but got {text!r}."
        )
    return weights


def _check_target(options: argparse.Namespace) -> None:
    """Refuse options that go with a target, or without one, only."""
    if options.target and options.losses:
        raise ValueError("Argument `--target` must be left out with `--losses`, which are of a target.")
    name = "--target" if options.target else "--losses" if options.losses else ""
    if name and (options.selector, options.index) != (SELECTOR, None):
        raise ValueError(f"Argument `{name}` must be left out with `--selector` and `--index`: it has a selector.")
    if name and (options.probe, options.repeats) != (PROBE, REPEATS):
        raise ValueError(f"Argument `{name}` must be left out with `--probe` and `--repeats`: nothing is probed.")
    if options.losses and options.picture is not None:
        raise ValueError("Argument `--picture` must be left out with `--losses`: it shows likeness to examples.")
    for option in ("decontaminate", "duplicates"):
        if not name and getattr(options, option) is not None:
            raise ValueError(f"Argument `--{option}` needs `--target` or `--losses`.")
    if options.duplicates is not None:
        check_number("--duplicates", options.duplicates, "(0, 1]")
        if options.features is not None and os.path.isdir(options.features):
            raise ValueError("Argument `--duplicates` must be left out where `--features` is a folder.")
    check_integer("--ngram", options.ngram, 1)


def parser() -> argparse.ArgumentParser:
    """The parser of the command's own options."""
    parser = argparse.ArgumentParser("curation select", description=__doc__, allow_abbrev=False)
    parser.add_argument("--output", required=True, type=Path, help="file for the index (Parquet)")
    parser.add_argument(
        "--budget", type=float, help=f"share of the samples to keep (default {BUDGET}; with --target .1)"
    )
    parser.add_argument(
        "--selector",
        default=SELECTOR,
        metavar="CLASS_PATH",
        help="class of the selector (%(default)s)",
    )
    parser.add_argument(
        "--target",
        action="append",
        metavar="NAME",
        help="examples of what the model shall be good at: .npy [M, D], or .jsonl or .parquet with a column `text` "
        "(or `question`), which the recipe's data module embeds, or so a split of a data set on the hub, as "
        "org/name:split or org/name:configuration:split; again for each further target",
    )
    parser.add_argument(
        "--weights",
        metavar="W,W",
        help="a weight for each --target, as in 3,1: they give examples in proportion (default: as many of each)",
    )
    parser.add_argument(
        "--losses",
        nargs=2,
        metavar=("BEFORE", "AFTER"),
        help="in the place of --target: losses [N] by a model and by the same after training on the target, .npy or "
        "the .pt of `curation irreducible`",
    )
    parser.add_argument(
        "--duplicates",
        type=float,
        metavar="SIMILARITY",
        help="leave out near-duplicates, from this cosine similarity on (default: report those from "
        f"{SIMILARITY} on)",
    )
    parser.add_argument(
        "--decontaminate",
        metavar="FILE",
        help="leave out texts that share words in a row with a test, .jsonl or .parquet with a column `text`",
    )
    parser.add_argument("--ngram", type=int, default=WORDS, help="how many words in a row (%(default)s)")
    parser.add_argument(
        "--options", default="{}", metavar="JSON", help="its other arguments, as '{\"n_neighbors\": 5}'"
    )
    parser.add_argument(
        "--index",
        metavar="FILE",
        help="a selection to measure in the place of a selector's: .npy with indices or a mask, or an index",
    )
    parser.add_argument("--layer", help="submodule whose output are the features (default: the inputs, flattened)")
    parser.add_argument("--ckpt_path", help="checkpoint of the module, for --layer")
    parser.add_argument(
        "--features",
        metavar="FILE.npy",
        help="[N, D], to select by in the place of the probe's; with --target also a folder of Parquet files with a "
        "column `features`, which are not read into memory",
    )
    parser.add_argument(
        "--memory",
        metavar="4GB",
        help="in the place of a recipe: select from --features, a .npy file or a folder of .npy, Arrow and Parquet "
        "files, in shards that fit, by coverage",
    )
    parser.add_argument("--labels", metavar="FILE.npy", help="with --memory, classes or numbers [N]")
    parser.add_argument("--jobs", type=int, help="with --memory, shards at once (default: one a core, if they fit)")
    parser.add_argument(
        "--probe",
        default=PROBE,
        metavar="CLASS_PATH",
        help="class of what says what the selection retains (%(default)s; of numbers the regressor)",
    )
    parser.add_argument(
        "--repeats", type=int, default=REPEATS, help="selections, and as many random ones (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="first seed of the selector and of the probes")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw what was kept, and what it retains")
    return parser


def make_selector(options: argparse.Namespace, repeat: int = 0) -> Any:
    """The selector of a repeat, with the budget and the seed where it takes them."""
    required = options.options | ({} if options.budget is None else {"budget": options.budget})
    if options.memory is not None:
        class_path = COVERAGE if options.selector == SELECTOR else options.selector
        accepted = {
            "budget": BUDGET,
            "random_state": options.seed,
            "folder": shards_of(options.output),
            "verbose": True,
        }
        accepted["n_jobs"] = -1 if options.jobs is None else options.jobs
        accepted = {name: value for name, value in accepted.items() if name not in required}
        return make_object("selector", class_path, accepted, required | {"memory": options.memory})
    targeted = options.target or options.losses
    defaults = {"random_state": options.seed + repeat} | ({"verbose": True} if targeted else {"budget": BUDGET})
    accepted = {name: value for name, value in defaults.items() if name not in required}
    return make_object("selector", options.selector, accepted, required)


def examples(name: str, data: LightningDataModule) -> np.ndarray:
    """The features of the examples in a file or a split of the hub, ``[M, D]``.

    Raises:
        ValueError: If it has no texts, or the data module cannot embed them.
    """
    if name.endswith(".npy"):
        return read_array("--target", name)
    if not hasattr(data, "features_of"):
        raise ValueError(
            f"Argument `--target` must be a .npy file of features [M, D] with this recipe, whose "
            f"{type(data).__name__} has no method `features_of(texts)`, but got {name!r}."
        )
    return data.features_of(read_texts("--target", name)).numpy()


def read_texts(option: str, name: str) -> list[str]:
    """The texts in a ``.jsonl`` or ``.parquet`` file, or in a split of a data set on the hub or in its cache.

    Args:
        option: What names it.
        name: A file; or a data set and its split, ``org/name:split`` or ``org/name:configuration:split``. A folder
            is a data set, too.

    Raises:
        ValueError: If it cannot be read, or has no column of texts.
    """
    import datasets

    try:
        if Path(name).is_file():
            kind = "parquet" if name.endswith(".parquet") else "json"
            rows = datasets.load_dataset(kind, data_files=name, split="train")
        else:
            source, *configuration, split = HUB_PARTS.split(name)
            rows = datasets.load_dataset(source, *configuration, split=split)
    except (OSError, ValueError, TypeError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"Argument `{option}` must name texts, but {name!r} cannot be read: {error}") from error
    column = next((name for name in ("text", "question", "prompt") if name in rows.column_names), None)
    if column is None:
        raise ValueError(
            f"Argument `{option}` must have a column text, question or prompt, but {name!r} has "
            f"{', '.join(rows.column_names)}."
        )
    return rows[column][:]


def given_features(options: argparse.Namespace, count: int) -> Any:
    """Features ``[N, D]`` of a ``.npy`` file, or of a folder of Parquet files.

    Raises:
        ValueError: If there is not a row for each of ``count`` training samples.
    """
    if not os.path.isdir(options.features):
        return read_features(options.features, count)
    shards = FeatureShards(options.features)
    if len(shards) != count:
        raise ValueError(
            f"Argument `--features` must hold [{count}, D], a row for each training sample, but {options.features!r} "
            f"has {list(shards.shape)}."
        )
    return shards


def read_losses(file: str, count: int) -> np.ndarray:
    """Losses ``[N]`` in a ``.npy`` file, or in one of ``curation irreducible``.

    Raises:
        ValueError: If the file does not hold a loss for each of ``count`` training samples.
    """
    if file.endswith(".npy"):
        losses = read_array("--losses", file)
    else:
        try:
            losses = torch.load(file, map_location="cpu", weights_only=True).numpy()
        except (pickle.UnpicklingError, EOFError, RuntimeError, AttributeError) as error:
            raise ValueError(f"Argument `--losses` must name files of losses, but got {file!r}: {error}") from error
    if losses.shape != (count,):
        raise ValueError(
            f"Argument `--losses` must hold [{count}], a loss for each training sample, but {file!r} has "
            f"{list(losses.shape)}."
        )
    return losses


def left_out(options: argparse.Namespace, features: Any, data: LightningDataModule) -> np.ndarray:
    """The rows that may not stay, bool ``[N]``: near a test, and near-duplicates where asked for; and say how many.

    Raises:
        ValueError: If the data module has no texts to compare with tests.
    """
    out = np.zeros(len(features), bool)
    if options.decontaminate:
        texts = getattr(data, "train_texts", None)
        if not texts:
            name = type(data).__name__
            raise ValueError(
                f"Argument `--decontaminate` needs a data module with `train_texts`, but {name} has none."
            )
        tests = read_texts("--decontaminate", options.decontaminate)
        out = contaminated(texts, tests, options.ngram)
        short = sum(len(WORD.findall(test)) < options.ngram for test in tests)
        print(
            f"{out.sum():,} of {len(out):,} samples left out: they share {options.ngram} words in a row with a test; "
            f"{short:,} of {len(tests):,} tests have fewer words, and are not looked for"
        )
    if isinstance(features, FeatureShards):
        print("near-duplicates are not looked for in Parquet files")
        return out
    similarity = SIMILARITY if options.duplicates is None else options.duplicates
    repeats = near_duplicates(features, similarity)
    done = "not left out" if options.duplicates is None else "left out"
    print(f"{repeats.sum():,} of {len(out):,} samples are near-duplicates (cosine >= {similarity:g}), {done}")
    return out if options.duplicates is None else out | repeats


def make_recipe(overrides: list[str]) -> tuple[Trainer, LightningModule, LightningDataModule]:
    """Trainer, module and data module of a recipe; the data are set up.

    Raises:
        ValueError: If the recipe has no data module, or several processes.
    """
    cli = run(overrides, execute=False)
    if cli.datamodule is None:
        raise ValueError("Argument `--config` must name a recipe with a data module.")
    if cli.trainer.world_size > 1:
        raise ValueError(f"A selection is made by one process, but the trainer has {cli.trainer.world_size}.")
    cli.trainer.strategy.connect(cli.model)  # a data module may ask its trainer for it
    cli.datamodule.trainer = cli.trainer
    cli.datamodule.prepare_data()
    cli.datamodule.setup("fit")
    return cli.trainer, cli.model, cli.datamodule


def select(
    options: argparse.Namespace,
    overrides: list[str],
    selector: Any,
    features: np.ndarray,
    labels: np.ndarray | None,
    dataset: Any,
) -> SelectionIndex:
    """Fit the selector, or read ``--index``, and save the index of what is selected.

    Raises:
        ValueError: If the selector has no ``sample_indices_`` after ``fit``, or the file holds no selection of the
            data.
    """
    config = json.dumps(configuration(options, overrides, selector), default=str)  # paths
    if selector is None:
        index = read_selection("--index", options.index, len(dataset))
        index = dataclasses.replace(index, fingerprint=fingerprint(dataset), config=config)
    else:
        selector.fit(features, labels)
        if not hasattr(selector, "sample_indices_"):
            raise ValueError(
                f"Argument `--selector` must have `sample_indices_` after `fit`, but {options.selector} has not."
            )
        index = index_of_selector(selector, len(dataset), fingerprint(dataset), config)
    index.save(options.output)
    return index


def selections(
    options: argparse.Namespace, index: SelectionIndex, features: np.ndarray, labels: np.ndarray | None
) -> list[np.ndarray]:
    """The selection of each repeat: of a selector with a seed, which the options leave open, one with each seed."""
    if options.index or "random_state" in options.options or not takes(options.selector, "random_state"):
        return [index.indices] * options.repeats
    from rich.progress import track

    selected = [index.indices]
    for repeat in track(range(1, options.repeats), "selecting"):
        selector = make_selector(options, repeat)
        selector.fit(features, labels)
        selected.append(np.unique(selector.sample_indices_))
    return selected


def configuration(options: argparse.Namespace, overrides: list[str], selector: Any) -> dict[str, Any]:
    """How a selection is made: options, recipe, and hashes of the files that they name."""
    several = (*(options.target or ()), *(options.losses or ()))
    files = (options.ckpt_path, options.features, options.index, options.decontaminate, *several)
    named = [text.rpartition("=")[2] for text in (*overrides, *files) if text]
    folders = [Path(name) for name in named if os.path.isdir(name)]
    named += [str(file) for folder in folders for file in sorted(folder.glob("*.parquet"))]
    hashes = {file: hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in named if os.path.isfile(file)}
    return vars(options) | {"budget": getattr(selector, "budget", None), "recipe": overrides, "files": hashes}


def made_before(
    options: argparse.Namespace, overrides: list[str], selector: Any, dataset: Any = None
) -> SelectionIndex:
    """The index that an earlier, interrupted run of the same command has written.

    Args:
        options: Options of the command.
        overrides: Arguments for the recipe.
        selector: The selector, which has not been fitted; None with ``--index``.
        dataset: The training set; None where it is not made yet.

    Raises:
        OSError: If the file is another, or its selection was made in another way.
    """
    wanted = json.loads(json.dumps(configuration(options, overrides, selector), default=str))
    try:
        index = SelectionIndex.load(options.output)
        config = json.loads(index.config)
        same = all(config.get(name) == wanted[name] for name in wanted if name not in REPORT)
    except (ValueError, AttributeError):
        same = False
    if not same or (dataset is not None and (index.size, index.fingerprint) != (len(dataset), fingerprint(dataset))):
        raise FileExistsError(
            f"Argument `--output` must name a new file, but {str(options.output)!r} exists, and this command did not "
            "make it."
        )
    return index


def loader(data: LightningDataModule, part: str) -> Any:
    """The loader of a data module for ``"train"`` or ``"val"``.

    Raises:
        ValueError: If the data module has none.
    """
    try:
        return getattr(data, f"{part}_dataloader")()
    except MisconfigurationException as error:
        raise ValueError(f"{type(data).__name__} must have a `{part}_dataloader`. {error}") from error


def measure(options: argparse.Namespace, train: Part, validation: Part, selected: list[np.ndarray]) -> Retention:
    """What probes retain that are trained on the selection of each repeat, and on as many random samples."""
    from rich.progress import track

    def probe(seed: int) -> Any:
        return make_object("probe", options.probe, {"random_state": seed, "n_jobs": -1}, {})

    return retention(
        train,
        validation,
        selected,
        probe,
        options.repeats,
        options.seed,
        lambda seeds: track(seeds, "probing"),
    )


def log(trainer: Trainer, figure: Any, retained: Retention | None) -> None:
    """Log the picture and the numbers to W&B, where the recipe has it."""
    log_image(trainer, "instances/selection", figure)
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger) and retained is not None:
            logger.log_metrics(
                {
                    "instances/retention": retained.of_selected.mean(),
                    "instances/retention_vs_random": (retained.of_selected - retained.of_random).mean(),
                    "instances/kept_fraction": 1 - retained.reduction,
                }
            )
