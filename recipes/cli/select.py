"""``curation select``: the samples of a recipe's training set that are worth training on, in an index file.

``curation select --config RECIPE --output FILE.parquet`` keeps 4 %, and says what a probe that is trained on them
retains, beside as many at random. ``curation.callbacks.InstanceSelection(index="FILE.parquet")`` trains on them.
"""

import argparse
import inspect
import json
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from torch.utils.data import DataLoader

from curation.batch import split_sample_ids
from curation.callbacks import embed
from curation.callbacks.instances.features import flatten_inputs, inputs_and_labels
from curation.evaluation.retention import Part, Retention, retention
from curation.evaluation.statistics import paired_interval
from curation.instances.selection_index import SelectionIndex, fingerprint
from curation.recipes.compare.pictures import picture

BUDGET = 0.04
EMBEDDED = 5000  # points at most by t-SNE
NAMED = 20  # classes at most that are named one by one


def in_order(loader: Any) -> DataLoader:
    """A loader of the same data set, unshuffled and whole.

    Raises:
        TypeError: If it is no ``DataLoader`` of a map-style data set.
    """
    if not isinstance(loader, DataLoader) or not hasattr(loader.dataset, "__len__"):
        raise TypeError(
            f"A selection needs one map-style `DataLoader` of each part, but got {type(loader).__name__}."
        )
    return DataLoader(
        loader.dataset, loader.batch_size or 256, collate_fn=loader.collate_fn, num_workers=loader.num_workers
    )


def features_and_labels(
    trainer: Trainer, module: LightningModule, loader: DataLoader, layer: str | None, title: str
) -> Part:
    """Features fp32 ``[N, D]``, the flattened inputs or a layer's output, and labels int64 ``[N]``, in order.

    Raises:
        TypeError: If a batch has no labels, or its inputs are not one tensor and there is no layer.
        ValueError: As :func:`~curation.callbacks.instances.embed.embed`.
    """
    from rich.progress import track

    inputs, labels = [], []
    for batch in track(loader, f"reading {title} samples"):
        of_batch, y = inputs_and_labels(split_sample_ids(batch)[0])
        labels.append(y)
        if layer is None:
            inputs.append(flatten_inputs(of_batch))
    x = torch.cat(inputs) if layer is None else embed(trainer, module, loader, layer)
    return x.numpy(), torch.cat(labels).numpy()


def make(option: str, class_path: str, given: dict[str, Any], required: dict[str, Any]) -> Any:
    """An object of a class that a user names.

    Args:
        option: That names it, for the messages.
        class_path: Of the class.
        given: Arguments that it gets if it accepts them.
        required: Arguments that it has to accept.

    Raises:
        ValueError: If there is no such class, or it does not accept the arguments.
    """
    module, _, name = class_path.rpartition(".")
    try:
        cls = getattr(import_module(module), name)
        accepted = inspect.signature(cls).parameters
        return cls(**{key: value for key, value in given.items() if key in accepted}, **required)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"Argument `--{option}` must be a class with its arguments, but {error}.") from error


def index_of(selector: Any, dataset: Any, config: dict[str, Any]) -> SelectionIndex:
    """The index of a selector that was fitted to all samples of a data set.

    A selector without ``scores_`` gives NaN, and one without ``ranking_`` the order of the samples.
    """
    indices = np.unique(selector.sample_indices_)
    scores = getattr(selector, "scores_", np.full(len(dataset), np.nan))
    ranks = np.argsort(getattr(selector, "ranking_", indices))  # the places of the rising indices in it
    made = json.dumps(config, default=str)  # paths
    return SelectionIndex(indices, np.asarray(scores)[indices], ranks, len(dataset), fingerprint(dataset), made)


def report(y: np.ndarray, indices: np.ndarray, found: Retention, probe: str) -> str:
    """What was kept and what it is worth, for people.

    Args:
        y: Labels ``[N]``.
        indices: int64 ``[m]``.
        found: By the probe.
        probe: Its name.
    """
    classes, sizes = np.unique(y, return_counts=True)
    counts = (y[indices][:, None] == classes).sum(0)
    kept = ", ".join(f"{c}: {count} of {size}" for c, count, size in zip(classes, counts, sizes, strict=True))
    if len(classes) > NAMED:
        kept = f"{counts.min()} to {counts.max()} of {sizes.min()} to {sizes.max()}, in {len(classes)} classes"
    mean, low, high = paired_interval((found.of_selected - found.of_random).tolist())
    verdict = "better than random" if low > 0 else "worse than random" if high < 0 else "no different from random"
    rows = [("all samples", [found.full], found.of_selected * 0 + 1, 0.0)] + [
        (name, accuracies, shares, found.reduction)
        for name, accuracies, shares in (
            ("selected", found.selected, found.of_selected),
            ("stratified random", found.random, found.of_random),
        )
    ]
    lines = [
        f"{len(indices):,} of {len(y):,} samples kept, reduction {found.reduction:.1%}",
        f"kept per class: {kept}",
        f"{probe}, mean and standard deviation of {len(found.selected)} seeds:",
        f"{'trained on':18} {'accuracy':>8} {'retention':>16} {'effectiveness':>14}",
        *(
            f"{name:18} {np.mean(accuracies):8.4f} {shares.mean():7.4f} ± {shares.std(ddof=1):.4f} "
            f"{np.mean(accuracies) * reduction:14.4f}"
            for name, accuracies, shares, reduction in rows
        ),
        f"retention, selected minus random: {mean:+.4f}, 95 % interval {low:+.4f} to {high:+.4f}: {verdict}",
    ]
    return "\n".join(lines)


