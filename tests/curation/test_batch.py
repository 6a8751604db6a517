"""Rows of any nested batch."""

from collections import OrderedDict, UserDict, deque, namedtuple
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

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


def test_columns_of_any_kind_are_rows():
    batch = {
        "x": X,
        "array": np.arange(8).reshape(4, 2),
        "boxes": [[1, 2], [3], [], [4]],
        "meta": [{"i": i} for i in range(4)],
        "paths": tuple(Path(c) for c in "abcd"),
        "scalars": [torch.tensor(i) for i in range(4)],
    }
    kept = take_rows(batch, ROWS)
    assert kept["array"].tolist() == [[6, 7], [2, 3]]
    assert kept["boxes"] == [[4], [3]]
    assert kept["meta"] == [{"i": 3}, {"i": 1}]
    assert kept["paths"] == (Path("d"), Path("b"))
    assert kept["scalars"] == [3, 1]
    with pytest.raises(TypeError, match=r"batch\.queue is a deque as long as the batch"):
        take_rows({"x": X, "queue": deque(range(4))}, ROWS)
    assert take_rows({"x": X, "queue": deque(range(3))}, ROWS)["queue"] == deque(range(3))


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


def test_trimming_never_drops_a_label():
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    labels = torch.tensor([[5, 6, 7, 8, -100], [5, -100, -100, -100, -100]])
    out = trim_padding({"input_ids": mask * 7, "attention_mask": mask, "labels": labels})
    assert torch.equal(out["labels"], labels[:, :4])
    assert all(v.is_contiguous() for v in out.values())
    for_decoder = {"input_ids": mask * 7, "attention_mask": mask, "decoder_input_ids": labels}
    assert trim_padding(for_decoder) is for_decoder


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
    for ids, found in ((Y.bfloat16(), r"torch\.bfloat16 \[4\]"), (X, r"int64 \[4, 3\]"), (["a"], r"list \['a'\]")):
        with pytest.raises(
            TypeError, match=rf"`sample_id` must hold one integer per row, but the batch has .*{found}"
        ):
            split_sample_ids({"x": X, "sample_id": ids})
    assert split_sample_ids({"x": X, "sample_id": [3, 1, 2, 0]})[1].tolist() == [3, 1, 2, 0]
    with pytest.raises(TypeError, match=r"`dataset` must be a map-style data set, but got generator"):
        SampleIds(x for x in range(3))

    class Stream(IterableDataset):
        def __len__(self):
            return 3

        def __iter__(self):
            return iter(range(3))

    with pytest.raises(TypeError, match=r"`dataset` must be a map-style data set, but got Stream"):
        SampleIds(Stream())
    for sample, found in ((1, "int"), (Pair(1, 2), "Pair")):
        with pytest.raises(TypeError, match=f"mappings or plain tuples, but sample 0 is {found}"):
            SampleIds([sample])[0]
    with pytest.raises(ValueError, match="must not hold ids already, but sample 0 has a 'sample_id'"):
        SampleIds([{"x": 1, "sample_id": 7}])[0]


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


def test_keys_that_look_alike_are_two_fields():
    with pytest.raises(ValueError, match=r"batch\.1 has 4, batch\.1 has 5"):
        batch_size({1: X, "1": torch.zeros(5)})


def test_rows_that_cannot_be_taken_are_named():
    for rows, error, found in (
        (torch.tensor([-1]), ValueError, r"`rows` must be in \[0, 4\), but got -1 to -1"),
        (torch.tensor([0, 4]), ValueError, r"`rows` must be in \[0, 4\), but got 0 to 4"),
        (torch.ones(4, dtype=torch.bool), TypeError, r"`rows` must be int64 \[k\], but got torch\.bool \[4\]"),
    ):
        with pytest.raises(error, match=found):
            take_rows({"x": X, "name": NAMES}, rows)
    nested = torch.nested.nested_tensor([torch.zeros(i) for i in (1, 2, 3, 4)], layout=torch.jagged)
    with pytest.raises(TypeError, match=r"batch\.t is a nested tensor"):
        take_rows({"x": X, "t": nested}, ROWS)


def test_a_shape_is_no_column():
    images = torch.zeros(4, 3, 8, 8)
    assert take_rows({"x": images, "shape": images.shape}, ROWS)["shape"] == images.shape


def test_texts_without_a_column_are_not_trimmed():
    batch = {"input_ids": torch.zeros(4, 0), "attention_mask": torch.zeros(4, 0)}
    assert trim_padding(batch) is batch


def test_a_sample_counted_from_the_end_has_its_own_id():
    data = SampleIds([{"x": 0.0}, {"x": 1.0}, {"x": 2.0}])
    assert data[-1] == data[2] == {"x": 2.0, "sample_id": 2}
    assert data.__getitems__([-3, 1]) == [data[0], data[1]]


@pytest.mark.parametrize(
    ("ids", "error", "found"),
    [
        ([3, -1], ValueError, "-1"),
        ([2**63], ValueError, str(2**63)),
        (torch.tensor([0, -7]), ValueError, "-7"),
        (torch.tensor([1, 2**63 + 5], dtype=torch.uint64), ValueError, str(2**63 + 5)),
        (torch.tensor([True, False]), TypeError, "torch.bool"),
        ([True, False], TypeError, "True"),
    ],
)
def test_ids_that_name_no_sample_are_refused(ids, error, found):
    with pytest.raises(error, match=f"`sample_id` must hold .* but the batch has .*{found}"):
        split_sample_ids({"x": X, "sample_id": ids})
