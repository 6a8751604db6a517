"""The sampler of dynamic pruning: rounds, weights, ages, and its state."""

import io
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import IterableDataset

from curation.samplers import DynamicDataPruningSampler
from curation.samplers.dynamic_pruning import Batch, of_samples
from curation.samplers.pruning_rules import RULES, proportional


def train(sampler, steps, trace, table, seed=0):
    """Train as a loader without workers does; ``trace`` gets ids and weights of every batch."""
    order = iter(sampler)
    for step in range(steps):
        batch = [next(order) for _ in range(sampler.batch_size)]
        assert batch == sampler.next.ids.tolist()
        weights = sampler.next.weights
        trace.append((batch, None if weights is None else weights.tolist()))
        sampler.trained(table[len(trace) - 1][batch])
        if (step + 1) % sampler.steps == 0:
            sampler.end_epoch()
            order = iter(sampler)


def make(rule="mean", n=24, size=4, **kwargs):
    sampler = DynamicDataPruningSampler(range(n), size, rule=rule, **kwargs)
    sampler.length = 8 * sampler.steps
    return sampler


def losses_of(n, batches, seed=0):
    return torch.rand(batches, n, generator=torch.Generator().manual_seed(seed))


@given(st.sampled_from(list(RULES)), st.integers(5, 20), st.integers(1, 4), st.integers(0, 40), st.integers(0, 5))
def test_a_run_resumes_exactly_at_any_step(rule, n, size, cut, seed):
    options = {"rule": rule, "n": n, "size": size, "seed": seed, "max_age": 2, "review": 0.1, "smoothing": 0.5}
    table = losses_of(n, 200, seed)
    whole, steps = [], 5 * make(**options).steps
    train(make(**options), steps, whole, table)
    cut = min(cut, steps - 1)
    first, second, trace = make(**options), make(**options), []
    train(first, cut, trace, table)
    ahead = iter(first)  # a loader that fetches ahead
    for _ in range(min(size * 2, size * (first.steps - first._in_epoch))):
        next(ahead)
    second.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
    if not first._drawn:
        left = steps - cut
        in_epoch = min(left, second.steps - second._in_epoch)
        train(second, in_epoch, trace, table)
        second.end_epoch()
        train(second, left - in_epoch, trace, table)
        assert trace == whole
    else:  # what was fetched comes again, with what was planned then
        again = iter(second)
        assert [next(again) for _ in range(size)] == whole[cut][0]


@pytest.mark.parametrize("rule", list(RULES))
def test_no_sample_is_lost_or_doubled_in_a_round(rule):
    sampler, plans, trace = make(rule, n=30, size=4, anneal=1.0), [], []
    plan = sampler.plan

    def recorded(losses, progress):
        plans.append(plan(losses, progress))
        return plans[-1]

    sampler.plan = recorded
    train(sampler, 5 * sampler.steps, trace, losses_of(30, 200))
    drawn = [i for batch, _ in trace for i in batch]
    planned = [sorted(range(30)), *(sorted(ids.tolist()) for ids, _ in plans)]
    for ids in planned:
        part, drawn = drawn[: len(ids)], drawn[len(ids) :]
        assert sorted(part) == ids[: len(part)] if len(part) == len(ids) else set(part) <= set(ids)
    assert drawn == []


