"""Ids of iterable data sets, from a column; from shards in ``tests/callbacks/records/test_streams.py``."""

import hashlib

import pytest
import torch
from datasets import Dataset as HuggingFace
from torch.utils.data import DataLoader, IterableDataset

from curation.sample_ids import split_sample_ids
from curation.stream_ids import stream_ids


class Rows(IterableDataset):
    def __init__(self, rows):
        self.rows, self.epoch = rows, 0

    def __iter__(self):
        return iter(self.rows)

    def set_epoch(self, epoch):
        self.epoch = epoch


class Sized(Rows):
    def __len__(self):
        return len(self.rows)


def test_an_integer_is_the_id_in_mappings_and_tuples():
    mappings = stream_ids(Rows([{"x": 1.0, "key": 7}, {"x": 2.0, "key": torch.tensor(5)}]), "key")
    assert [row["sample_id"] for row in mappings] == [7, 5]
    (batch,) = DataLoader(stream_ids(Rows([(1.0, 7), (2.0, 5)]), 1), 2)
    (x, key), ids = split_sample_ids(batch)
    assert (x.tolist(), key.tolist(), ids.tolist()) == ([1.0, 2.0], [7, 5], [7, 5])


@pytest.mark.parametrize("hugging_face", [False, True])
@pytest.mark.parametrize("buckets", [None, 1000, 1])
def test_texts_are_hashed_into_the_buckets(hugging_face, buckets):
    texts = [f"page {i}" for i in range(20)]
    rows = [{"url": text} for text in texts]
    data = HuggingFace.from_list(rows).to_iterable_dataset(3) if hugging_face else Rows(rows)
    hashed = [int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") // 2 for text in texts]
    expected = [value % (buckets or 2**63) for value in hashed]
    assert [row["sample_id"] for row in stream_ids(data, "url", buckets)] == expected


def test_what_else_the_data_set_has_stays():
    data = Rows([{"key": 1}])
    stream_ids(data, "key").set_epoch(3)
    assert data.epoch == 3
    assert len(stream_ids(Sized([{"key": 1}] * 4), "key")) == 4
    assert not hasattr(stream_ids(data, "key"), "__len__")


def test_a_shard_is_read_in_blocks():
    """Of more rows than a block has."""
    data = HuggingFace.from_dict({"x": list(range(700))}).to_iterable_dataset(num_shards=2)
    assert [(row["x"], row["sample_id"]) for row in stream_ids(data)] == [
        *[(i, 2 * i) for i in range(350)],
        *[(350 + i, 2 * i + 1) for i in range(350)],
    ]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1, 2],), TypeError, "Argument `dataset` must be an iterable data set, but got list"),
        ((Rows([]),), TypeError, "Argument `column` must be given for a Rows, whose shards are not known"),
        ((Rows([]), None, 5), ValueError, "Argument `column` must be given for `buckets=5`, but got None"),
        ((Rows([]), "key", 0), ValueError, "Argument `buckets` must be .* but got 0"),
        ((Rows([{"key": 1.5}]), "key"), TypeError, "must name integers, texts or bytes, but 'key' .* is float"),
        ((Rows([{"key": True}]), "key"), TypeError, "must name integers, texts or bytes, but 'key' .* is bool"),
        ((Rows([{"key": -1}]), "key"), ValueError, r"must name integers in \[0, 2\^63\), but a sample has -1"),
        ((Rows([{"key": 1, "sample_id": 1}]), "key"), ValueError, "must not hold ids already"),
        ((Rows([[1]]), 0), TypeError, "must hold mappings or plain tuples"),
    ],
)
def test_a_bad_argument_is_named_with_its_value(arguments, error, message):
    with pytest.raises(error, match=message):
        list(stream_ids(*arguments))
