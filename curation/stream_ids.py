"""Sample ids of iterable data sets, the same whatever processes and loader workers read them."""

import hashlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset

from curation.checks import check_integer
from curation.sample_ids import with_id

BLOCK = 256  # rows that are read at a time


def stream_ids(dataset: Any, column: str | int | None = None, buckets: int | None = None) -> Any:
    """An iterable data set whose samples carry a stable int64 ``sample_id``.

    Without a column the id is ``position * shards + shard``: of the sample in its shard, and of the shard among the
    data set's. It depends on neither processes, loader workers nor what is shuffled afterwards, and is less than the
    shards times the samples of the longest. This takes a streaming data set of Hugging Face, and gives one, with the
    column ``sample_id``: shuffle, split by node and set the format after it, not before.

    With a column the id is that of the data: an integer in [0, 2^63), or the first 63 bits of the BLAKE2b hash of a
    text or bytes. With ``buckets`` it is the rest of that by ``buckets``: so a record of that ``size`` has a row for
    every sample, however many there are. Of ``N`` samples with random ids a share of ``1 - exp(-N / buckets)`` has to
    share its row with another one: 6 % of a million in 2^24 buckets, for which ``SampleRecord`` takes 336 MB.

    Args:
        dataset: A streaming data set of Hugging Face, or with a column any iterable data set of mappings or plain
            tuples, which divides its samples between processes and loader workers itself.
        column: Key of the mapping, or place in the tuple.
        buckets: Number of ids; None for no limit.

    Raises:
        TypeError: If ``dataset`` is not iterable, or has no shards and no column is given; in an iteration, if the
            column of a sample holds neither an integer, a text nor bytes, or samples are of another kind.
        ValueError: If ``buckets`` is given without a column, or is no positive integer; in an iteration, if an
            integer is out of range, or a sample has a ``sample_id`` already.

    Example:
        >>> class Pages(IterableDataset):
        ...     def __iter__(self):
        ...         yield {"url": "a.org", "text": "A"}
        >>> next(iter(stream_ids(Pages(), column="url", buckets=1000)))
        {'url': 'a.org', 'text': 'A', 'sample_id': 481}
    """
    check_integer("buckets", buckets, 1, optional=True)
    if not isinstance(dataset, IterableDataset):
        raise TypeError(
            f"Argument `dataset` must be an iterable data set, but got {type(dataset).__name__}; a map-style one "
            "gets its ids from `SampleIds`."
        )
    datasets = sys.modules.get("datasets")  # or else it is none of theirs
    hugging_face = datasets is not None and isinstance(dataset, datasets.IterableDataset)
    if column is not None:
        add = _OfColumn(column, buckets)
        if hugging_face:
            return dataset.map(add)  # type: ignore[attr-defined]
        return (_SizedIdentified if hasattr(dataset, "__len__") else _Identified)(dataset, add)
    if buckets is not None:
        raise ValueError(f"Argument `column` must be given for `buckets={buckets}`, but got None.")
    if datasets is None or not hugging_face:
        name = type(dataset).__name__
        raise TypeError(f"Argument `column` must be given for a {name}, whose shards are not known, but got None.")
    shards = [dataset.shard(dataset.num_shards, i) for i in range(dataset.num_shards)]  # type: ignore[attr-defined]
    numbered = {"shards": list(enumerate(shards)), "count": len(shards)}  # the list is what workers divide
    return datasets.IterableDataset.from_generator(_number, gen_kwargs=numbered)


def _number(shards: list[tuple[int, Any]], count: int) -> Iterator[dict[str, Any]]:
    for shard, rows in shards:
        position = 0
        for block in rows.iter(BLOCK):  # iterating would divide a shard between loader workers again
            for values in zip(*block.values(), strict=True):
                yield with_id(dict(zip(block, values, strict=True)), position * count + shard)
                position += 1


class _OfColumn:
    """Gives a sample the id that a column of it tells."""

    def __init__(self, column: str | int, buckets: int | None) -> None:
        self.column, self.buckets = column, buckets

    def __call__(self, sample: Any) -> Any:
        return with_id(sample, self._id(sample[self.column]))

    def _id(self, value: Any) -> int:
        value = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
        if isinstance(value, (str, bytes)):
            text = value.encode() if isinstance(value, str) else value
            value = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1
        elif isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise TypeError(
                f"Argument `column` must name integers, texts or bytes, but {self.column!r} of a sample is "
                f"{type(value).__name__}."
            )
        if not 0 <= value < 2**63:
            raise ValueError(f"Argument `column` must name integers in [0, 2^63), but a sample has {value}.")
        return int(value) % self.buckets if self.buckets is not None else int(value)


class _Identified(IterableDataset):
    """An iterable data set with ids; all other attributes are its own."""

    dataset: Any

    def __init__(self, dataset: Any, add: _OfColumn) -> None:
        self.dataset, self._add = dataset, add

    def __iter__(self) -> Iterator[Any]:
        return map(self._add, self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # while it is being unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)


class _SizedIdentified(_Identified):
    def __len__(self) -> int:
        return len(self.dataset)
