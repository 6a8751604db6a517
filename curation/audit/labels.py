"""The label of a sample."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

LABELS = ("labels", "label", "y")


def label_of(sample: Any) -> Any:
    """The label of a sample: the second element of a tuple, or ``labels``, ``label`` or ``y`` of a mapping.

    Raises:
        TypeError: If it has none.

    Example:
        >>> label_of(("x", 3)), label_of({"text": "a", "label": 1})
        (3, 1)
    """
    return sample[_place(sample)]


def with_label(sample: Any, change: Callable[[Any], Any]) -> Any:
    """A sample with another label, of the type that the label had.

    Args:
        sample: The sample, which stays as it is.
        change: Function of its label.

    Raises:
        TypeError: If it has no label.

    Example:
        >>> with_label({"label": torch.tensor(1)}, lambda label: 5)
        {'label': tensor(5)}
    """
    place, label = _place(sample), label_of(sample)
    new = change(label)
    new = torch.full_like(label, new) if isinstance(label, Tensor) else type(label)(new)
    if isinstance(sample, Mapping):
        return {**sample, place: new}
    return (*sample[:place], new, *sample[place + 1 :])


def _place(sample: Any) -> Any:
    if isinstance(sample, Mapping):
        place = next((name for name in LABELS if name in sample), None)
        if place is not None:
            return place
    elif isinstance(sample, (tuple, list)) and len(sample) > 1:
        return 1
    raise TypeError(
        f"A sample must be a tuple (x, y, ...) or a mapping with `labels`, `label` or `y`, but is a "
        f"{type(sample).__name__}{f' with {list(sample)}' if isinstance(sample, Mapping) else ''}."
    )
