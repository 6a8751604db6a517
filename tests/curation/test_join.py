from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import COLLATES, data
from transformers import BatchEncoding

from curation.batch import leaves
from curation.join import join_batches


@pytest.mark.parametrize("name", COLLATES)
def test_joins_every_structure(name):
    samples = list(data(12))
    collate = COLLATES[name]
    parts = [collate(samples[:5]), collate(samples[5:10]), collate(samples[10:])]
    whole, joined = collate(samples), join_batches(parts)
    assert type(joined) is type(whole)
    for (path, value), (other, expected) in zip(leaves(joined), leaves(whole), strict=True):
        assert path == other
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, expected)
        elif "name" in path:
            assert value == ["0", "1", "2", "3", "4", "0", "1", "2", "3", "4", "0", "1"]
        else:
            assert value == expected


def text(rows, side, labels=True):
    """A batch padded with id 9 to its longest row."""
    width = max(map(len, rows))

    def pad(row, value):
        padding = [value] * (width - len(row))
        return padding + row if side == "left" else row + padding

    batch = {
        "input_ids": torch.tensor([pad(row, 9) for row in rows]),
        "attention_mask": torch.tensor([pad([1] * len(row), 0) for row in rows]),
    }
    if labels:
        batch["labels"] = torch.tensor([pad(row, -100) for row in rows])
    return batch


@pytest.mark.parametrize("side", ["left", "right"])
def test_pads_texts_to_the_widest(side):
    rows = [[1, 2], [3], [4, 5, 6, 7], [8]]
    joined = join_batches([text(rows[:2], side), text(rows[2:], side)])
    for name, value in text(rows, side).items():
        assert torch.equal(joined[name], value), name


def test_padding_that_no_batch_shows_is_that_of_the_tokenizer():
    joined = join_batches([text([[1]], "right"), text([[2, 3]], "right")], pad_id=7, side="left")
    assert joined["input_ids"].tolist() == [[7, 1], [2, 3]]
    assert joined["labels"].tolist() == [[-100, 1], [2, 3]]
    assert join_batches([text([[1]], "right"), text([[2, 3]], "right")])["input_ids"].tolist() == [[1, 0], [2, 3]]


def test_arrays_and_encodings_are_rows_where_they_are_as_long_as_the_batch():
    a, b, c = (SimpleNamespace(n_sequences=1) for _ in range(3))
    one = BatchEncoding({"x": torch.zeros(2, 1), "id": np.arange(2)}, encoding=[a, b])
    two = BatchEncoding({"x": torch.ones(1, 1), "id": np.arange(2, 3)}, encoding=[c])
    joined = join_batches([one, two])
    assert joined["id"].tolist() == [0, 1, 2]
    assert joined._encodings == [a, b, c]


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([{"x": torch.zeros(2), "n": 3}, {"x": torch.zeros(2), "n": 4}], "batch.n belongs to a batch as a whole"),
        ([{"x": torch.zeros(2)}, {"y": torch.zeros(2)}], "must have the same fields"),
        ([torch.zeros(2, 3), torch.zeros(2, 4)], r"batch has the shapes \[2, 3\], \[2, 4\]"),
        ([{"x": torch.zeros(2), "size": (4, 6)}] * 2, r"batch.size is \(4, 6\) in each of the batches"),
        ([(torch.zeros(1), torch.tensor(1.0)), (torch.zeros(1), torch.tensor(2.0))], "belongs to a batch as a whole"),
    ],
)
def test_refuses_what_cannot_be_joined(batches, message):
    with pytest.raises(ValueError, match=message):
        join_batches(batches)


def test_what_is_equal_in_all_batches_stays():
    x = torch.zeros(2)
    joined = join_batches([{"x": x, "scale": torch.tensor(3), "size": (4, 6, 8), "name": "a", "of": ["b", "b"]}] * 2)
    assert (joined["scale"], joined["size"], joined["name"]) == (torch.tensor(3), (4, 6, 8), "a")
    assert joined["of"] == ["b"] * 4  # of rows
