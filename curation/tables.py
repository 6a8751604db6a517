"""Tables in Parquet files that tell when they are damaged."""

import json
import zlib
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np

from curation import arrow as pa
from curation.files import replacing

_CHECKSUMS = b"checksums"


def write_table(
    path: str | PathLike[str], columns: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Write columns with their checksums; the file is replaced as a whole.

    Every page has the checksum of Parquet, which any reader can check; the metadata hold those of whole columns,
    since the footer has none.

    Args:
        path: The file.
        columns: Numeric arrays ``[N]`` by name.
        metadata: Texts to save with them.

    Raises:
        OSError: If the file cannot be written; the error names it.
    """
    table, texts = pa.table(dict(columns)), dict(metadata or {})
    checksums = json.dumps({name: _column_checksum(table, name) for name in columns} | {"": _text_checksum(texts)})
    table = table.replace_schema_metadata({**texts, _CHECKSUMS.decode(): checksums})
    with replacing(path) as new:
        pa.parquet.write_table(table, new, compression="zstd", write_page_checksum=True)


def read_table(path: str | PathLike[str], columns: Sequence[str] | None = None) -> Any:
    """Read what :func:`write_table` wrote; a file of earlier versions, without checksums, is read as it is.

    Args:
        path: The file.
        columns: Names of the columns to read; None for all.

    Returns:
        A ``pyarrow.Table`` with the texts as its schema's metadata.

    Raises:
        ValueError: If the file is damaged, or no Parquet file with these columns.
        OSError: If the file cannot be opened.

    Example:
        >>> import tempfile, pathlib
        >>> file = pathlib.Path(tempfile.mkdtemp(), "table.parquet")
        >>> write_table(file, {"x": np.arange(3)})
        >>> read_table(file)["x"].to_pylist()
        [0, 1, 2]
    """
    try:
        with pa.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            table = file.read(columns=None if columns is None else list(columns))
        missing = set(columns or []) - set(table.column_names)
        if missing:
            raise ValueError(f"it has no column {min(missing)!r}")
        texts = dict(table.schema.metadata or {})
        checksums = json.loads(texts.pop(_CHECKSUMS, b"{}"))
        actual = {name: _column_checksum(table, name) for name in table.column_names}
        actual[""] = _text_checksum({key.decode(): value.decode() for key, value in texts.items()})
        wrong = [name for name, checksum in actual.items() if checksums and checksums.get(name) != checksum]
        if wrong:
            raise ValueError(f"the checksum of {wrong[0] or 'the metadata'!r} is another")
    except Exception as error:  # any error: damage shows as whatever the reader stumbles over
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"The file {str(path)!r} is damaged, or was not written for this: {error}") from error
    return table.replace_schema_metadata(texts)


def _column_checksum(table: Any, name: str) -> int:
    values = np.ascontiguousarray(table[name].to_numpy())
    return zlib.crc32(values.tobytes(), zlib.crc32(f"{name} {values.dtype} {len(values)}".encode()))


def _text_checksum(texts: Mapping[str, str]) -> int:
    return zlib.crc32(json.dumps(dict(texts), sort_keys=True).encode())
