"""Where concepts come from, and that none is lost on the way to disk and back."""

import math
import pickle
from decimal import Decimal

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from curation.samplers.concept_index import ConceptIndex

names = st.sampled_from(["cat", "dog", "sofa", "", "ä"])
MISSING = [None, math.nan, pd.NA, pd.NaT, np.float32("nan"), np.datetime64("NaT"), Decimal("NaN"), np.ma.masked]


def sets(index):
    return [{index.names[c] for c in index[i]} for i in range(len(index))]


@given(st.lists(st.lists(names, max_size=6), min_size=1, max_size=8), st.data())
def test_lists_columns_and_files_hold_the_same_sets(rows, d):
    index = ConceptIndex.from_lists(rows)
    expected = [set(row) for row in rows]
    assert sets(index) == expected
    assert all((np.diff(index[i]) > 0).all() for i in range(len(index)))
    column = datasets.Dataset.from_dict(
        {"tags": rows}, features=datasets.Features({"tags": [datasets.Value("string")]})
    )
    order = d.draw(st.permutations(range(len(rows))))
    for dataset, wanted in ((column, expected), (column.select(order), [expected[i] for i in order])):
        assert sets(ConceptIndex.from_column(dataset, "tags")) == wanted
    assert sets(index.take(np.array(order))) == [expected[i] for i in order]
    assert index.frequencies.tolist() == [sum(name in row for row in expected) for name in index.names]
    padded = index.padded()
    assert [set(row[row >= 0].tolist()) for row in padded] == [set(index[i].tolist()) for i in range(len(index))]
    assert sets(pickle.loads(pickle.dumps(index))) == expected


def test_a_file_is_read_in_pages(tmp_path):
    index = ConceptIndex.from_lists([["a", 1], [], [2.5]])
    index.save(tmp_path / "concepts.arrow")
    loaded = ConceptIndex.load(tmp_path / "concepts.arrow")
    assert sets(loaded) == [{"a", 1}, set(), {2.5}]
    assert (loaded.offsets.dtype, loaded.ids.dtype) == (np.int64, np.int32)
    assert not loaded.ids.flags.owndata
    assert not loaded.ids.flags.writeable
    pickled = pickle.dumps(loaded)
    assert len(pickled) < 300  # the file's path
    assert sets(pickle.loads(pickled)) == sets(loaded)
    loaded.save(tmp_path / "again.arrow")
    assert (tmp_path / "again.arrow").read_bytes() == (tmp_path / "concepts.arrow").read_bytes()


def test_labels():
    for labels in ([2, 0, 0], np.array([2, 0, 0], np.uint8), torch.tensor([2, 0, 0])):
        index = ConceptIndex.from_labels(labels)
        assert (index.names, index.ids.tolist(), index.sizes.tolist()) == (range(3), [2, 0, 0], [1, 1, 1])
    assert sets(ConceptIndex.from_labels([2, 0], ["a", "b", "c"])) == [{"c"}, {"a"}]
    assert sets(ConceptIndex.from_labels(["x", "y", "x"])) == [{"x"}, {"y"}, {"x"}]
    index = ConceptIndex.from_labels(["x", "y"], names=["y", "z", "x"])
    assert (index.names, index.ids.tolist()) == (["y", "z", "x"], [2, 0])


