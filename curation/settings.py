"""The arguments that an object was made with, for loggers."""

import functools
import inspect
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Self

LONGEST = 20  # list that is given in full


class Configured:
    """Remembers the arguments of its constructor, defaults included."""

    _arguments: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Bind the arguments to their names."""
        self = super().__new__(cls)
        try:
            bound = inspect.signature(cls.__init__).bind(self, *args, **kwargs)
        except TypeError:  # unpickled, or wrong arguments, of which the constructor tells
            return self
        bound.apply_defaults()
        _, *arguments = bound.arguments.items()
        self._arguments = {name: plain(value) for name, value in arguments}
        return self

    def settings(self) -> dict[str, Any]:
        """The arguments as numbers, texts, lists and mappings; of any other object its class or name."""
        return dict(vars(self).get("_arguments", {}))


def settings_of(obj: Any) -> dict[str, Any]:
    """The arguments of an object whose class keeps them in attributes of the same names.

    Args:
        obj: A data module, for example. What it keeps elsewhere is left out.
    """
    if isinstance(obj, Configured):
        return obj.settings()
    names = list(inspect.signature(type(obj).__init__).parameters)[1:]
    return {name: plain(vars(obj)[name]) for name in names if name in vars(obj)}


def plain(value: Any) -> Any:
    """A value that any logger takes: numbers, texts, None, and lists and mappings of them.

    Example:
        >>> plain({"rule": "top", "loss": abs, "sizes": range(3)})
        {'rule': 'top', 'loss': 'abs', 'sizes': 'range'}
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, Mapping) and len(value) <= LONGEST:
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and len(value) <= LONGEST:
        return [plain(item) for item in value]
    if isinstance(value, functools.partial):
        return {"class": plain(value.func), **plain(value.keywords)}
    if isinstance(value, type) or inspect.isroutine(value):
        return value.__name__
    parameters = getattr(value, "get_params", None)  # of scikit-learn's estimators
    if callable(parameters) and not isinstance(value, type):
        return {"class": type(value).__name__, **plain(parameters(deep=False))}
    return type(value).__name__
