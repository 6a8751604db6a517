"""Features in Parquet files are those of an array, and files that are none are named."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.instances import FeatureShards, TargetedSelector


def write(path, x, group=7, kind=None, name="features"):
    lists = pa.array(list(x), kind or pa.list_(pa.float32()))
    pq.write_table(pa.table({name: lists, "id": np.arange(len(x))}), path, row_group_size=group)


@pytest.fixture
def pool(tmp_path):
    """40 rows in three files of several row groups, one without rows."""
    x = np.random.default_rng(0).standard_normal((40, 4)).astype(np.float32)
    write(tmp_path / "a.parquet", x[:25])
    write(tmp_path / "b.parquet", x[:0])
    write(tmp_path / "c.parquet", x[25:], kind=pa.list_(pa.float32(), 4))
    return x


def test_rows_are_those_of_an_array(pool, tmp_path):
    for files in (tmp_path, str(tmp_path / "*.parquet"), [tmp_path / f"{name}.parquet" for name in "abc"]):
        shards = FeatureShards(files)
        assert shards.shape == (40, 4)
        assert len(shards) == 40
        for start in range(40):
            for stop in (start + 1, start + 9, 40):
                assert shards[start:stop].tolist() == pool[start:stop].tolist()
        for rows in ([0], [39], [6, 7, 24, 25, 26], list(range(0, 40, 3))):
            assert shards[np.array(rows)].tolist() == pool[rows].tolist()


def test_a_selection_from_files_is_that_from_memory(pool, tmp_path):
    examples = pool[::9] + 0.1
    expected = TargetedSelector(0.2, targets=examples).fit(pool)
    found = TargetedSelector(0.2, targets=examples).fit(FeatureShards(tmp_path))
    assert found.ranking_.tolist() == expected.ranking_.tolist()
    assert found.scores_.tolist() == expected.scores_.tolist()


def test_files_that_cannot_be_used_are_named(pool, tmp_path):
    with pytest.raises(ValueError, match="`files` must have rows"):
        FeatureShards(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"`files` must name Parquet files, but got .*: there is no '.*z\.parquet'"):
        FeatureShards([tmp_path / "z.parquet"])
    with pytest.raises(ValueError, match="`column` must be one of features, id of"):
        FeatureShards(tmp_path, "vectors")
    with pytest.raises(ValueError, match="`memory` must be at least 224, for the largest row group, but got 100"):
        FeatureShards(tmp_path, memory=100)
    (tmp_path / "d.parquet").write_text("text")
    with pytest.raises(ValueError, match=r"`files` must name Parquet files, but of '.*d\.parquet'"):
        FeatureShards(tmp_path)


@pytest.mark.parametrize("wrong", [[[1.0, 2.0, 3.0]], [None], [[1.0, 2.0], [1.0, 2.0, 3.0, 4.0]]])
def test_rows_of_another_length_are_named_when_they_are_read(wrong, pool, tmp_path):
    write(tmp_path / "d.parquet", wrong)
    shards = FeatureShards(tmp_path)
    with pytest.raises(ValueError, match=r"must hold lists of 4 floats, but row group 0 of '.*d\.parquet' has"):
        shards[0 : len(shards)]


def test_lists_of_integers_are_refused(tmp_path):
    write(tmp_path / "a.parquet", [[1, 2]], kind=pa.list_(pa.int64()))
    with pytest.raises(ValueError, match=r"lists of 2 floats, but row group 0 of .* has int64"):
        FeatureShards(tmp_path)[:1]