def test_columns_of_other_types():
    classes = datasets.ClassLabel(names=["a", "b", "c"])
    kinds = {"c": classes, "n": datasets.Value("int64"), "m": [classes], "x": datasets.Value("float32")}
    features = datasets.Features(kinds)
    rows = {"c": [2, 0, None], "n": [7, 7, 9], "m": [[2, 0], None, [1, 1]], "x": [0.0, 1.0, 2.0]}
    dataset = datasets.Dataset.from_dict(rows, features=features)
    assert ConceptIndex.from_column(dataset, "c").names == ["a", "b", "c"]
    assert sets(ConceptIndex.from_column(dataset, "c")) == [{"c"}, {"a"}, set()]
    assert sets(ConceptIndex.from_column(dataset, "n")) == [{7}, {7}, {9}]
    assert sets(ConceptIndex.from_column(dataset, "m")) == [{"c", "a"}, set(), {"b"}]
    many = datasets.concatenate_datasets([dataset, dataset.select([1])])  # several Arrow chunks
    assert sets(ConceptIndex.from_column(many, "m")) == [{"c", "a"}, set(), {"b"}, set()]
    with pytest.raises(ValueError, match="must hold names or integers, but holds float"):
        ConceptIndex.from_column(dataset, "x")
    with pytest.raises(ValueError, match=r"Argument `column` must be one of .*'c'.* but got 'tags'"):
        ConceptIndex.from_column(dataset, "tags")
    nulls = datasets.Dataset.from_dict({"tags": [["a", None]]})
    with pytest.raises(ValueError, match="'tags' has a list with a null"):
        ConceptIndex.from_column(nulls, "tags")
    stream = dataset.to_iterable_dataset()
    with pytest.raises(TypeError, match=r"`dataset` must be a datasets.Dataset, one split, but got IterableDataset"):
        ConceptIndex.from_column(stream, "n")
    unlabelled = datasets.Dataset.from_dict({"c": [-1, 1]}, features=datasets.Features({"c": classes}))
    with pytest.raises(ValueError, match=r"'c' must hold labels in \[0, 3\), but has -1"):
        ConceptIndex.from_column(unlabelled, "c")


@pytest.mark.parametrize(
    "array",
    [
        pa.array([["b", "a"], None, ["a", "a"]], pa.list_(pa.string(), 2)),
        pa.array([["b", "a"], None, ["a"]], pa.large_list(pa.large_string())),
        pa.array([["b", "a"], None, ["a"]], pa.list_(pa.string_view())),
        pa.array([["b", "a"], None, ["a"]], pa.list_(pa.dictionary(pa.int32(), pa.string()))),
    ],
    ids=lambda array: str(array.type),
)
def test_columns_of_every_type_of_lists_and_strings(array):
    """Without `datasets`, which does not know all types and changes some on the way."""

    class Table:
        column_names, features = ["tags"], {"tags": None}

        def __len__(self):
            return len(array)

        def select_columns(self, names):
            return self

        def with_format(self, kind):
            return self

        def __getitem__(self, rows):
            return pa.table({"tags": pa.chunked_array([array[:2], array[2:]])})

    assert sets(ConceptIndex.from_column(Table(), "tags")) == [{"a", "b"}, set(), {"a"}]


@given(st.lists(st.sampled_from(["a", 1, *MISSING]), min_size=1, max_size=6), st.booleans())
def test_a_missing_name_is_no_concept_wherever_it_stands(labels, listed):
    first = next((i for i, label in enumerate(labels) if any(label is name for name in MISSING)), None)
    array = np.empty(len(labels), object)
    array[:] = labels
    make = ConceptIndex.from_lists if listed else ConceptIndex.from_labels
    given_labels = [[label] for label in labels] if listed else array
    if first is None:
        assert sets(make(given_labels)) == [{label} for label in labels]
        return
    with pytest.raises(ValueError, match=f"concepts of sample {first} must be names"):
        make(given_labels)


def test_dates_are_names_and_missing_dates_are_not():
    days = pd.to_datetime(["2020-01-02", "2020-01-01", "2020-01-02"]).to_numpy("M8[ns]")
    index = ConceptIndex.from_labels(days)
    assert index.ids.tolist() == [0, 1, 0]
    assert index.names == list(days[:2])
    assert ConceptIndex.from_labels(days, names=days[1::-1]).ids.tolist() == [1, 0, 1]
    for missing in (np.array(["NaT"], "M8[ns]"), pd.Series(["a", None], dtype="string")):
        with pytest.raises(ValueError, match="must be names, but one is"):
            ConceptIndex.from_labels(missing)
    with pytest.raises(ValueError, match="`labels` must be integers or names"):
        ConceptIndex.from_labels(pd.Series([0, None], dtype="Int64"))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """An index, the bytes of its file, and a path for damaged ones."""
    index = ConceptIndex.from_lists(np.random.default_rng(0).integers(0, 50, (200, 5)).tolist())
    path = tmp_path_factory.mktemp("index") / "damaged.arrow"
    index.save(path)
    return index, path.read_bytes(), path


