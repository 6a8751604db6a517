"""Rows of any nested batch."""

from collections import OrderedDict, UserDict, deque, namedtuple
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from curation.batch import Columns, batch_size, copied, leaves, refuse_samples, take_rows, trim_padding

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
        "inputs_embeds": torch.zeros(2, 5, 4),
    }
    out = trim_padding(batch)
    assert {k: tuple(v.shape) for k, v in out.items()} == {
        "input_ids": (2, 3),
        "attention_mask": (2, 3),
        "label": (2,),
        "inputs_embeds": (2, 3, 4),
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


def test_keys_that_look_alike_are_two_fields():
    with pytest.raises(ValueError, match=r"batch\.\[1\] has 4, batch\.1 has 5"):
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


def test_a_field_that_may_not_go_with_the_tokens_is_not_cut():
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    batch = {"input_ids": mask * 7, "attention_mask": mask, "patches": torch.zeros(2, 5, 4)}
    assert trim_padding(batch) is batch
    batch["patches"] = torch.zeros(2, 6, 4)
    assert [v.size(1) for v in trim_padding(batch).values()] == [2, 2, 6]


@pytest.mark.parametrize("dims", [(), (3,)], ids=["a number", "a vector"])
def test_lists_of_samples_are_refused_where_they_show(dims):
    samples = [{"signal": torch.zeros(16), "label": torch.zeros(dims)} for _ in range(8)]
    if dims:
        samples = [{"signal": torch.zeros(16), "label": torch.zeros(16)} for _ in range(8)]
        assert batch_size(samples) == 16  # as of eight views of a batch of sixteen rows
        with pytest.raises(TypeError, match="is a list of 8 samples"):
            refuse_samples(samples, 16, expected=8)
        refuse_samples(samples, 16, expected=16)
        return
    for batch in (samples, tuple(samples), [(s["signal"], 1) for s in samples]):
        with pytest.raises(TypeError, match=f"is a {type(batch).__name__} of 8 samples.* collate the samples"):
            batch_size(batch)
    views = [{"x": X, "y": Y}, {"x": X, "y": Y}]
    assert batch_size(views) == 4
    refuse_samples([X, Y], 4, expected=2)
    refuse_samples([X[:1], X[:1]], 1, expected=2)  # the last rows of a data set


def test_a_list_of_another_length_in_one_batch_belongs_to_the_batch_in_all():
    columns = Columns()
    columns.observe({"x": X, "size": [4, 6], "name": NAMES})
    short = {"x": X[:2], "size": [4, 6], "name": NAMES[:2]}
    columns.observe(short)
    kept = take_rows(short, torch.tensor([1]), columns)
    assert kept["size"] == [4, 6]
    assert kept["name"] == ["b"]
    late = Columns()
    late.observe(short)
    take_rows(short, torch.tensor([1]), late)
    with pytest.raises(TypeError, match=r"batch\.size has 2 entries for 4 rows, but had one per row"):
        late.observe({"x": X, "size": [4, 6], "name": NAMES})


def test_the_encodings_of_a_tokenizer_are_rows():
    from transformers import BatchEncoding

    def encode(encodings):
        encoding = BatchEncoding({"input_ids": X})
        encoding._encodings = encodings
        return encoding

    for batch, inside in ((encode(NAMES), lambda b: b), ((encode(NAMES), Y), lambda b: b[0])):
        assert inside(take_rows(batch, ROWS)).encodings == ["d", "b"]
        assert inside(batch).encodings == NAMES
    assert take_rows(encode(NAMES[:3]), ROWS).encodings is None  # not one per row


def test_a_copy_shares_no_container_and_no_tensor():
    array = np.zeros(4)
    batch = {"a": [X.clone(), Pair(Y.clone(), array)], "b": Sample(X.clone(), [{"i": 1}] * 4), "c": [["d"]] * 4}
    copy = copied(batch)
    copy["a"][0].zero_()
    copy["a"][1].y[:] = 1
    copy["b"].name[0].pop("i")
    copy["c"][0].pop()
    copy.pop("c")
    assert torch.equal(batch["a"][0], X)
    assert array.sum() == 0
    assert batch["b"].name == [{"i": 1}] * 4
    assert batch["c"] == [["d"]] * 4


def test_a_number_and_its_text_are_two_keys():
    batch = {"x": torch.arange(2), 0: ["a", "b"], "0": []}
    columns = Columns()
    columns.observe(batch)
    assert take_rows(batch, torch.tensor([1]), columns) == {"x": torch.tensor([1]), 0: ["b"], "0": []}
    assert [path for path, _ in leaves(batch)] == ["batch.x", "batch.[0]", "batch.0"]
