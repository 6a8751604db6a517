"""The length of every sample of a data set."""

from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from curation import arrow as pa
from curation.checks import check_integer
from curation.files import replacing
from curation.sample_ids import SampleIds

COLUMNS = ("length", "lengths", "num_tokens")  # of lengths, in the order that they are looked for
CHUNK = 4096  # samples that a process reads at a time


def lengths_of(
    dataset: Any,
    length: str | Callable[[Any], int] = "input_ids",
    cache: str | PathLike[str] | None = None,
    num_workers: int = 0,
) -> np.ndarray:
    """The number of tokens of every sample.

    A ``datasets.Dataset`` answers from its columns: one of lengths (``length``, ``lengths``, ``num_tokens``), or the
    lengths of a list. Of any other data set every sample is read once.

    Args:
        dataset: A map-style data set; ``SampleIds`` around one, too.
        length: Name of the field whose length is meant, or a function of a sample: ``len`` for bare lists of tokens.
        cache: An Arrow file that keeps them, which is written where there is none.
        num_workers: Processes that read samples; 0 reads them in this one.

    Returns:
        int32 ``[N]``.

    Raises:
        ValueError: If a sample has no such field, a length is not in [1, 2^31), or the file is of other data.
        OSError: If the file cannot be written.

    Example:
        >>> lengths_of([{"input_ids": [5, 6]}, {"input_ids": [7]}])
        array([2, 1], dtype=int32)
    """
    check_integer("num_workers", num_workers, 0)
    while isinstance(dataset, SampleIds):
        dataset = dataset.dataset
    if cache is not None and Path(cache).is_file():
        return _read(cache, dataset)
    lengths = _of_columns(dataset, length)
    if lengths is None:
        chunks = DataLoader(_Lengths(dataset, length), batch_size=None, num_workers=num_workers)
        lengths = np.concatenate([chunk.numpy() if isinstance(chunk, Tensor) else chunk for chunk in chunks])
    lengths = check_lengths(lengths)
    if cache is not None:
        _write(cache, lengths, dataset)
    return lengths


def check_lengths(lengths: Any) -> np.ndarray:
    """Lengths as int32 ``[N]``.

    Raises:
        ValueError: If they are no integers in [1, 2^31), at least one; the first that is not is named.
    """
    array = np.asarray(lengths)
    if array.ndim != 1 or array.dtype.kind not in "iu" or not len(array):
        raise ValueError(
            f"Argument `lengths` must hold an integer for each sample, but got {array.dtype} {list(array.shape)}."
        )
    wrong = (array < 1) | (array >= 2**31)
    if wrong.any():
        at = int(wrong.argmax())
        raise ValueError(f"Argument `lengths` must be in [1, 2^31), but sample {at} has {array[at]}.")
    return array.astype(np.int32)


def _of_columns(dataset: Any, length: str | Callable[[Any], int]) -> np.ndarray | None:
    """The lengths that a ``datasets.Dataset`` knows; None for another data set."""
    names = getattr(dataset, "column_names", None)
    if not isinstance(names, list) or not hasattr(dataset, "with_format") or callable(length):
        return None
    known = next((name for name in COLUMNS if name in names), length)
    if known not in names:
        raise ValueError(f"Argument `length` must name a column, {', '.join(names)}, but got {length!r}.")
    column = dataset.with_format("arrow")
    parts = []
    for start in range(0, len(dataset), 100 * CHUNK):
        values = column[start : start + 100 * CHUNK][known].combine_chunks()
        lists = pa.types.is_list(values.type) or pa.types.is_large_list(values.type)
        parts.append((values.value_lengths() if lists else values).to_numpy(zero_copy_only=False))
    return np.concatenate(parts)


class _Lengths(Dataset):
    """Lengths of the samples in chunks, int64."""

    def __init__(self, dataset: Any, length: str | Callable[[Any], int]) -> None:
        self.dataset, self.length = dataset, length

    def __len__(self) -> int:
        return -(-len(self.dataset) // CHUNK)

    def __getitem__(self, chunk: int) -> np.ndarray:
        if not 0 <= chunk < len(self):
            raise IndexError(chunk)
        places = range(chunk * CHUNK, min((chunk + 1) * CHUNK, len(self.dataset)))
        return np.array([self._of(place) for place in places], np.int64)

    def _of(self, place: int) -> int:
        sample = self.dataset[place]
        if callable(self.length):
            return int(self.length(sample))
        if isinstance(sample, Mapping) and self.length in sample:
            return len(sample[self.length])
        fields = (
            f"with {', '.join(map(str, sample))}" if isinstance(sample, Mapping) else f"a {type(sample).__name__}"
        )
        raise ValueError(
            f"Argument `length` must name a field of the samples or be a function of one, such as `len`, but got "
            f"{self.length!r} for a sample {fields}."
        )


def _key(dataset: Any) -> str:
    from curation.instances.selection_index import fingerprint

    return fingerprint(dataset)


def _write(cache: str | PathLike[str], lengths: np.ndarray, dataset: Any) -> None:
    schema = pa.schema([("length", pa.int32())], metadata={"fingerprint": _key(dataset)})
    with replacing(cache) as new, pa.OSFile(str(new), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        writer.write_batch(pa.record_batch([pa.array(lengths)], schema=schema))


def _read(cache: str | PathLike[str], dataset: Any) -> np.ndarray:
    try:
        with pa.memory_map(str(cache)) as file:
            table = pa.ipc.open_file(file).read_all()
        kept = (table.schema.metadata or {}).get(b"fingerprint", b"").decode()
        lengths = table["length"].to_numpy()
    except (pa.ArrowInvalid, KeyError) as error:
        raise ValueError(f"Argument `cache` must name a file of lengths, but {str(cache)!r}: {error}") from error
    if len(lengths) != len(dataset) or kept != _key(dataset):
        raise ValueError(
            f"Argument `cache` must be of this data set of {len(dataset)} samples, but {str(cache)!r} is of other "
            f"{len(lengths)}. Remove it to have it written anew."
        )
    return check_lengths(lengths)
