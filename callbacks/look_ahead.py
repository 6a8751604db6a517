"""A data loader that knows which batches come next."""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any


class LookAhead:
    """The batches of a loader, some of which are fetched before they are asked for; in all else it is the loader.

    Args:
        loader: Of the batches.
        ahead: How many to have fetched beyond the one that is given.

    Attributes:
        queue: Those that come next.

    Example:
        >>> loader = LookAhead([1, 2, 3, 4], lambda: 2)
        >>> [(batch, list(loader.queue)) for batch in loader]
        [(1, [2, 3]), (2, [3, 4]), (3, [4]), (4, [])]
    """

    loader: Any
    ahead: Callable[[], int]
    queue: deque[Any]

    def __init__(self, loader: Any, ahead: Callable[[], int]) -> None:
        vars(self).update(loader=loader, ahead=ahead, queue=deque())

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        self.queue.clear()
        for batch in self.loader:
            self.queue.append(batch)
            if len(self.queue) > self.ahead():
                yield self.queue.popleft()
        while self.queue:
            yield self.queue.popleft()

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # while it is being unpickled
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.loader, name, value)  # such as what Lightning seeds workers with
