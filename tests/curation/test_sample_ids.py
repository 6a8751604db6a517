"""Sample ids travel with the samples and are split off."""

from collections import namedtuple

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler, TensorDataset

import curation.batch
from curation.sample_ids import SampleIds, split_sample_ids

Pair = namedtuple("Pair", ["x", "y"])
X = torch.arange(12).view(4, 3)
Y = torch.arange(4)


def test_the_module_of_batches_has_them_too():
    assert curation.batch.SampleIds is SampleIds
    assert curation.batch.split_sample_ids is split_sample_ids


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


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_a_batch_that_is_asked_for_at_once_has_an_id_per_row(kind):
    pairs = SampleIds(TensorDataset(torch.arange(10) * 2))
    (x,), ids = split_sample_ids(pairs[kind([3, -1, 0])])
    assert ids.tolist() == [3, 9, 0]
    assert x.tolist() == [6, 18, 0]
    bulk = DataLoader(pairs, sampler=BatchSampler(SequentialSampler(pairs), 4, drop_last=False), batch_size=None)
    assert [split_sample_ids(batch)[1].tolist() for batch in bulk] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