def draw(x: np.ndarray, y: np.ndarray, indices: np.ndarray, found: Retention) -> Any:
    """Kept samples among those left out, in two dimensions, beside what they retain.

    Args:
        x: Features ``[N, D]``; up to 5,000 are drawn by t-SNE, more by their two principal components.
        y: Labels ``[N]``.
        indices: int64 ``[m]``, of the kept samples.
        found: What they retain.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    classes, place = np.unique(y, return_inverse=True)
    components = PCA(min(50, *x.shape), random_state=0).fit_transform(x)
    # It needs twice the perplexity, and samples that differ.
    method = "t-SNE" if 60 < len(x) <= EMBEDDED and components.std() > 0 else "PCA"
    at = TSNE(random_state=0).fit_transform(components) if method == "t-SNE" else components[:, :2]
    palette = colormaps["tab10" if len(classes) <= 10 else "tab20" if len(classes) <= 20 else "gist_rainbow"]
    colours = palette(place if len(classes) <= NAMED else place / len(classes))
    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[2.6, 1])
    is_kept = np.isin(np.arange(len(y)), indices)
    small, large = (float(np.clip(area / n, *limits)) for area, n, limits in (
        (30000, len(y), (1.5, 8)), (16000, len(indices), (7, 45))))  # fmt: skip
    left.scatter(*at[~is_kept].T, s=small, c=colours[~is_kept], alpha=0.25, linewidths=0)
    left.scatter(*at[is_kept].T, s=large, c=colours[is_kept], edgecolors="black", linewidths=0.02 * large**0.5 + 0.3)
    left.set_title(f"{len(indices):,} kept (ringed) of {len(y):,} samples, {method}", loc="left")
    left.axis("off")
    if len(classes) <= NAMED:
        for i, name in enumerate(classes):
            left.scatter([], [], s=30, color=palette(i), label=str(name))
        left.legend(title="class", frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), handletextpad=0.1)
    for i, (shares, colour) in enumerate(((found.of_selected, "C0"), (found.of_random, "0.6"))):
        right.bar(i, shares.mean(), yerr=shares.std(ddof=1), color=colour, width=0.7, capsize=6)
        right.text(i, shares.mean() / 2, f"{shares.mean():.1%}", ha="center", color="white", fontsize=13)
    right.axhline(1, color="black", linewidth=1, linestyle="--")
    right.text(1.45, 1.01, "all samples", ha="right", va="bottom", fontsize=9)
    right.set(
        xticks=[0, 1], xticklabels=["selected", "stratified\nrandom"], ylabel="accuracy / accuracy of all samples"
    )
    right.set_title(f"retention, {len(found.selected)} seeds", loc="left")
    right.margins(y=0.1)
    right.spines[["top", "right"]].set_visible(False)
    return figure


def parse(args: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of the command, and the overrides of the recipe.

    Raises:
        ValueError: If an option is out of its range.
        OSError: If a file to write exists.
    """
    parser = argparse.ArgumentParser("curation select", description=__doc__, allow_abbrev=False)
    parser.add_argument("--output", required=True, type=Path, help="file for the index (Parquet)")
    parser.add_argument("--budget", type=float, help=f"share of the samples to keep (default {BUDGET})")
    parser.add_argument(
        "--selector",
        default="curation.instances.GraphAttentionInstanceSelector",
        metavar="CLASS_PATH",
        help="class of the selector (%(default)s)",
    )
    parser.add_argument(
        "--options", default="{}", metavar="JSON", help="its other arguments, as '{\"n_neighbors\": 5}'"
    )
    parser.add_argument("--layer", help="submodule whose output are the features (default: the inputs, flattened)")
    parser.add_argument("--ckpt_path", help="checkpoint of the module, for --layer")
    parser.add_argument("--features", metavar="FILE.npy", help="[N, D], to select by in the place of the probe's")
    parser.add_argument(
        "--probe",
        default="sklearn.ensemble.RandomForestClassifier",
        metavar="CLASS_PATH",
        help="class of the classifier that says what the selection retains (%(default)s)",
    )
    parser.add_argument("--repeats", type=int, default=5, help="probes and random selections (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the selector, and the first of the probes")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw what was kept, and what it retains")
    options, rest = parser.parse_known_args(args)
    for name in ("output", "picture"):
        file = getattr(options, name)
        if file is not None and file.exists():
            raise FileExistsError(f"Argument `--{name}` must name a new file, but {str(file)!r} exists.")
    for name in ("ckpt_path", "features"):
        file = getattr(options, name)
        if file is not None and not Path(file).is_file():
            raise ValueError(f"Argument `--{name}` must name a file, but there is no {file!r}.")
    if options.ckpt_path is not None and options.layer is None:
        raise ValueError("Argument `--layer` must be given with `--ckpt_path`, but got None.")
    if options.budget is not None and not 0 < options.budget < 1:
        raise ValueError(f"Argument `--budget` must be in (0, 1), but got {options.budget!r}.")
    for name, least in (("repeats", 2), ("seed", 0)):
        if getattr(options, name) < least:
            raise ValueError(f"Argument `--{name}` must be >= {least}, but got {getattr(options, name)}.")
    try:
        options.options = dict(json.loads(options.options))
    except (ValueError, TypeError) as error:
        raise ValueError(f"Argument `--options` must be a JSON object, but got {options.options!r}.") from error
    return options, rest


