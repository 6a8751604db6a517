"""What may name the samples that stay: indices, a mask, a fitted selector, or a file."""

import os
from collections.abc import Sequence
from os import PathLike
from typing import Any

import numpy as np
from torch import Tensor

from curation.checks import check_path
from curation.instances.selection_index import SelectionIndex, Selector

Selection = Sequence[int] | str | PathLike[str] | np.ndarray | Tensor | Selector | SelectionIndex


def check_selection(name: str, selection: Any) -> str | np.ndarray | SelectionIndex:
    """Refuse what names no samples, as far as that shows without the data set.

    Args:
        name: Name of the argument.
        selection: Integers ``[n]`` in any order, each once; a mask, bool ``[N]``; a fitted selector; a
            :class:`~curation.instances.selection_index.SelectionIndex`; the file that its ``save`` wrote; or a
            ``.npy`` file of integers or a mask.

    Returns:
        The path as a string, an array, or an index, for :func:`read_selection`; of a selector, what it chose.

    Raises:
        ValueError: If it is something else, or a selector that is not fitted.

    Example:
        >>> check_selection("index", [7, 2])
        array([7, 2])
        >>> check_selection("index", 3)
        Traceback (most recent call last):
        ValueError: Argument `index` must be a path, integers, a mask, a fitted selector or an index, but got 3.
    """
    if isinstance(selection, (str, PathLike)):
        return check_path(name, selection)
    if isinstance(selection, SelectionIndex):
        return selection
    if hasattr(selection, "fit"):
        if not hasattr(selection, "sample_indices_"):
            raise ValueError(f"Argument `{name}` must be fitted, with `sample_indices_`, but got {selection!r}.")
        if hasattr(selection, "scores_"):
            return index_of_selector(selection, len(selection.scores_))
        selection = selection.sample_indices_
    array = selection.detach().cpu().numpy() if isinstance(selection, Tensor) else np.asarray(selection)
    if array.ndim != 1 or array.dtype.kind not in "iub" or not len(array):
        raise ValueError(
            f"Argument `{name}` must be a path, integers, a mask, a fitted selector or an index, but got "
            f"{selection!r}."
        )
    return array


def read_selection(name: str, selection: str | np.ndarray | SelectionIndex, size: int) -> SelectionIndex:
    """The index of a selection from a data set.

    Args:
        name: Name of the argument.
        selection: What :func:`check_selection` returned.
        size: Number of samples of the data set.

    Returns:
        The index; of arrays its scores are NaN, and its ranks are their order.

    Raises:
        ValueError: If the selection is of another number of samples, repeats one, has none, or its file is none.

    Example:
        >>> index = read_selection("index", np.array([7, 2]), 10)
        >>> index.indices.tolist(), index.first(1).tolist()
        ([2, 7], [7])
    """
    given = "one"
    if isinstance(selection, str):
        given = repr(selection)
        selection = load_selection(name, selection)
    if isinstance(selection, np.ndarray) and selection.dtype.kind == "b":
        if len(selection) != size:
            raise ValueError(
                f"Argument `{name}` must be of the {size} training samples, but got {given} of {len(selection)}."
            )
        selection = np.flatnonzero(selection)
    if isinstance(selection, np.ndarray):
        order = np.argsort(selection, kind="stable")
        if (
            not len(order)
            or not 0 <= selection[order[0]] <= selection[order[-1]] < size
            or len(np.unique(selection)) < len(order)
        ):
            raise ValueError(
                f"Argument `{name}` must hold different samples of [0, {size}), at least one, but got {selection}."
            )
        return SelectionIndex(selection[order], np.full(len(order), np.nan), order, size)
    if selection.size != size:
        raise ValueError(
            f"Argument `{name}` must be of the {size} training samples, but got {given} of {selection.size}."
        )
    return selection


def load_selection(name: str, path: str) -> np.ndarray | SelectionIndex:
    """The selection in a file: an array of a ``.npy`` file, or else an index.

    Raises:
        ValueError: If there is no such file, or it is another.
    """
    if not path.endswith(".npy"):
        return SelectionIndex.load(path)
    try:
        array: Any = np.load(path)
        return check_selection(name, array)  # type: ignore[return-value]
    except (OSError, EOFError, ValueError) as error:
        reason = "there is no such file" if not os.path.isfile(path) else str(error)
        raise ValueError(f"Argument `{name}` must name a selection, but of {path!r}: {reason}") from error


def index_of_selector(selector: Any, size: int, fingerprint: str = "", config: str = "{}") -> SelectionIndex:
    """The index of a selector that was fitted to all samples of a data set.

    Args:
        selector: A fitted selector: ``sample_indices_`` int64 ``[m]``, and where it has them ``scores_`` ``[N]`` (NaN
            otherwise) and ``ranking_`` ``[m]`` (the order of the samples otherwise).
        size: Number of samples of the data set, ``N``.
        fingerprint: That of the data set.
        config: How the selection was made, as JSON.
    """
    indices = np.unique(selector.sample_indices_)
    scores = getattr(selector, "scores_", np.full(size, np.nan))
    ranks = np.argsort(getattr(selector, "ranking_", indices))  # position of each index, ascending, in the ranking
    return SelectionIndex(indices, np.asarray(scores)[indices], ranks, size, fingerprint, config)
