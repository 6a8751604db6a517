"""Features in files are those of an array, and files that are none are named."""

import pickle

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
    with pytest.raises(ValueError, match=r"`files` must name files, but got .*: there is no '.*z\.parquet'"):
        FeatureShards([tmp_path / "z.parquet"])
    with pytest.raises(ValueError, match="`column` must be one of features, id of"):
        FeatureShards(tmp_path, "vectors")
    with pytest.raises(ValueError, match="`memory` must be at least 224, for the largest row group, but got 100"):
        FeatureShards(tmp_path, memory=100)
    (tmp_path / "d.parquet").write_text("text")
    with pytest.raises(ValueError, match=r"`files` must name Parquet files, but of '.*d\.parquet'"):
        FeatureShards(tmp_path)


@pytest.mark.parametrize("wrong", [[[1.0, 2.0, 3.0]], [None], [[1.0, 2.0], [1.0, 2.0, 3.0, 4.0]]])
def test_files_with_other_numbers_of_features_are_named(wrong, pool, tmp_path):
    write(tmp_path / "d.parquet", wrong)
    with pytest.raises(ValueError, match=r"hold 4 floats in each row, as '.*a\.parquet' does, but group 0 of '.*d\."):
        FeatureShards(tmp_path)
    np.save(tmp_path / "c1.npy", np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"but group 0 of '.*c1\.npy' has 6 in 2 rows"):
        FeatureShards(tmp_path)


@pytest.mark.parametrize("wrong", [[[1.0, 2.0, 3.0], [1.0] * 5]])
def test_rows_of_another_length_are_named_when_they_are_read(wrong, pool, tmp_path):
    write(tmp_path / "d.parquet", wrong)
    shards = FeatureShards(tmp_path)
    with pytest.raises(ValueError, match=r"must hold lists of 4 floats, but row group 0 of '.*d\.parquet' has"):
        shards[0 : len(shards)]


def arrow(path, x, stream):
    table = pa.table({"features": pa.array(list(x), pa.list_(pa.float32())), "id": np.arange(len(x))})
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)


def test_files_of_every_kind_are_one_pool(pool, tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    write(folder / "a.parquet", pool[:9])
    arrow(folder / "b.arrow", pool[9:20], stream=True)
    arrow(folder / "c.arrow", pool[20:30], stream=False)
    np.save(folder / "d.npy", pool[30:])
    (folder / "readme.txt").write_text("no features")
    shards = pickle.loads(pickle.dumps(FeatureShards(folder)))
    for rows in ([0], [8, 9], [10, 12, 19], [19, 20, 29, 30], [31, 35, 39], list(range(40))):
        assert shards[np.array(rows)].tolist() == pool[rows].tolist()
    assert shards[7:33].tolist() == pool[7:33].tolist()
    assert [shards.place(row) for row in (0, 8, 25, 39)] == [
        f"row {row} of {str(folder / name)!r}"
        for row, name in ((0, "a.parquet"), (8, "a.parquet"), (5, "c.arrow"), (9, "d.npy"))
    ]


def test_arrays_and_arrow_files_that_cannot_be_used_are_named(tmp_path):
    for wrong in (np.zeros(3), np.zeros((2, 2), complex), np.asfortranarray(np.zeros((3, 2)))):
        np.save(tmp_path / "a.npy", wrong)
        with pytest.raises(ValueError, match=r"arrays \[N, D\] of numbers, row by row, but '.*a\.npy' has"):
            FeatureShards(tmp_path / "a.npy")
    (tmp_path / "a.npy").write_text("text")
    with pytest.raises(ValueError, match=r"`files` must name files of features, but of '.*a\.npy'"):
        FeatureShards(tmp_path / "a.npy")
    (tmp_path / "a.arrow").write_text("text")
    with pytest.raises(ValueError, match=r"`files` must name Arrow files, but of '.*a\.arrow'"):
        FeatureShards(tmp_path / "a.arrow")
    arrow(tmp_path / "a.arrow", np.zeros((2, 2)), stream=True)
    with pytest.raises(ValueError, match=r"`column` must be one of features, id of '.*a\.arrow'"):
        FeatureShards(tmp_path / "a.arrow", "vectors")


def test_lists_of_integers_are_refused(tmp_path):
    write(tmp_path / "a.parquet", [[1, 2]], kind=pa.list_(pa.int64()))
    with pytest.raises(ValueError, match=r"lists of 2 floats, but row group 0 of .* has int64"):
        FeatureShards(tmp_path)[:1]