def test_the_parts_of_ranks_are_the_batch_of_one_process(monkeypatch):
    table, orders = losses_of(32, 100), {}
    for processes in (1, 2, 4):
        parts = []
        for rank in range(processes):
            sampler = DynamicDataPruningSampler(range(32), 8 // processes, prune=0.7)
            monkeypatch.setattr(type(sampler), "_place", property(lambda _, place=(rank, processes): place))
            order, mine = iter(sampler), []
            for step in range(sampler.steps * 4):
                if step % sampler.steps == 0 and step:
                    sampler.end_epoch()
                    order = iter(sampler)
                mine.append([next(order) for _ in range(8 // processes)])
                sampler.trained(table[step][sampler.next.ids])
            parts.append(mine)
        orders[processes] = [[i for row in zip(*step, strict=True) for i in row] for step in zip(*parts, strict=True)]
    assert orders[1] == orders[2] == orders[4]


def test_weights_follow_their_samples_and_sum_to_the_number_of_samples():
    sampler, trace = make(n=40, size=8, prune=0.5, anneal=1.0), []
    train(sampler, 5, trace, losses_of(40, 5))  # the first round
    assert all(weights is None for _, weights in trace)
    sampler._begin_round()
    ids, weights = sampler._ids, sampler._weights
    assert float(weights.sum()) == pytest.approx(40)
    low = sampler.losses[ids] < sampler.losses.mean()
    assert (weights[~low] == 1).all()
    assert len(set(weights[low].tolist())) == 1


def test_from_anneal_on_everything_is_visited():
    sampler, trace = make("random", n=16, size=4, anneal=0.5, prune=0.5), []
    train(sampler, 8 * sampler.steps, trace, losses_of(16, 100))
    late = [i for batch, weights in trace[-8:] for i in batch]
    assert sorted(late) == sorted([*range(16), *range(16)])
    assert sampler.statistics["pruning_progress"] >= 0.5


def test_elapsed_time_anneals_too():
    sampler = make("random", n=16, size=4, prune=0.5)
    sampler.round, sampler.elapsed = 3, torch.tensor(0.9)
    sampler._begin_round()
    assert len(sampler._ids) == 16


def test_of_a_sample_that_occurs_twice_the_larger_known_loss_counts():
    nan = float("nan")
    batch = Batch(torch.tensor([3, 1, 3, 1, 2]), None, 1.0, torch.tensor([0, 1, 0, 1, 4]))
    found = of_samples(batch, torch.tensor([nan, 0.5, 0.25, 0.75, nan]))
    torch.testing.assert_close(found, torch.tensor([0.25, 0.75, 0.25, 0.75, nan]), equal_nan=True)


def test_no_sample_is_older_than_max_age():
    sampler = make(lambda losses, generator, progress, round: visited(losses), n=20, size=4, anneal=1.0, max_age=2)
    seen = torch.zeros(20, dtype=torch.long)
    for number in range(12):
        sampler._begin_round()
        seen[sampler._ids] = number
        assert int((number - seen).max()) <= 2


def visited(losses):
    must = losses.isnan()
    must[0] = True
    return must.nonzero().flatten(), None


def test_a_share_is_reviewed():
    sampler = make(
        lambda losses, generator, progress, round: visited(losses), n=4000, size=4, anneal=1.0, review=0.25
    )
    sampler.losses = torch.zeros(4000)
    sampler.round = 1
    sampler._begin_round()
    assert 850 < len(sampler._ids) < 1150


def test_losses_are_smoothed_and_unknown_ones_stay():
    sampler = make(n=4, size=4, smoothing=0.7)
    for loss in (1.0, 2.0, float("nan")):
        sampler.end_epoch()
        list(zip(range(4), iter(sampler), strict=False))
        sampler.trained(torch.full((4,), loss))
    assert sampler.losses.tolist() == pytest.approx([1.3] * 4)


def test_a_record_holds_at_most_32_bytes_a_sample():
    sampler = make(n=1000, size=4)
    sampler.losses = torch.rand(1000)
    sampler._begin_round()
    sampler._begin_round()
    held = [sampler.losses, sampler._visits, sampler._ids, sampler._weights]
    assert sum(t.element_size() * 1000 for t in held) == 20 * 1000


def test_one_infinite_loss_does_not_stay_in_an_average():
    sampler = make(n=4, size=4, smoothing=0.7)
    for loss in (float("inf"), 2.0, 1.0):
        sampler.end_epoch()
        list(zip(range(4), iter(sampler), strict=False))
        sampler.trained(torch.full((4,), loss))
    assert sampler.losses.tolist() == pytest.approx([1.7] * 4)


def test_of_a_sample_that_a_batch_holds_twice_the_larger_loss_is_stored():
    """Or every device would store another, and ranks would draw other rounds."""
    sampler = make("random", n=8, size=6, prune=0.5, anneal=1.0)
    order, twice = iter(sampler), 0
    for _ in range(12):
        ids = [next(order) for _ in range(6)]
        twice += len(ids) - len(set(ids))
        sampler.trained(-torch.arange(6.0))
        for i in set(ids):
            assert sampler.losses[i] == -ids.index(i)
        if sampler._in_epoch == sampler.steps:
            sampler.end_epoch()
            order = iter(sampler)
    assert twice > 5


def test_a_checkpoint_loads_as_weights_only_and_holds_no_more_than_the_record():
    sampler = make(n=np.int64(4000).item(), size=np.int64(8), seed=np.int64(2**62))
    order = iter(sampler)
    for _ in range(4000 // 8 + 10):
        list(zip(range(8), order, strict=False))
        sampler.trained(torch.rand(8))
        if sampler._in_epoch == sampler.steps:
            sampler.end_epoch()
            order = iter(sampler)
    next(order)  # a batch that is drawn and not trained on yet
    file = io.BytesIO()
    torch.save(sampler.state_dict(), file)
    assert file.tell() < 8 * 4000 + 12 * len(sampler._ids) + 10_000
    file.seek(0)
    other = make(n=4000, size=8, seed=2**62)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.next.ids.tolist() == sampler.next.ids.tolist()


def test_the_time_that_is_over_is_known_after_a_resume():
    sampler, resumed = make(n=8, size=4), make(n=8, size=4)
    sampler.elapsed = torch.tensor(0.9)
    resumed.load_state_dict(sampler.state_dict())
    assert float(resumed.elapsed) == pytest.approx(0.9)


def test_a_sampler_that_something_else_iterates_too_is_refused():
    sampler = make(n=12, size=4)
    order = iter(sampler)
    next(order)
    list(iter(sampler))
    with pytest.raises(RuntimeError, match="DynamicDataPruningSampler was iterated while a fit iterates it"):
        list(order)


def test_a_rule_may_write_into_its_losses():
    def rule(losses, generator, progress, round):
        return torch.arange(len(losses.fill_(7.0))), None

    sampler = make(rule, n=4, size=4)
    sampler._begin_round()
    sampler._begin_round()
    assert sampler.losses.isnan().all()


@pytest.mark.parametrize("weights", [torch.tensor([1, 2]), torch.tensor([1.0, 2.0], dtype=torch.float64)])
def test_weights_of_a_rule_are_fp32(weights):
    sampler = make(lambda losses, generator, progress, round: (torch.tensor([0, 1]), weights), n=4, size=2)
    assert sampler.plan(torch.zeros(4))[1].dtype == torch.float32


def test_a_rule_with_other_options_keeps_its_name_and_takes_the_share():
    sampler = make(partial(proportional, weighted=True), n=40, prune=0.75)
    ids, weights = sampler.plan(torch.rand(40))
    assert (sampler.rule_name, len(ids), len(weights)) == ("proportional", 10, 10)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(4))


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        (
            lambda losses, generator, progress, round: torch.tensor([0]),
            "must give ids, and weights or None, but gave",
        ),
        (lambda losses, generator, progress, round: ([0], None), "must give ids, int64.*but gave list"),
        (lambda losses, generator, progress, round: (torch.tensor([0, 0]), None), "distinct ids of 0 to 3"),
        (lambda losses, generator, progress, round: (torch.tensor([4]), None), "distinct ids of 0 to 3"),
        (
            lambda losses, generator, progress, round: (torch.tensor([1]), torch.tensor([-1.0])),
            "finite and not negative",
        ),
        (lambda losses, generator, progress, round: (torch.tensor([1]), torch.ones(2)), r"weights \[1\]"),
    ],
)
def test_what_a_rule_of_the_users_own_gives_is_checked(rule, says):
    with pytest.raises(ValueError, match=says):
        make(rule, n=4, size=2).plan(torch.zeros(4))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"`dataset` must have a length.*Stream"):
        DynamicDataPruningSampler(Stream(), 2)
    with pytest.raises(ValueError, match=r"`rule` must be.*'meen'"):
        make("meen")
    with pytest.raises(ValueError, match=r"`batch_size` must be at most 24"):
        make(size=25)
    state = make(n=24).state_dict()
    with pytest.raises(ValueError, match=r"\[24, 4, 0\] and now are \[28, 4, 0\]"):
        make(n=28).load_state_dict(state)
