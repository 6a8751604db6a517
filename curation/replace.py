"""Standing in for an attribute of one object, and leaving no trace."""

from collections.abc import Callable
from typing import Any

_MISSING = object()


def replace_attribute(owner: Any, name: str, value: Any) -> Callable[[], None]:
    """Shadow an attribute on one instance, leaving its class alone.

    Args:
        owner: The instance.
        name: Of the attribute.
        value: What stands in for it.

    Returns:
        A function that brings the instance back to what it was. It does nothing if somebody has replaced the
        attribute again since.

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
