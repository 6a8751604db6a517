"""``curation audit RECORD --output FILE``: which labels are suspicious, by the record of a training run.

``TrainingDynamics("record.parquet")`` in a fit writes the record. The command ranks all samples. With ``--config``
and the overrides of the fit it knows the data, and ``--page page.html`` shows them. ``--apply drop --index FILE``
writes what ``SelectedDataModule`` and ``InstanceSelection`` train on.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from curation.audit import ThresholdSamples, conflicting_pairs
from curation.callbacks.lightning.loggers import log_image, log_table
from curation.checks import check_integer, check_number
from curation.files import replacing
from curation.instances.selection_index import fingerprint
from curation.recipes.audit.apply import ACTIONS, apply_audit, random_baseline
from curation.recipes.audit.audit import KINDS, Audit, groups_of, write_audit
from curation.recipes.audit.page import as_page
from curation.recipes.audit.pictures import draw_audit
from curation.recipes.cli.select import loader, make_recipe
from curation.recipes.instance_selection.features import (
    features_and_labels,
    in_order,
    load_weights,
    read_array,
    read_features,
)
from curation.recipes.pictures import save_picture
from curation.recipes.pretrained import load_tokenizer
from curation.records import SampleDynamics
from curation.records.ledger import Ledger
from curation.sample_ids import SampleIds

BY = ("auto", "margin", "probability_margin")


def main(args: list[str]) -> None:
    """``curation audit RECORD --output FILE [options] [--config RECIPE overrides]``.

    Raises:
        ValueError: If an option is wrong, or the record is of another data set than the recipe's.
        OSError: If a file exists or cannot be written.
    """
    options, overrides = parse(args)
    dynamics = SampleDynamics.load(options.record)
    trainer = module = train = dataset = None
    if overrides:
        trainer, module, data = make_recipe(overrides)
        train = loader(data, "train")
        dataset = without_ids(train.dataset)
        check_same_data(options.record, dynamics, dataset)
    threshold, inner = options.threshold, dataset
    if isinstance(dataset, ThresholdSamples):
        threshold, inner = dataset.ids, dataset.dataset
    pairs = find_pairs(options, dynamics["label"], threshold, trainer, module, train)
    kept = None if options.ledger is None else Ledger(options.ledger).counts(len(dynamics))[1]
    groups = groups_of(dataset, options.slice)
    audit = Audit(dynamics, threshold, options.count, groups, kept, pairs, options.by)
    print("\n".join(audit.summary()))
    if options.apply is not None:
        same = fingerprint(inner) if inner is not None else dynamics.fingerprint if threshold is None else ""
        config = {"record": options.record, "count": audit.count, "recipe": overrides}
        written = apply_audit(audit, options.apply, options.index, same, options.weight, config)
        print(f"{written}: {options.index}")
        if options.baseline is not None:
            random_baseline(audit, options.baseline, same, options.seed, config)
            print(f"as many at random left out: {options.baseline}")
    write_audit(audit, options.output)
    print(f"table: {options.output}")
    figure = draw_audit(audit)
    if options.picture is not None:
        save_picture(figure, options.picture)
        print(f"picture: {options.picture}")
    if options.page is not None:
        tokenizer = None if options.tokenizer is None else load_tokenizer(options.tokenizer)
        title = f"Audit of {options.record}"
        with replacing(options.page) as new:
            new.write_text(as_page(audit, figure, title, dataset, options.rows, tokenizer), encoding="utf-8")
        print(f"page: {options.page}")
    if options.log and trainer is not None:
        columns = {name: values[: options.rows] for name, values in audit.table().items()}
        rows = [[value.item() for value in row] for row in zip(*columns.values(), strict=True)]
        log_table(trainer, "audit/suspects", list(columns), rows)
        log_image(trainer, "audit/map", figure)


def find_pairs(
    options: argparse.Namespace,
    labels: np.ndarray,
    threshold: np.ndarray | None,
    trainer: Any,
    module: Any,
    train: Any,
) -> np.ndarray | None:
    """Near-duplicates with different labels, int64 ``[P, 2]``, without threshold samples; None if not asked for."""
    if options.features is not None:
        features = read_features(options.features, len(labels))
    elif options.duplicates:
        if options.ckpt_path is not None:
            load_weights(module, options.ckpt_path)
        features, _ = features_and_labels(trainer, module, in_order(train), options.layer, "training", False)
    else:
        return None
    usual = np.ones(len(labels), bool)
    usual[[] if threshold is None else threshold] = False
    return np.flatnonzero(usual)[conflicting_pairs(features[usual], labels[usual])[0]]


def parse(args: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of the command, and the arguments for the recipe.

    Raises:
        ValueError: If an option is wrong, or is missing beside another.
        OSError: If a file to write exists.
    """
    options, overrides = parser().parse_known_args(args)
    for name in ("output", "page", "picture", "index", "baseline"):
        file = getattr(options, name)
        if file is not None and file.exists():
            raise FileExistsError(f"Argument `--{name}` must name a new file, but {str(file)!r} exists.")
    if options.output.suffix not in KINDS:
        raise ValueError(f"Argument `--output` must end with .csv or .parquet, but got {str(options.output)!r}.")
    for name in ("duplicates", "slice", "log"):
        if getattr(options, name) and not overrides:
            raise ValueError(f"Argument `--config` must name the recipe of the run with `--{name}`.")
    if (options.apply is None) != (options.index is None):
        raise ValueError(f"Argument `--index` must be given with `--apply`, but got {options.index}.")
    if options.baseline is not None and options.apply != "drop":
        raise ValueError(f"Argument `--baseline` must be given with `--apply drop`, but got {options.apply!r}.")
    check_integer("--count", options.count, 0, optional=True)
    check_integer("--rows", options.rows, 0)
    check_integer("--seed", options.seed, 0, 2**63)
    check_number("--weight", options.weight, "[0, inf)")
    if options.threshold is not None:
        options.threshold = read_ids(options.threshold)
    return options, overrides


