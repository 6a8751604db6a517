"""Where concepts come from, and that none is lost on the way to disk and back."""

import math
import pickle

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from curation.samplers.concept_index import ConceptIndex

names = st.sampled_from(["cat", "dog", "sofa", "", "ä"])


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
    unlabelled = datasets.Dataset.from_dict({"c": [-1, 1]}, features=datasets.Features({"c": classes}))
    with pytest.raises(ValueError, match=r"'c' must hold labels in \[0, 3\), but has -1"):
        ConceptIndex.from_column(unlabelled, "c")


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
    for name in (None, math.nan):
        with pytest.raises(ValueError, match=f"sample 0 must be names, but one is {name}"):
            ConceptIndex.from_lists([[name]])
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
    ):
        with pytest.raises(ValueError, match=message):
            ConceptIndex(np.array(offsets), np.array(ids), names)
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
