"""The delta rule, against a brute-force simulation."""

import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from twins import slow_hard_batches

from curation.samplers.hard_batches import HardBatchSampler

losses = st.one_of(st.floats(0, 10, width=32), st.sampled_from([math.nan, math.inf, 1.0]))


def cut(sampler):
    return [tuple(row) for row in sampler._cut.tolist()]


def epoch(sampler, table, visited, stop=None):
    """Train as a loader without workers does: a batch is loaded after the loss of the one before is known."""
    size = sampler.batch_size
    which = {rows: b for b, rows in enumerate(cut(sampler))}
    order = iter(sampler)
    for step in range(sampler.count):
        if step == stop:
            return
        batch = which[tuple(next(order) for _ in range(size))]
        visited.append(batch)
        sampler.trained(torch.tensor(table[len(visited) - 1][batch]))
    assert next(order, None) is None
    sampler.end_epoch()


@given(st.data(), st.integers(1, 6), st.floats(0.01, 1), st.sampled_from([None, 1, 2]))
def test_the_order_equals_a_simulation_and_resumes_exactly(d, count, delta, max_age):
    epochs, size = 3, 2
    steps = epochs * count
    table = d.draw(st.lists(st.lists(losses, min_size=count, max_size=count), min_size=steps, max_size=steps))
    expected = slow_hard_batches(count, delta, lambda s, b: float(torch.tensor(table[s][b])), steps, max_age)

    sampler, visited = HardBatchSampler(range(size * count), size, delta, max_age), []
    cut_at = d.draw(st.integers(0, steps - 1))
    for _ in range(cut_at // count):
        epoch(sampler, table, visited)
    epoch(sampler, table, visited, stop=cut_at % count)
    assert visited == expected[:cut_at]

    resumed = HardBatchSampler(range(size * count), size, delta, max_age)
    resumed.load_state_dict(pickle.loads(pickle.dumps(sampler.state_dict())))
    which = {rows: b for b, rows in enumerate(cut(resumed))}
    order = iter(resumed)
    for _ in range(count - cut_at % count):
        batch = which[tuple(next(order) for _ in range(size))]
        visited.append(batch)
        resumed.trained(torch.tensor(table[len(visited) - 1][batch]))
    resumed.end_epoch()
    while len(visited) < steps:
        epoch(resumed, table, visited)
    assert visited == expected


def test_the_first_round_is_the_data_set_cut_by_the_seed():
    sampler = HardBatchSampler(range(10), 4, seed=3)
    rows = list(sampler)
    assert len(rows) == len(sampler) == 12
    assert sorted(rows[:10]) == list(range(10))
    assert rows[10:] == rows[:2]
    assert rows != list(HardBatchSampler(range(10), 4, seed=4))


def test_what_was_fetched_but_not_trained_on_comes_again():
    sampler = HardBatchSampler(range(12), 2, delta=0.5)
    order = iter(sampler)
    fetched = [next(order) for _ in range(8)]
    sampler.trained(torch.tensor(1.0))
    again = HardBatchSampler(range(12), 2, delta=0.5)
    again.load_state_dict(sampler.state_dict())
    assert list(again)[:6] == fetched[2:]
    assert len(list(again)) == 10


def test_a_loader_reads_the_batches_of_the_cut():
    sampler = HardBatchSampler(range(12), 3)
    batches = [tuple(b.tolist()) for b in DataLoader(range(12), batch_size=3, sampler=sampler)]
    assert batches == cut(sampler)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"delta": 0.0}, r"Argument `delta` must be in \(0, 1\], but got 0.0"),
        ({"batch_size": 11}, "Argument `batch_size` must be at most 10, the size of the data set, but got 11"),
        ({"batch_size": 0}, "Argument `batch_size` must be an integer >= 1, but got 0"),
        ({"batch_size": 2.5}, "Argument `batch_size` must be an integer >= 1, but got 2.5"),
        ({"delta": "1"}, r"Argument `delta` must be in \(0, 1\], but got '1'"),
        ({"max_age": 0}, "Argument `max_age` must be an integer >= 1 or None, but got 0"),
        ({"max_age": math.nan}, "Argument `max_age` must be an integer >= 1 or None, but got nan"),
        ({"seed": 0.5}, r"Argument `seed` must be an integer in \[0, 2\^63\), but got 0.5"),
        ({"seed": -1}, r"Argument `seed` must be an integer in \[0, 2\^63\), but got -1"),
    ],
)
def test_a_bad_argument_is_named(bad, message):
    with pytest.raises(ValueError, match=message):
        HardBatchSampler(range(10), **{"batch_size": 2, **bad})


def test_a_checkpoint_of_other_data_is_refused():
    for other in (
        HardBatchSampler(range(10), 2),
        HardBatchSampler(range(8), 2, seed=1),
        HardBatchSampler(range(8), 4),
    ):
        with pytest.raises(ValueError, match=r"mini-batches of the checkpoint are others: .* now are \[8, 2, 0\]"):
            HardBatchSampler(range(8), 2).load_state_dict(other.state_dict())


def test_the_mini_batches_are_cut_for_the_processes_of_the_fit(monkeypatch):
    sampler = HardBatchSampler(range(12), 3)
    assert (sampler.count, len(sampler)) == (4, 12)  # asked for before there are two processes
    monkeypatch.setattr(HardBatchSampler, "_place", (1, 2))
    sampler.reset()
    assert (sampler.count, len(sampler)) == (2, 6)
    assert list(sampler) == sampler._cut[:, 1::2].flatten().tolist()
    monkeypatch.setattr(HardBatchSampler, "_place", (0, 5))
    with pytest.raises(ValueError, match=r"`batch_size` times 5 processes must be at most 12, .* but got 3"):
        len(HardBatchSampler(range(12), 3))
