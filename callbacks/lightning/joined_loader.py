"""A data loader whose batches are several of the fit's data loader."""

import itertools
from collections.abc import Iterator
from typing import Any

from curation.join import join_batches


def join(batches: list[Any], loader: Any) -> Any:
    """Batches of a data loader as one, padded as its tokenizer does."""
    tokenizer = getattr(getattr(loader, "collate_fn", None), "tokenizer", None)
    return join_batches(batches, getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "padding_side", None))


class JoinedLoader:
    """A data loader that joins every ``count`` batches of another; all other attributes are those of the other.

    Args:
        loader: The data loader of the fit.
        count: Batches in each that is yielded; the last of an epoch may have fewer.

    Example:
        >>> import torch
        >>> loader = JoinedLoader([torch.tensor([1, 2]), torch.tensor([3, 4]), torch.tensor([5])], 2)
        >>> len(loader), list(loader)
        (2, [tensor([1, 2, 3, 4]), tensor([5])])
    """

    loader: Any
    count: int

    def __init__(self, loader: Any, count: int) -> None:
        vars(self).update(loader=loader, count=count)

    def __len__(self) -> int:
        return -(-len(self.loader) // self.count)

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.loader)
        while group := list(itertools.islice(batches, self.count)):
            yield join(group, self.loader)

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # while it is being unpickled
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.loader, name, value)  # such as what Lightning seeds workers with
