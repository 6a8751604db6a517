"""A selection from features in files, within a memory budget and without a recipe: `curation select --memory`."""

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from curation.instances.selection import index_of_selector
from curation.recipes.instance_selection.features import read_array
from curation.recipes.instance_selection.retention_report import kept_report

UNUSED = ("target", "losses", "index", "layer", "ckpt_path", "picture")


def check_options(options: argparse.Namespace, overrides: list[str]) -> None:
    """Refuse what goes with a recipe or a target only.

    Raises:
        ValueError: If an option needs a recipe, or there are no features or memory.
    """
    if options.memory is None:
        for name, value in (("labels", options.labels), ("jobs", options.jobs)):
            if value is not None:
                raise ValueError(f"Argument `--{name}` needs `--memory`, but got {value!r}.")
        return
    if options.features is None:
        raise ValueError("Argument `--features` must be given with `--memory`, but got None.")
    for name in UNUSED:
        value = getattr(options, name)
        if value is not None:
            raise ValueError(f"Argument `--{name}` must be left out with `--memory`, but got {value!r}.")
    if overrides:
        raise ValueError(
            f"Argument `--memory` selects from `--features` and `--labels`, without a recipe, but got {overrides}."
        )


def select_from_files(options: argparse.Namespace, selector: Any) -> None:
    """Fit the selector, save the index, and say what stays; finished shards are kept beside the index until then.

    Raises:
        FileExistsError: If the index exists.
        ValueError: If the files cannot be selected from.
    """
    if options.output.exists():
        raise FileExistsError(f"Argument `--output` must name a new file, but {str(options.output)!r} exists.")
    labels = None if options.labels is None else read_array("--labels", options.labels, "labels")
    began = time.perf_counter()
    selector.fit(options.features, labels)
    config = json.dumps(vars(options) | {"budget": selector.budget}, default=str)
    index_of_selector(selector, len(selector.scores_), config=config).save(options.output)
    shutil.rmtree(shards_of(options.output), ignore_errors=True)
    print(f"{type(selector).__name__}: selected in {time.perf_counter() - began:.1f} s")
    print(f"index: {options.output}", flush=True)
    unlabelled = np.full(len(selector.scores_), np.nan)
    print("\n".join(kept_report(unlabelled if labels is None else labels, selector.sample_indices_)))


def shards_of(output: Path) -> Path:
    """The folder of finished shards of an index that is not written yet."""
    return output.with_name(output.name + ".shards")
