"""Fitting a selector that a user names by its class path, and the index file of what it selects."""

import inspect
import json
from importlib import import_module
from typing import Any

import numpy as np

from curation.instances.selection_index import SelectionIndex, fingerprint


def make_object(option: str, class_path: str, accepted: dict[str, Any], required: dict[str, Any]) -> Any:
    """An object of a class that a user names.

    Args:
        option: The option that names the class, for the messages.
        class_path: Dotted path of the class.
        accepted: Arguments that the class gets if its constructor has them.
        required: Arguments that its constructor must have.

    Raises:
        ValueError: If there is no such class, or it does not accept the arguments.

    Example:
        >>> make_object("probe", "fractions.Fraction", {"seed": 0}, {"numerator": 3})
        Fraction(3, 1)
    """
    module, _, name = class_path.rpartition(".")
    try:
        cls = getattr(import_module(module), name)
        parameters = inspect.signature(cls).parameters
        return cls(**{key: value for key, value in accepted.items() if key in parameters}, **required)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"Argument `--{option}` must be a class with its arguments, but {error}.") from error


def selection_index(selector: Any, dataset: Any, config: dict[str, Any]) -> SelectionIndex:
    """The index of a selector that was fitted to all samples of a data set.

    Args:
        selector: A fitted selector: ``sample_indices_`` int64 ``[m]``, and where it has them ``scores_`` ``[N]`` (NaN
            otherwise) and ``ranking_`` ``[m]`` (the order of the samples otherwise).
        dataset: The data set, of ``N`` samples.
        config: How the selection was made; it is stored in the index as JSON.
    """
    indices = np.unique(selector.sample_indices_)
    scores = getattr(selector, "scores_", np.full(len(dataset), np.nan))
    ranks = np.argsort(getattr(selector, "ranking_", indices))  # position of each index, ascending, in the ranking
    return SelectionIndex(
        indices,
        np.asarray(scores)[indices],
        ranks,
        len(dataset),
        fingerprint(dataset),
        json.dumps(config, default=str),  # paths
    )
