"""A subset, whole in one process and divided between several."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from curation.samplers.subset import SubsetSampler


class Placed(SubsetSampler):
    """As one of several processes sees it."""

    _place = (0, 1)


@given(st.sets(st.integers(0, 30), min_size=1), st.integers(1, 5), st.booleans(), st.integers(0, 3))
def test_processes_have_equally_many_and_together_everything(chosen, processes, shuffle, epoch):
    parts = []
    for rank in range(processes):
        sampler = Placed(range(31), sorted(chosen), shuffle)
        sampler._place = rank, processes
        sampler.set_epoch(epoch)
        parts.append(list(sampler))
        assert len(parts[-1]) == len(sampler) == -(-len(chosen) // processes)
    order = [index for step in zip(*parts, strict=True) for index in step]
    assert sorted(order[: len(chosen)]) == sorted(chosen)
    assert order[len(chosen) :] == (order * processes)[: len(order) - len(chosen)]  # filled up from the beginning
    if not shuffle:  # torch's own says the same
        for rank in range(processes):
            like = DistributedSampler(sorted(chosen), processes, rank, shuffle=False)
            assert parts[rank] == [sorted(chosen)[i] for i in like]


def test_the_order_depends_on_seed_and_epoch_only():
    def order(seed, epoch):
        sampler = SubsetSampler(range(100), range(50), seed=seed)
        sampler.set_epoch(epoch)
        return tuple(sampler)

    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    orders = {order(seed, epoch) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert order(1, 2) == order(1, 2) != tuple(range(50))
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()


def test_a_plain_data_loader_takes_it():
    dataset = TensorDataset(torch.arange(10))
    batches = DataLoader(dataset, 2, sampler=SubsetSampler(dataset, torch.tensor([1, 3, 5]), shuffle=False))
    assert [batch[0].tolist() for batch in batches] == [[1, 3], [5]]
    batches.sampler.indices = np.array([7])
    assert len(batches) == 1
    assert [batch[0].tolist() for batch in batches] == [[7]]
    batches.sampler.indices = None
    assert sorted(torch.cat([batch[0] for batch in batches]).tolist()) == list(range(10))


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([], r"at least one, but got float64 \[0\]"),
        ([[1]], r"one dimension, at least one, but got int64 \[1, 1\]"),
        ([0.5], r"must hold integers .* but got float64 \[1\]"),
        ([True], "must hold integers .* but got bool"),
        ([0, 10], r"must be in \[0, 10\), but got 0 to 10"),
        ([-1, 2], r"must be in \[0, 10\), but got -1 to 2"),
        ([3, 3], "each index once"),
    ],
)
def test_rubbish_is_refused(indices, message):
    with pytest.raises(ValueError, match=message):
        SubsetSampler(range(10), indices)
    with pytest.raises(ValueError, match=message):
        SubsetSampler(range(10)).indices = indices


def test_a_bad_seed_is_named():
    with pytest.raises(ValueError, match="Argument `seed` must be an integer >= 0, but got -1"):
        SubsetSampler(range(3), seed=-1)