@given(st.data())
def test_a_damaged_file_is_refused_by_its_name_or_holds_the_same(written, d):
    """Flipped bits and files cut short; the padding of a file may hold anything."""
    index, whole, path = written
    content = bytearray(whole)
    for place in d.draw(st.lists(st.integers(0, len(whole) - 1), max_size=3)):
        content[place] ^= 1 << d.draw(st.integers(0, 7))
    path.unlink(missing_ok=True)  # a map of the old file stays what it was
    path.write_bytes(content[: d.draw(st.sampled_from([len(whole), len(whole) - 1, len(whole) // 2, 9, 0]))])
    try:
        loaded = ConceptIndex.load(path)
        same = loaded.names == index.names and all(
            np.array_equal(getattr(loaded, part), getattr(index, part)) for part in ("offsets", "ids")
        )
    except (ValueError, OSError) as error:
        same = "damaged.arrow" in str(error)
    assert same


def write(path, offsets, ids, metadata):
    """A file without a checksum, as earlier versions wrote."""
    rows = pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(ids, pa.int32()))
    schema = pa.schema([("concepts", rows.type)], metadata=metadata)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        writer.write_batch(pa.record_batch([rows], schema=schema))


def test_files_of_earlier_versions_load_and_their_structure_is_checked(tmp_path):
    path = tmp_path / "old.arrow"
    write(path, [0, 2, 3], [0, 1, 1], {"names": '["a", "b"]'})
    old = ConceptIndex.load(path)
    assert sets(old) == sets(pickle.loads(pickle.dumps(old))) == [{"a", "b"}, {"b"}]
    for offsets, ids, names, message in (
        ([0, 2, 3], [0, 2, 1], '["a", "b"]', r"`ids` must be in \[0, 2\)"),
        ([0, 2, 3], [1, 0, 1], '["a", "b"]', "`ids` must rise strictly"),
        ([0, 2, 3], [0, 1, 1], '["a", null]', "`names` must have no missing name"),
        ([0, 2, 3], [0, 1, 1], '["a", "a"]', "`names` must have each name once"),
        ([0, 2, 3], [0, 1, 1], '["a", ["b"]]', "was not written by"),
        ([0, 2, 3], [0, 1, 1], '"ab"', "was not written by"),
    ):
        path.unlink()
        write(path, offsets, ids, {"names": names})
        with pytest.raises(ValueError, match=f"old.arrow.*{message}"):
            ConceptIndex.load(path)


def test_an_index_is_saved_over_its_own_file(tmp_path):
    path = tmp_path / "concepts.arrow"
    ConceptIndex.from_lists([["a", "b"], ["b"]]).save(path)
    loaded = ConceptIndex.load(path)
    loaded.save(path)
    assert sets(loaded) == sets(ConceptIndex.load(path)) == sets(pickle.loads(pickle.dumps(loaded)))
    pickled = pickle.dumps(loaded)
    ConceptIndex.from_lists([["a"], ["b"]]).save(path)
    assert sets(loaded) == [{"a", "b"}, {"b"}]  # the old file, which is still mapped
    with pytest.raises(ValueError, match=r"concepts.arrow is no longer the index that was loaded from it"):
        pickle.loads(pickled)


def test_tensors_and_columns_without_any_concept():
    assert sets(ConceptIndex.from_lists([torch.tensor([1, 2]), np.array([1])])) == [{1, 2}, {1}]
    nothing = datasets.Dataset.from_dict({"none": [None, None], "empty": [[], []]})
    for column in ("none", "empty"):
        assert sets(ConceptIndex.from_column(nothing, column)) == [set(), set()]


def test_rubbish_is_named(tmp_path):
    with pytest.raises(ValueError, match="no samples"):
        ConceptIndex.from_lists([])
    with pytest.raises(ValueError, match="no samples"):
        ConceptIndex.from_labels([])
    with pytest.raises(TypeError, match="concepts of sample 1 must be a list of names, but got 'dog'"):
        ConceptIndex.from_lists([["cat"], "dog"])
    with pytest.raises(TypeError, match="concepts of sample 0 must be a list of names, but got 3"):
        ConceptIndex.from_lists([3])
    for name in MISSING:
        with pytest.raises(ValueError, match="concepts of sample 1 must be names, but one is "):
            ConceptIndex.from_lists([["a"], ["b", name]])
        with pytest.raises(ValueError, match="`names` must have no missing name, but name 1 is one"):
            ConceptIndex.from_labels([0], names=["a", name])
    with pytest.raises(ValueError, match="`labels` must be integers or names, but got float64"):
        ConceptIndex.from_labels([0.0, math.nan])
    with pytest.raises(ValueError, match=r"`labels` must be in \[0, 2\), but got 0 to 2"):
        ConceptIndex.from_labels([0, 2], names=["a", "b"])
    with pytest.raises(ValueError, match=r"`labels` must be in \[0, 2\), but got -1 to 1"):
        ConceptIndex.from_labels([-1, 1])
    with pytest.raises(ValueError, match=r"one label per sample, but got shape \(2, 2\)"):
        ConceptIndex.from_labels(np.eye(2, dtype=int))
    with pytest.raises(ValueError, match="`names` must hold every label, but lacks 'y'"):
        ConceptIndex.from_labels(["x", "y"], names=["x"])
    with pytest.raises(ValueError, match=r"`names` must be given for labels up to 2147483648 of 2 samples"):
        ConceptIndex.from_labels([2**31, 0])
    with pytest.raises(TypeError, match=r"`dataset` must be a datasets.Dataset, one split, but got DatasetDict"):
        ConceptIndex.from_column(datasets.DatasetDict(train=datasets.Dataset.from_dict({"t": ["a"]})), "t")
    for offsets, ids, names, message in (
        ([0, 2], [1], "ab", "`offsets` must rise from 0 to the number of `ids`, 1"),
        ([0, 2, 1], [1], "ab", "`offsets` must rise"),
        ([0.0, 1.0], [1], "ab", "must be integers in one dimension, but got float64"),
        ([0, 1], [5], "ab", r"`ids` must be in \[0, 2\), the concepts with a name, but got 5 to 5"),
        ([0, 1], [-1], "ab", r"`ids` must be in \[0, 2\)"),
        ([0, 2], [1, 0], "ab", "`ids` must rise strictly within each sample"),
        ([0, 2], [1, 1], "ab", "`ids` must rise strictly within each sample"),
        ([0, 1], [1], "aa", "`names` must have each name once"),
        ([0, 1], [2**32], range(2**33), "`names` must hold at most 2\\^31 names"),
    ):
        with pytest.raises(ValueError, match=message):
            ConceptIndex(np.array(offsets), np.array(ids), names)
    with pytest.raises(ValueError, match="`ids` must rise strictly within each sample"):
        ConceptIndex(np.array([0, 2]), np.array([1, 0], np.uint8), "ab")  # whose difference is 255
    with pytest.raises(ValueError, match="`offsets` must rise"):
        ConceptIndex(np.array([0, 2, 1, 2], np.uint64), np.array([0, 1]), "ab")
    assert sets(ConceptIndex([0, 1, 1, 2, 3], [1, 1, 0], "ab")) == [{"b"}, set(), {"b"}, {"a"}]
    with pytest.raises(IndexError, match="Sample 1 of 1"):
        ConceptIndex.from_labels([0])[1]
    with pytest.raises(TypeError, match=r"strings or numbers can be saved, but got \(1, 2\)"):
        ConceptIndex.from_lists([[(1, 2)]]).save(tmp_path / "x.arrow")
    (tmp_path / "other.arrow").write_text("no index")
    with pytest.raises(ValueError, match=r"other.arrow was not written by `ConceptIndex.save`"):
        ConceptIndex.load(tmp_path / "other.arrow")
    with pytest.raises(FileNotFoundError):
        ConceptIndex.load(tmp_path / "missing.arrow")


def test_samples_that_are_not_there_are_named():
    index = ConceptIndex.from_lists([["a"], ["b"], []])
    for samples in ([-1], [0, 3]):
        with pytest.raises(ValueError, match=rf"`samples` must be in \[0, 3\), but got {samples[0]} to"):
            index.take(np.array(samples))
    with pytest.raises(ValueError, match=r"`samples` must be integers \[n\], but got float64 \[1\]"):
        index.take(np.ones(1))