def main(args: list[str]) -> None:
    """``curation select --config RECIPE --output FILE [options] [overrides]``.

    Raises:
        ValueError: If an option is wrong, or something stands in the way of a selection.
        OSError: If a file to write exists or cannot be written.
    """
    from rich.progress import track

    from curation.recipes.cli.main import run

    options, rest = parse(args)
    given = {"budget": BUDGET, "random_state": options.seed}
    required = options.options | ({} if options.budget is None else {"budget": options.budget})
    selector = make("selector", options.selector, {k: v for k, v in given.items() if k not in required}, required)
    make("probe", options.probe, {}, {})
    cli = run(rest, execute=False)
    trainer, module, data = cli.trainer, cli.model, cli.datamodule
    if data is None:
        raise ValueError("Argument `--config` must name a recipe with a data module.")
    if trainer.world_size > 1:
        raise ValueError(f"A selection is made by one process, but the trainer has {trainer.world_size}.")
    for file in filter(None, (options.output, options.picture)):
        file.parent.mkdir(parents=True, exist_ok=True)
    trainer.strategy.connect(module)  # a data module may ask its trainer for it
    data.trainer = trainer
    data.prepare_data()
    data.setup("fit")
    if options.layer is not None and options.ckpt_path is None:
        print(f"layer {options.layer} of the model as the recipe makes it; --ckpt_path takes a trained one")
    if options.ckpt_path is not None:
        module.load_state_dict(torch.load(options.ckpt_path, map_location="cpu", weights_only=True)["state_dict"])
    began = time.perf_counter()
    loader = in_order(data.train_dataloader())
    train, test = (
        features_and_labels(trainer, module, part, options.layer, title)
        for part, title in ((loader, "training"), (in_order(data.val_dataloader()), "validation"))
    )
    features = train[0] if options.features is None else np.load(options.features)
    if features.ndim != 2 or len(features) != len(train[1]):
        raise ValueError(
            f"Argument `--features` must hold [{len(train[1])}, D], a row for each training sample, but "
            f"{options.features!r} has {list(features.shape)}."
        )
    read = time.perf_counter()
    selector.fit(features, train[1])
    selected = time.perf_counter()
    if not hasattr(selector, "sample_indices_"):
        raise ValueError(
            f"Argument `--selector` must have `sample_indices_` after `fit`, but {options.selector} has not."
        )
    config = vars(options) | {"budget": getattr(selector, "budget", None), "recipe": rest}
    index = index_of(selector, loader.dataset, config)
    index.save(options.output)
    print(f"{options.selector}: features in {read - began:.1f} s, selected in {selected - read:.1f} s")
    print(f"index: {options.output}", flush=True)

    found = retention(
        train,
        test,
        index.indices,
        lambda seed: make("probe", options.probe, {"random_state": seed, "n_jobs": -1}, {}),
        options.repeats,
        options.seed,
        lambda seeds: track(seeds, "probing"),
    )
    print(report(train[1], index.indices, found, f"{options.probe}, on {len(test[1]):,} validation samples"))
    loggers = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
    if options.picture is None and not loggers:
        return
    figure = draw(features, train[1], index.indices, found)
    if options.picture is not None:
        options.picture.write_bytes(picture(figure, "png"))
        print(f"picture: {options.picture}")
    for logger in loggers:
        logger.log_image("instances/selection", [figure])
        logger.log_metrics(
            {
                "instances/retention": found.of_selected.mean(),
                "instances/retention_vs_random": (found.of_selected - found.of_random).mean(),
                "instances/kept_fraction": 1 - found.reduction,
            }
        )
