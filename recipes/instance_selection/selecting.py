"""Objects of classes that a user names by their paths, such as selectors."""

import inspect
from importlib import import_module
from typing import Any


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


def takes(class_path: str, argument: str) -> bool:
    """Whether the constructor of a class, which can be made, has an argument.

    Example:
        >>> takes("fractions.Fraction", "numerator")
        True
    """
    module, _, name = class_path.rpartition(".")
    return argument in inspect.signature(getattr(import_module(module), name)).parameters
