"""Index of the concepts of every sample of a data set, in compressed rows that may lie on disk."""

import json
import os
from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import cached_property
from os import PathLike
from typing import Any

import numpy as np

from curation import arrow as pa
from curation.files import replacing
from curation.samplers.concept_rows import CHUNK, check_parts, checksum, is_missing, plain_names, ranges, unique_rows


class ConceptIndex:
    """The sets of concepts ``C_i`` of ``N`` samples, as compressed sparse rows.

    Row ``i`` is ``ids[offsets[i]:offsets[i + 1]]``, ascending and without repeats. It takes ``8 (N + 1)`` bytes and 4
    for every concept of a sample: 6.2 GB for 128 million samples with 10 each, which need not be in memory
    (:meth:`load`). A sample may have no concepts.

    Args:
        offsets: int64 ``[N + 1]``.
        ids: int32 ``[offsets[N]]``, in ``[0, len(names))``.
        names: Names of the concepts, ``[V]``.

    Raises:
        ValueError: If the parts do not fit together.

    Example:
        >>> index = ConceptIndex([0, 2, 3], [0, 1, 1], ["cat", "dog"])
        >>> len(index), index[0].tolist(), index.frequencies.tolist()
        (2, [0, 1], [1, 2])
    """

    def __init__(self, offsets: np.ndarray, ids: np.ndarray, names: Sequence[Hashable]) -> None:
        offsets, ids = np.asarray(offsets), np.asarray(ids)
        if not (offsets.ndim == ids.ndim == 1 and offsets.dtype.kind in "iu" and ids.dtype.kind in "iu"):
            raise ValueError(
                "Arguments `offsets` and `ids` must be integers in one dimension, but got "
                f"{offsets.dtype} {list(offsets.shape)} and {ids.dtype} {list(ids.shape)}."
            )
        check_parts(offsets, ids, names)
        self._set(offsets.astype(np.int64, copy=False), ids.astype(np.int32, copy=False), names)

    def _set(self, offsets: np.ndarray, ids: np.ndarray, names: Sequence[Hashable]) -> "ConceptIndex":
        self.offsets = offsets
        self.ids = ids
        self.names = names
        self._path: str | None = None
        self._checksum: int | None = None  # of the file
        return self

    def __reduce__(self) -> Any:
        """A memory-mapped index stays on disk when it goes to another process, which does not check it again."""
        if self._path is not None and self._checksum is not None:
            return ConceptIndex._reload, (self._path, self._checksum)
        if self._path is not None:
            return ConceptIndex.load, (self._path,)
        return ConceptIndex._of, (self.offsets, self.ids, self.names)

    @classmethod
    def _of(cls, offsets: np.ndarray, ids: np.ndarray, names: Sequence[Hashable]) -> "ConceptIndex":
        """An index of parts that are known to fit; checking would read them all."""
        return cls.__new__(cls)._set(offsets, ids, names)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, sample: int) -> np.ndarray:
        """The concepts of one sample: int32 ``[|C_i|]``."""
        if not 0 <= sample < len(self):
            raise IndexError(f"Sample {sample} of {len(self)}.")
        return self.ids[self.offsets[sample] : self.offsets[sample + 1]]

    @property
    def sizes(self) -> np.ndarray:
        """``|C_i|``: int64 ``[N]``."""
        return np.diff(self.offsets)

    @cached_property
    def frequencies(self) -> np.ndarray:
        """Samples with each concept: int64 ``[V]``. Reads the whole index once."""
        counts = np.zeros(len(self.names), np.int64)
        for start in range(0, len(self.ids), CHUNK):
            counts += np.bincount(self.ids[start : start + CHUNK], minlength=len(counts))
        return counts

    def take(self, samples: np.ndarray) -> "ConceptIndex":
        """The index of some samples, in their order and with the same concepts.

        Args:
            samples: Integers ``[n]`` in [0, N).

        Raises:
            ValueError: If the samples are no integers in [0, N).
        """
        samples = np.asarray(samples)
        if samples.dtype.kind not in "iu" or samples.ndim != 1:
            raise ValueError(
                f"Argument `samples` must be integers [n], but got {samples.dtype} {list(samples.shape)}."
            )
        if len(samples) and not 0 <= samples.min() <= samples.max() < len(self):
            raise ValueError(
                f"Argument `samples` must be in [0, {len(self)}), but got {samples.min()} to {samples.max()}."
            )
        starts = self.offsets[samples]
        sizes = self.offsets[samples + 1] - starts
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        return self._of(offsets, self.ids[ranges(starts, sizes, offsets)], self.names)

    def padded(self) -> np.ndarray:
        """Concepts as int32 ``[N, max(1, max |C_i|)]``, -1 where a sample has fewer."""
        sizes = self.sizes
        rows = np.full((len(self), int(sizes.max(initial=1))), -1, np.int32)
        rows[np.arange(rows.shape[1]) < sizes[:, None]] = self.ids
        return rows

    # ------------------------------------------------------------------ construction

    @classmethod
    def from_lists(cls, concepts: Iterable[Iterable[Hashable]]) -> "ConceptIndex":
        """From the concepts of each sample, such as ``[["cat", "sofa"], ["dog"], []]``; repeats count once.

        Args:
            concepts: One iterable of names per sample.

        Raises:
            TypeError: If a sample is a string or no iterable.
            ValueError: If there are no samples, or a name is missing: None, NaN, or ``NA`` and ``NaT`` of pandas.

        Example:
            >>> index = ConceptIndex.from_lists([["cat", "sofa", "cat"], ["dog"], []])
            >>> index.names, index[0].tolist(), index.sizes.tolist()
            (['cat', 'sofa', 'dog'], [0, 1], [2, 1, 0])
        """
        id_of: dict[Hashable, int] = {}
        ids: list[int] = []
        offsets = [0]
        for i, names in enumerate(concepts):
            if isinstance(names, (str, bytes, Mapping)) or not isinstance(names, Iterable):
                raise TypeError(f"The concepts of sample {i} must be a list of names, but got {names!r}.")
            row = set()
            for name in plain_names(names):
                if is_missing(name):
                    raise ValueError(f"The concepts of sample {i} must be names, but one is {name!r}.")
                row.add(id_of.setdefault(name, len(id_of)))
            ids += sorted(row)
            offsets.append(len(ids))
        return cls(*_check_samples(offsets, ids), list(id_of))

    @classmethod
    def from_labels(cls, labels: Any, names: Sequence[Hashable] | None = None) -> "ConceptIndex":
        """From one class label per sample.

        Args:
            labels: Integers ``[N]`` in ``[0, V)`` (a tensor, an array, a list), or names.
            names: Names of the classes, ``[V]``; None for the numbers up to the largest label.

        Raises:
            ValueError: If there are no samples, a label is missing or no class, or the largest label is far above
                the number of samples.

        Example:
            >>> ConceptIndex.from_labels([1, 0, 1], ["cat", "dog"]).frequencies.tolist()
            [1, 2]
        """
        array = np.asarray(labels)
        if array.ndim != 1:
            raise ValueError(f"Argument `labels` must have one label per sample, but got shape {array.shape}.")
        if not len(array):
            raise ValueError("There are no samples.")
        if array.dtype.kind not in "iu":
            if array.dtype.kind in "fc":
                raise ValueError(f"Argument `labels` must be integers or names, but got {array.dtype}.")
            if names is not None:
                place = {name: i for i, name in enumerate(names)}
                unknown = [label for label in plain_names(array) if label not in place]
                if unknown:
                    raise ValueError(f"Argument `names` must hold every label, but lacks {unknown[0]!r}.")
                return cls.from_labels(np.array([place[label] for label in plain_names(array)], np.int32), names)
            return cls.from_lists([[label] for label in plain_names(array)])
        count = int(array.max()) + 1 if names is None else len(names)
        if names is None and count > 1_000_000 + len(array):  # there is an entry for every class in many places
            raise ValueError(
                f"Argument `names` must be given for labels up to {count - 1} of {len(array)} samples, but got None; "
                "or take `from_lists`."
            )
        if not 0 <= array.min() <= array.max() < count:
            raise ValueError(f"Argument `labels` must be in [0, {count}), but got {array.min()} to {array.max()}.")
        offsets, ids = _check_samples(np.arange(len(array) + 1), array)
        return cls(offsets, ids, range(count) if names is None else names)

    @classmethod
    def from_column(cls, dataset: Any, column: str) -> "ConceptIndex":
        """From a column of a ``datasets.Dataset`` with names, class labels, or lists of either.

        Works on Arrow buffers, without a Python object per sample. A null is a sample without concepts. Lists may
        have a fixed length, and names any Arrow type of strings, also as a dictionary.

        Args:
            dataset: The data set, one split.
            column: Name of the column.

        Raises:
            TypeError: If ``dataset`` is no ``datasets.Dataset``, but a stream or several splits, say.
            ValueError: If there is no such column, the column has another type, or a list holds a null.
        """
        sized = hasattr(dataset, "select_columns") and hasattr(dataset, "__len__")
        if not sized or not isinstance(dataset.column_names, list):
            raise TypeError(
                f"Argument `dataset` must be a datasets.Dataset, one split, but got {type(dataset).__name__}."
            )
        if column not in dataset.column_names:
            raise ValueError(f"Argument `column` must be one of {dataset.column_names}, but got {column!r}.")
        feature: Any = dataset.features[column]
        feature = getattr(feature, "feature", feature[0] if isinstance(feature, list) else feature)
        chunks = dataset.select_columns([column]).with_format("arrow")[:][column]
        sizes, values = [np.zeros(1, np.int64)], []
        for chunk in chunks.chunks:
            if any(getattr(pa.types, f"is_{kind}")(chunk.type) for kind in _LISTS):
                lengths = pa.compute.list_value_length(chunk).fill_null(0)
                sizes.append(lengths.to_numpy(zero_copy_only=False).astype(np.int64))
                values.append(chunk.flatten())
            else:
                sizes.append(chunk.is_valid().to_numpy(zero_copy_only=False).astype(np.int64))
                values.append(chunk.drop_null())
        flat = pa.chunked_array(values, type=values[0].type if values else pa.null())
        if pa.types.is_null(flat.type) and not len(flat):
            flat = flat.cast(pa.int64())  # no sample has a concept
        if pa.types.is_dictionary(flat.type):
            flat = flat.cast(flat.type.value_type)
        if flat.null_count:
            raise ValueError(f"Column {column!r} has a list with a null in it.")
        if not (pa.types.is_integer(flat.type) or flat.type in (pa.string(), pa.large_string(), pa.string_view())):
            raise ValueError(f"Column {column!r} must hold names or integers, but holds {flat.type}.")
        if flat.type == pa.string_view():  # which Arrow cannot encode
            flat = flat.cast(pa.large_string())
        coded = flat.dictionary_encode().unify_dictionaries()
        names = coded.chunk(0).dictionary.to_pylist() if coded.num_chunks else []
        ids = np.concatenate([c.indices.to_numpy() for c in coded.chunks] or [np.zeros(0, np.int32)])
        if hasattr(feature, "names"):  # datasets.ClassLabel: keep its order, and classes without a sample
            ids, names = np.asarray(names, np.int32)[ids], list(feature.names)
            if ids.min(initial=0) < 0:
                raise ValueError(f"Column {column!r} must hold labels in [0, {len(names)}), but has {ids.min()}.")
        return cls(*unique_rows(*_check_samples(np.cumsum(np.concatenate(sizes)), ids)), names)

    # ------------------------------------------------------------------ on disk

    def save(self, path: str | PathLike[str]) -> None:
        """Write an Arrow IPC file with one column ``concepts``, ``large_list<int32>``; names are in its metadata.

        The file is replaced as a whole; an index that was loaded from the old file can be saved to its path.

        Args:
            path: The file.

        Raises:
            TypeError: If a name is neither a string nor a number.
            OSError: If the file cannot be written.
        """
        rows = pa.LargeListArray.from_arrays(pa.array(self.offsets), pa.array(self.ids))
        plain = [name.item() if isinstance(name, np.generic) else name for name in self.names]
        unsupported = next((name for name in plain if not isinstance(name, (str, int, float))), None)
        if unsupported is not None:
            raise TypeError(f"Only names that are strings or numbers can be saved, but got {unsupported!r}.")
        names = json.dumps(plain)
        metadata = {"names": names, "checksum": str(checksum(self.offsets, self.ids, names))}
        schema = pa.schema([("concepts", rows.type)], metadata=metadata)
        with replacing(path) as new, pa.OSFile(str(new), "wb") as file, pa.ipc.new_file(file, schema) as writer:
            writer.write_batch(pa.record_batch([rows], schema=schema))

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "ConceptIndex":
        """Memory-map a file of :meth:`save`; its pages are read on demand.

        The file is read once, in pieces, to check it; files of earlier versions have no checksum, and only their
        structure is checked.

        Raises:
            OSError: If there is no such file, or it cannot be read.
            ValueError: If the file was not written by :meth:`save`, or is damaged; the error names it.
        """
        index, names = cls._map(path)
        try:
            check_parts(index.offsets, index.ids, index.names)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)} is damaged, or no index of concepts: {error}") from error
        if index._checksum is not None and index._checksum != checksum(index.offsets, index.ids, names):
            raise ValueError(f"{os.fspath(path)} is damaged: its checksum differs. Make it again.")
        return index

    @classmethod
    def _map(cls, path: str | PathLike[str]) -> tuple["ConceptIndex", str]:
        """The index in a file, not checked, and its names as JSON."""
        try:
            reader = pa.ipc.open_file(pa.memory_map(os.fspath(path)))
            metadata = reader.schema.metadata or {}
            text = metadata[b"names"].decode()
            names, stored = json.loads(text), metadata.get(b"checksum")
            rows = reader.get_batch(0).column("concepts")
            rows.validate()
            if (
                reader.num_record_batches != 1
                or rows.type != pa.large_list(pa.int32())
                or not isinstance(names, list)
            ):
                raise ValueError("another table")
            if any(isinstance(name, (list, dict)) for name in names):
                raise ValueError("names that are lists")
            index = cls._of(rows.offsets.to_numpy(), rows.values.to_numpy(), names)
            index._checksum = None if stored is None else int(stored)
        except (pa.ArrowException, ValueError, KeyError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # no such file, no permission
                raise
            raise ValueError(f"{os.fspath(path)} was not written by `ConceptIndex.save`, or is damaged.") from error
        index._path = os.path.abspath(path)
        return index, text

    @classmethod
    def _reload(cls, path: str, checksum: int) -> "ConceptIndex":
        """The index in a file that another process has checked.

        Raises:
            ValueError: If the file is another one by now.
        """
        index, _ = cls._map(path)
        if index._checksum != checksum:
            raise ValueError(f"{path} is no longer the index that was loaded from it.")
        return index


_LISTS = ("list", "large_list", "fixed_size_list")


def _check_samples(offsets: Any, ids: Any) -> tuple[np.ndarray, np.ndarray]:
    if len(offsets) < 2:
        raise ValueError("There are no samples.")
    return np.asarray(offsets, np.int64), ids if isinstance(ids, np.ndarray) else np.asarray(ids, np.int64)
