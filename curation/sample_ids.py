"""Sample ids: stable indices that travel with the samples of a data set, and are split off before the model."""

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

SAMPLE_ID = "sample_id"  # the key of the ids in samples and batches


class SampleIds(Dataset):
    """A map-style data set whose samples carry their index as a stable int64 ``sample_id``.

    A mapping gains the key ``sample_id``. A tuple gains a last element ``{"sample_id": index}``, which default
    collation keeps recognisable. A selection callback strips the ids as the batch is transferred, in every stage:
    the only hook of the module that sees them is ``on_before_batch_transfer``. In other training loops use
    :func:`split_sample_ids`.

    Args:
        dataset: Map-style data set of mappings or plain tuples.

    Raises:
        TypeError: If the data set is not map-style, or its samples are neither mappings nor plain tuples.
        ValueError: If a sample has a ``sample_id`` already.

    Example:
        >>> SampleIds([{"x": 1.0}, {"x": 2.0}])[1]
        {'x': 2.0, 'sample_id': 1}
    """

    def __init__(self, dataset: Any) -> None:
        sized = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
        if not sized or isinstance(dataset, IterableDataset):
            raise TypeError(
                f"Argument `dataset` must be a map-style data set, but got {type(dataset).__name__}. An iterable one "
                "gets them from `stream_ids`, or yields mappings with a `sample_id` itself, or tuples that end with "
                "{'sample_id': number}."
            )
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        """A sample with its id; or, for a list of indices, a whole batch with theirs (``batch_size=None``)."""
        if isinstance(index, (list, tuple, np.ndarray)) or (isinstance(index, Tensor) and index.dim() > 0):
            ids = torch.as_tensor(index, dtype=torch.int64)
            return with_id(self.dataset[index], torch.where(ids < 0, ids + len(self), ids))
        return with_id(self.dataset[index], int(index) + (len(self) if index < 0 else 0))

    def __getitems__(self, indices: list[int]) -> list[Any]:
        fetch = getattr(self.dataset, "__getitems__", None)
        samples = fetch(indices) if fetch is not None else [self.dataset[i] for i in indices]
        ids = [int(i) + (len(self) if i < 0 else 0) for i in indices]
        return [with_id(sample, i) for sample, i in zip(samples, ids, strict=True)]


def with_id(sample: Any, index: int | Tensor) -> Any:
    """A sample with its id, as in :class:`SampleIds`.

    Raises:
        ValueError: If it has one already.
        TypeError: If it is neither a mapping nor a plain tuple.
    """
    if isinstance(sample, Mapping):
        if SAMPLE_ID in sample:
            raise ValueError(f"Argument `dataset` must not hold ids already, but sample {index} has a {SAMPLE_ID!r}.")
        return {**sample, SAMPLE_ID: index}
    if isinstance(sample, tuple) and not hasattr(sample, "_fields"):
        return (*sample, {SAMPLE_ID: index})
    raise TypeError(
        f"Argument `dataset` must hold mappings or plain tuples, but sample {index} is {type(sample).__name__}."
    )


def split_sample_ids(batch: Any) -> tuple[Any, Tensor | None]:
    """Separate a batch from its sample ids.

    Args:
        batch: A collated batch.

    Returns:
        The batch without ids, and the ids as int64 ``[B]`` (None where the batch carries none).

    Raises:
        TypeError: If the ids are not a tensor ``[B]`` or a list of integers (a float would round them).
        ValueError: If an id is not in [0, 2^63). Ids on another device are not checked, which would wait for it.

    Example:
        >>> split_sample_ids([torch.zeros(2), {"sample_id": torch.tensor([7, 9])}])
        ([tensor([0., 0.])], tensor([7, 9]))
    """
    stripped: Any
    if isinstance(batch, Mapping) and SAMPLE_ID in batch:
        ids = batch[SAMPLE_ID]
        stripped = copy.copy(batch)
        del stripped[SAMPLE_ID]
    elif (
        isinstance(batch, (list, tuple))
        and len(batch) > 1
        and isinstance(batch[-1], Mapping)
        and set(batch[-1]) == {SAMPLE_ID}
        and not hasattr(batch, "_fields")
    ):
        ids = batch[-1][SAMPLE_ID]
        stripped = batch[:-1]
    else:
        return batch, None
    wrong: list[int] = []
    if isinstance(ids, (list, tuple)) and all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        wrong = [i for i in ids if not 0 <= i < 2**63]
        ids = ids if wrong else torch.tensor(ids, dtype=torch.int64)
    elif (
        not isinstance(ids, Tensor)
        or ids.dim() != 1
        or ids.is_floating_point()
        or ids.is_complex()
        or ids.dtype == torch.bool
    ):
        kind = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else f"{type(ids).__name__} {ids!r}"
        raise TypeError(f"`{SAMPLE_ID}` must hold one integer per row, but the batch has {kind}.")
    else:
        unsigned, ids = ids, ids.to(torch.int64)
        if ids.device.type == "cpu" and (ids < 0).any():  # elsewhere it would wait for the device
            wrong = unsigned[ids < 0].tolist()
    if wrong:
        raise ValueError(f"`{SAMPLE_ID}` must hold integers in [0, 2^63), but the batch has {wrong[0]}.")
    return stripped, ids