def parser() -> argparse.ArgumentParser:
    """The parser of the command's own options."""
    parser = argparse.ArgumentParser("curation audit", description=__doc__, allow_abbrev=False)
    parser.add_argument("record", help="file that TrainingDynamics has written")
    parser.add_argument("--output", required=True, type=Path, help="file for the ranked table (.csv or .parquet)")
    parser.add_argument("--by", choices=BY, default="auto", help="what classes are ranked by (%(default)s)")
    parser.add_argument("--page", type=Path, metavar="FILE.html", help="write a page, with the samples of a recipe")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw the map of the data, and the margins")
    parser.add_argument("--rows", type=int, default=50, help="suspects in the page and in W&B (%(default)s)")
    parser.add_argument(
        "--count", type=int, help="number of suspects (default: the estimated number of wrong labels)"
    )
    parser.add_argument(
        "--threshold", metavar="FILE.npy", help="ids of the threshold samples (default: those of the recipe)"
    )
    parser.add_argument("--ledger", metavar="FOLDER", help="of a SelectionLedger: suspects among its choices")
    parser.add_argument(
        "--slice", action="append", default=[], metavar="FIELD", help="compare parts; may be repeated"
    )
    parser.add_argument("--duplicates", action="store_true", help="look for near-duplicates with different labels")
    parser.add_argument("--layer", help="submodule whose output says what is near (default: the inputs, flattened)")
    parser.add_argument("--ckpt_path", help="checkpoint of the module, for --layer")
    parser.add_argument(
        "--features", metavar="FILE.npy", help="[N, D], that say what is near, in the place of a layer's"
    )
    parser.add_argument("--tokenizer", metavar="NAME", help="decodes `input_ids` in the page")
    parser.add_argument("--apply", choices=ACTIONS, help="write --index for other runs")
    parser.add_argument("--index", type=Path, metavar="FILE.parquet", help="the file of --apply")
    parser.add_argument(
        "--weight", type=float, default=0.0, help="weight of suspects with --apply weigh (%(default)s)"
    )
    parser.add_argument(
        "--baseline",
        type=Path,
        metavar="FILE.parquet",
        help="with drop: an index without as many at random",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of --baseline")
    parser.add_argument("--log", action="store_true", help="log the first rows and the picture to the recipe's W&B")
    return parser


def read_ids(file: str) -> np.ndarray:
    """Sample ids int64 ``[M]`` in a ``.npy`` file.

    Raises:
        ValueError: If the file does not hold integers ``[M]``.
    """
    ids = read_array("--threshold", file, "integers")
    if ids.dtype.kind not in "iu" or ids.ndim != 1:
        kind = f"{ids.dtype} {list(ids.shape)}"
        raise ValueError(f"Argument `--threshold` must hold integers [M], but {file!r} holds {kind}.")
    return ids.astype(np.int64)


def without_ids(dataset: Any) -> Any:
    """The data set inside ``SampleIds``."""
    while isinstance(dataset, SampleIds):
        dataset = dataset.dataset
    return dataset


def check_same_data(record: str, dynamics: SampleDynamics, dataset: Any) -> None:
    """Refuse the record of another data set.

    Raises:
        ValueError: If the record has another number of samples, or was made of others.
    """
    if len(dynamics) != len(dataset):
        raise ValueError(f"{record!r} is a record of {len(dynamics)} samples, but the recipe has {len(dataset)}.")
    if dynamics.fingerprint and dynamics.fingerprint != fingerprint(dataset):
        raise ValueError(
            f"{record!r} is a record of other samples than the recipe's: give the overrides and the seed of the run."
        )
