"""Rows of any nested batch."""

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from curation.batch import SampleIds, batch_size, split_sample_ids, take_rows, trim_padding

Pair = namedtuple("Pair", ["x", "y"])


@dataclass(frozen=True)
class Sample:
    x: torch.Tensor
    name: list
    scale: float = 2.0


X = torch.arange(12).view(4, 3)
Y = torch.arange(4)
NAMES = ["a", "b", "c", "d"]
ROWS = torch.tensor([3, 1])


@pytest.mark.parametrize(
    "batch",
    [
        X,
        [X, Y],
        (X, Y),
        Pair(X, Y),
        {"x": X, "y": Y},
        OrderedDict(x=X, y=Y),
        UserDict({"x": X, "y": Y}),
        Sample(X, NAMES),
        {"a": [X, (Y, Pair(X, Y))], "b": {"c": Sample(X, NAMES)}},
    ],
    ids=lambda b: type(b).__name__,
)
def test_rows_of_every_container(batch):
    def flat(node):
        if isinstance(node, torch.Tensor):
            return [node]
        if isinstance(node, (dict, UserDict)):
            return [t for v in node.values() for t in flat(v)]
        if isinstance(node, Sample):
            return flat(node.x)
        return [t for v in node for t in flat(v)]

    before = [t.clone() for t in flat(batch)]
    kept = take_rows(batch, ROWS)
    assert batch_size(batch) == 4
    assert batch_size(kept) == 2
    assert type(kept) is type(batch)
    for got, want in zip(flat(kept), before, strict=True):
        assert torch.equal(got, want[ROWS])
    for now, want in zip(flat(batch), before, strict=True):
        assert torch.equal(now, want)


def test_columns_of_plain_values_are_rows_and_the_rest_is_left_alone():
    batch = {"x": X, "name": NAMES, "pair": ("p", "q"), "temperature": torch.tensor(0.5), "none": None}
    kept = take_rows(batch, ROWS)
    assert kept["name"] == ["d", "b"]
    assert kept["pair"] == ("p", "q")
    assert kept["temperature"] is batch["temperature"]
    assert kept["none"] is None
    frozen = take_rows(Sample(X, NAMES, 3.0), ROWS)
    assert frozen.name == ["d", "b"]
    assert frozen.scale == 3.0


def test_bad_batches_are_named():
    with pytest.raises(TypeError, match="no tensor with a batch dimension, but is dict"):
        batch_size({"x": torch.tensor(1.0), "s": "text"})
    with pytest.raises(ValueError, match=r"batch\.x has 4, batch\.weights has 10"):
        batch_size({"x": X, "weights": torch.zeros(10)})
    with pytest.raises(ValueError, match="has no rows"):
        batch_size([torch.zeros(0, 2)])


def test_trimming_keeps_every_used_column():
    mask = torch.tensor([[0, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    batch = {
        "input_ids": mask * 7,
        "attention_mask": mask,
        "label": torch.zeros(2),
        "h": torch.zeros(2, 5, 4),
    }
    out = trim_padding(batch)
    assert {k: tuple(v.shape) for k, v in out.items()} == {
        "input_ids": (2, 3),
        "attention_mask": (2, 3),
        "label": (2,),
        "h": (2, 3, 4),
    }
    assert batch["input_ids"].shape == (2, 5)
    left_padded = {"input_ids": mask.flip(1), "attention_mask": mask.flip(1)}
    assert trim_padding(left_padded) is left_padded
    for other in ([X], {"x": X}, {"input_ids": X, "attention_mask": Y}):
        assert trim_padding(other) is other
    empty = {"input_ids": mask, "attention_mask": torch.zeros_like(mask)}
    assert trim_padding(empty) is empty


@pytest.mark.parametrize("workers", [0, 1])
def test_ids_survive_default_collation(workers):
    pairs = SampleIds(TensorDataset(torch.randn(1000, 2), torch.arange(1000)))
    for batch in DataLoader(pairs, batch_size=300, shuffle=True, num_workers=workers):
        rest, ids = split_sample_ids(batch)
        assert len(rest) == 2
        assert ids.dtype == torch.int64
        assert torch.equal(ids, rest[1])
    records = SampleIds([{"x": i * 2} for i in range(10)])
    rest, ids = split_sample_ids(next(iter(DataLoader(records, batch_size=10))))
    assert set(rest) == {"x"}
    assert torch.equal(rest["x"], ids * 2)


def test_batches_without_ids_are_untouched():
    for batch in (X, [X, Y], (X,), Pair(X, {"sample_id": Y}), [X, {"sample_id": Y, "more": Y}], {"x": X}):
        rest, ids = split_sample_ids(batch)
        assert rest is batch
        assert ids is None


def test_bad_ids_and_data_sets_are_named():
    with pytest.raises(TypeError, match=r"must be integers, but the batch holds torch\.bfloat16"):
        split_sample_ids({"x": X, "sample_id": Y.bfloat16()})
    with pytest.raises(TypeError, match=r"`dataset` must be a map-style data set, but got generator"):
        SampleIds(x for x in range(3))
    with pytest.raises(TypeError, match="mappings or tuples, but a sample is int"):
        SampleIds([1, 2])[0]


def test_batched_fetch_of_the_data_set_is_used():
    class Batched:
        calls = 0

        def __len__(self):
            return 8

        def __getitem__(self, i):
            raise AssertionError("one by one")

        def __getitems__(self, indices):
            Batched.calls += 1
            return [{"x": i} for i in indices]

    batch = next(iter(DataLoader(SampleIds(Batched()), batch_size=4)))
    assert batch["sample_id"].tolist() == [0, 1, 2, 3]
    assert Batched.calls == 1
