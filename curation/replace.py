"""Replacing an attribute of one object for a time."""

from collections.abc import Callable
from typing import Any

_MISSING = object()


def replace_attribute(owner: Any, name: str, value: Any) -> Callable[[], None]:
    """Replace an attribute of one instance; its class is not changed.

    Args:
        owner: The instance.
        name: Name of the attribute.
        value: The new value of the attribute.

    Returns:
        A function that restores the attribute. It does nothing if the attribute was replaced again since.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 3)
        >>> undo = replace_attribute(layer, "forward", lambda x: x)
        >>> layer(torch.ones(1, 2)).shape
        torch.Size([1, 2])
        >>> undo()
        >>> layer(torch.ones(1, 2)).shape
        torch.Size([1, 3])
    """
    before = vars(owner).get(name, _MISSING)
    setattr(owner, name, value)

    def undo() -> None:
        if vars(owner).get(name, _MISSING) is not value:
            return
        if before is _MISSING:
            delattr(owner, name)
        else:
            setattr(owner, name, before)

    return undo
