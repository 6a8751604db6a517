"""A table is read as it was written, or the error names its file."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from curation.tables import read_table, write_table

COLUMNS = {
    "id": np.arange(40),
    "score": np.linspace(0, 1, 40, dtype=np.float32),
    "kept": np.arange(40, dtype=np.int32),
}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("tables") / "table.parquet"
    write_table(path, COLUMNS, {"made": "by hand"})
    return path, path.read_bytes()


def outcome(table, damaged, columns=None):
    """What is read of a damaged file; None if it is refused by name."""
    path, whole = table
    path.write_bytes(damaged)
    try:
        got = read_table(path, columns)
    except ValueError as error:
        return None if str(path) in str(error) else error
    finally:
        path.write_bytes(whole)
    return got.to_pydict(), (got.schema.metadata or {}).get(b"made")


@given(st.integers(0, 2**63), st.integers(0, 7))
@example(-1, 0)
def test_a_flipped_bit_is_never_read_as_another_value(table, place, bit):
    """At worst the metadata are gone, as those of earlier versions are."""
    damaged = bytearray(table[1])
    damaged[place % len(damaged)] ^= 1 << bit
    for columns in (None, ["kept"]):
        values, made = outcome(table, table[1], columns)
        assert outcome(table, damaged, columns) in (None, (values, made), (values, None))


@pytest.mark.parametrize("length", [0, 3, 4, 100, -1])
def test_a_cut_file_is_refused_by_name(table, length):
    assert outcome(table, table[1][:length]) is None


def test_a_table_is_read_as_it_was_written(table):
    values, made = outcome(table, table[1])
    assert values == {name: column.tolist() for name, column in COLUMNS.items()}
    assert made == b"by hand"
    assert read_table(table[0], ["kept"]).column_names == ["kept"]
    with pytest.raises(ValueError, match="no column 'other'"):
        read_table(table[0], ["kept", "other"])
    with pytest.raises(FileNotFoundError):
        read_table(table[0].with_name("none.parquet"))
