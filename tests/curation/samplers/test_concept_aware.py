"""The sampler: one stream of batches, whoever asks for it and whenever."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from twins import slow_diverse

from curation.metrics.concept_coverage import ConceptCoverage
from curation.samplers.concept_aware import ConceptAwareSampler, ConceptIndex, ConceptObjective, FirstCome
from curation.samplers.concept_choice import MovingTargets, round_targets


def tags(samples=400, count=30, seed=0):
    draw = np.random.default_rng(seed)
    return ConceptIndex.from_lists([set(draw.zipf(1.5, draw.integers(0, 6)) % count) for _ in range(samples)])


def epoch(sampler, number):
    sampler.set_epoch(number)
    return np.array(list(sampler)).reshape(-1, sampler.batch_size)


def test_an_epoch_is_one_shuffled_pass_over_the_candidates():
    index = tags(410)
    first, second = (epoch(ConceptAwareSampler(index, 8, 40), number) for number in (0, 1))
    assert len(first) == 10
    assert len(ConceptAwareSampler(index, 8, 40)) == first.size
    assert len(np.unique(first)) == first.size  # no candidate comes twice
    assert (first != second).any()
    everything = epoch(ConceptAwareSampler(index, 40, 40), 0)
    assert (everything != np.arange(400).reshape(10, 40)).any()
    for batch, super_batch in zip(first, everything, strict=True):
        assert set(batch) < set(super_batch)


def test_the_batches_are_the_greedy_ones():
    index = tags()
    sampler = ConceptAwareSampler(index, 8, 40, targets={str(c): c for c in index.names}, visit_penalty=0.2, seed=5)
    visits = np.zeros(400)
    total = sum(float(c) for c in index.names)
    targets = np.array([8 * c / total for c in index.names])
    for number in range(2):
        draw = np.random.default_rng((5, number))
        order, draws = draw.permutation(400), draw.random(10)
        for step, batch in enumerate(epoch(sampler, number)):
            drawn = order[40 * step : 40 * step + 40]
            rows = [set(index[i].tolist()) for i in drawn]
            whole = round_targets(targets, draws[step])
            expected = drawn[slow_diverse(rows, 8, whole, 0.2 * visits[drawn], None)]
            assert batch.tolist() == expected.tolist()
            visits[batch] += 1
    assert visits.max() == 2


def test_a_data_loader_gives_these_batches():
    sampler = ConceptAwareSampler(tags(), 8, 40)
    expected = epoch(sampler, 3).tolist()
    for workers in (0, 2):
        assert [b.tolist() for b in DataLoader(range(400), 8, sampler=sampler, num_workers=workers)] == expected


@pytest.mark.parametrize("penalty", [0.0, 0.3])
def test_it_goes_on_where_a_killed_run_was(penalty):
    make = lambda batch_size=8: ConceptAwareSampler(tags(), batch_size, 40, visit_penalty=penalty, seed=3)  # noqa: E731
    whole = make()
    expected = [epoch(whole, number) for number in range(4)]
    for number, done in ((0, 0), (0, 3), (2, 9), (2, 10), (3, 1)):
        killed = make()
        for earlier in range(number):
            epoch(killed, earlier)
        killed.set_epoch(number)
        batches = iter(DataLoader(range(400), 8, sampler=killed))
        for _ in range(done):
            next(batches)
        state = pickle.loads(pickle.dumps(killed.state_dict()))
        assert (state["epoch"], state["batches"]) == (number, done)
        resumed = make()
        resumed.load_state_dict(state)
        resumed.set_epoch(number)
        assert list(resumed) == expected[number][done:].ravel().tolist()
        if number < 3:
            assert (epoch(resumed, number + 1) == expected[number + 1]).all()
    ahead = make()
    ahead.load_state_dict(ahead.state_dict(batches=2))
    assert len(list(ahead)) == 8 * 8
    with pytest.raises(
        ValueError, match=r"of another stream.* were \[400, 8, 40, .*, 3\] and now are \[400, 4, 40, "
    ):
        make(4).load_state_dict(state)


RANK = """
import json, os, sys, torch
from torch.utils.data import DataLoader
from curation.samplers.concept_aware import ConceptAwareSampler, ConceptIndex

rank, ranks = map(int, sys.argv[1:])
torch.distributed.init_process_group("gloo", f"file://{os.getcwd()}/store", rank=rank, world_size=ranks)
make = lambda: ConceptAwareSampler(ConceptIndex.load("tags.arrow"), 16 // ranks, 80 // ranks, visit_penalty=0.1)
sampler = make()
loader = DataLoader(range(400), sampler.batch_size, sampler=sampler)
batches = []
for number in range(2):
    sampler.set_epoch(number)
    assert len(loader) == 5
    batches += [batch.tolist() for batch in loader]
resumed = make()
resumed.load_state_dict({"epoch": 1, "batches": 2, "of": [400, 16, 80, 0.1, 0]})  # of any number of processes
batches += torch.tensor(list(resumed)).view(3, -1).tolist()
json.dump(batches, open(f"{rank}.json", "w"))
"""


@pytest.mark.parametrize("ranks", [2, 4])
def test_several_processes_share_the_batches_of_one(ranks, tmp_path):
    sampler = ConceptAwareSampler(tags(), 16, 80, visit_penalty=0.1)
    expected = np.concatenate([epoch(sampler, 0), epoch(sampler, 1), epoch(sampler, 1)[2:]])
    tags().save(tmp_path / "tags.arrow")
    processes = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(ranks)], cwd=tmp_path) for rank in range(ranks)
    ]
    assert [process.wait(120) for process in processes] == [0] * ranks
    parts = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(ranks)]
    for step, batch in enumerate(expected):
        assert [parts[i % ranks][step][i // ranks] for i in range(16)] == batch.tolist()


def coverage_and_entropy(labels, batches, count):
    metric = ConceptCoverage(count)
    values = [metric(torch.from_numpy(labels[batch])) for batch in batches]
    return [np.mean([v[name].item() for v in values]) for name in ("coverage", "entropy")]


@pytest.mark.parametrize("imbalance", [1, 100])
def test_single_labels_cover_what_the_super_batch_has(imbalance):
    """100 classes as in (long-tailed) CIFAR-100; b = 128 of 640."""
    sizes = (500 * imbalance ** (-np.arange(100) / 99)).astype(int)
    labels = np.repeat(np.arange(100), sizes)
    index = ConceptIndex.from_labels(labels)
    supers = epoch(ConceptAwareSampler(index, 640, 640), 0)
    upper = np.mean([len(np.unique(labels[s])) for s in supers]) / 100
    coverage, entropy = coverage_and_entropy(labels, epoch(ConceptAwareSampler(index, 128, 640), 0), 100)
    assert coverage >= 0.99 * upper
    assert entropy >= 0.93
    iid = coverage_and_entropy(labels, epoch(ConceptAwareSampler(index, 128, 640, FirstCome()), 0), 100)
    assert iid[0] < 0.75
    assert iid[1] < 0.91


@pytest.mark.parametrize("targets", ["proportional", {str(c): float(c % 3) for c in range(100)}])
def test_targets_below_one_sample_are_met_on_average(targets):
    """Batches of 128 with 100 classes of an imbalance of 100; the rarest are not in every super-batch."""
    labels = np.repeat(np.arange(100), (500 * 100 ** (-np.arange(100) / 99)).astype(int))
    index = ConceptIndex.from_labels(labels)
    weights = np.bincount(labels) if targets == "proportional" else np.arange(100) % 3
    distance = {}
    for name, objective in (("aware", "diversity"), ("random", FirstCome())):
        sampler = ConceptAwareSampler(index, 128, 1280, objective, targets)
        found = np.concatenate([epoch(sampler, number) for number in range(10)])
        metric = ConceptCoverage(100, torch.from_numpy(weights))
        each = np.mean([metric(torch.from_numpy(labels[b]))["target_distance"].item() for b in found])
        distance[name] = each, metric.compute()["target_distance"].item()
    assert distance["aware"][0] < 0.5 * distance["random"][0]
    assert distance["aware"][1] < 0.15


def test_a_visit_penalty_shows_more_samples():
    index = tags()
    seen = []
    for penalty in (0.0, 0.5):
        sampler = ConceptAwareSampler(index, 8, 40, visit_penalty=penalty)
        seen.append(len(np.unique(np.concatenate([epoch(sampler, number) for number in range(5)]))))
    assert seen[0] < 0.8 * seen[1]


def test_ties_are_not_always_the_first_sample():
    index = ConceptIndex.from_labels(np.zeros(40, int))
    firsts = {epoch(ConceptAwareSampler(index, 1, 40, seed=seed), 0)[0, 0] for seed in range(20)}
    assert len(firsts) > 10


class Odd(ConceptObjective):
    def choose(self, candidates, k, targets, penalties):
        assert targets.shape == (len(candidates.names),)
        assert penalties.shape == (len(candidates),)
        return np.flatnonzero(candidates.sizes % 2)[:k]


class Twice(ConceptObjective):
    def choose(self, candidates, k, targets, penalties):
        return np.zeros(k, int)


def test_an_objective_of_ones_own():
    index = ConceptIndex.from_lists([["a"], ["a", "b"]] * 20)
    assert (epoch(ConceptAwareSampler(index, 2, 20, Odd()), 0) % 2 == 0).all()
    with pytest.raises(ValueError, match=r"Twice.choose must give 2 different positions in \[0, 20\)"):
        epoch(ConceptAwareSampler(index, 2, 20, Twice()), 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be an integer >= 1, but got 0"),
        ({"batch_size": 8.0}, "`batch_size` must be an integer >= 1, but got 8.0"),
        ({"batch_size": True}, "`batch_size` must be an integer >= 1, but got True"),
        ({"super_batch_size": "40"}, "`super_batch_size` must be an integer >= 1, but got '40'"),
        ({"seed": None}, "`seed` must be an integer >= 0, but got None"),
        ({"super_batch_size": 7}, r"`super_batch_size` must be in \[8, 400\].* but got 7"),
        ({"super_batch_size": 401}, r"`super_batch_size` must be in \[8, 400\].* but got 401"),
        ({"objective": "variety"}, "`objective` must be 'diversity', 'frequency' or .* but got 'variety'"),
        ({"targets": "even"}, "`targets` must be .* but got 'even'"),
        ({"targets": {"x": 1.0}}, "`targets` must name concepts of the index, but got 'x'"),
        ({"targets": {"1": -2.0}}, "`targets` must have finite weights >= 0, but got -2.0 for '1'"),
        ({"visit_penalty": -1.0}, r"`visit_penalty` must be in \[0, inf\), but got -1.0"),
        ({"visit_penalty": float("nan")}, r"`visit_penalty` must be in \[0, inf\), but got nan"),
        ({"seed": -1}, "`seed` must be an integer >= 0, but got -1"),
        ({"concepts": ConceptIndex.from_lists([[]] * 400)}, "`concepts` must have a sample with a concept"),
        ({"visit_penalty": "0.3"}, r"`visit_penalty` must be in \[0, inf\), but got '0.3'"),
    ],
)
def test_a_bad_argument_is_named_with_its_value(changes, message):
    with pytest.raises(ValueError, match=message):
        ConceptAwareSampler(**{"concepts": tags(), "batch_size": 8, "super_batch_size": 40, **changes})


def test_a_list_is_no_index():
    with pytest.raises(TypeError, match="`concepts` must be a ConceptIndex, but got list"):
        ConceptAwareSampler([["a"]], 1, 1)


def test_too_few_samples_for_the_processes_are_refused(monkeypatch):
    sampler = ConceptAwareSampler(tags(), 8, 150)
    assert len(sampler) == 16
    monkeypatch.setattr(ConceptAwareSampler, "_place", (1, 3))
    for refused in (len, list):
        with pytest.raises(ValueError, match=r"`super_batch_size` must be at most 133, .* 3 processes, but got 150"):
            refused(sampler)


def test_the_epochs_before_are_not_chosen_again_where_a_loader_does_not_ask_for_more():
    chosen = []

    class Counted(FirstCome):
        def choose(self, *args):
            chosen.append(1)
            return super().choose(*args)

    sampler = ConceptAwareSampler(tags(), 8, 40, Counted(), visit_penalty=0.1)
    for number in range(3):
        sampler.set_epoch(number)
        order = iter(sampler)
        for _ in range(len(sampler)):
            next(order)
    assert len(chosen) == 3 * 10


def test_moving_targets_give_each_batch_those_of_its_place():
    """Each batch is that of a sampler whose targets stay where the moving ones are; the last point is passed."""
    index = tags(400)
    names = [str(name) for name in index.names]
    first, last = {names[0]: 1.0, names[1]: 3.0}, {names[2]: 1.0}
    points = {16: first, 136: last}  # samples
    sampler = ConceptAwareSampler(index, 8, 40, targets=MovingTargets(points), seed=5)
    shares = []
    for number in range(2):
        for step, batch in enumerate(epoch(sampler, number)):
            share = min(1.0, max(0.0, (8 * (10 * number + step) - 16) / 120))
            still = {names[0]: 0.25 * (1 - share), names[1]: 0.75 * (1 - share), names[2]: share}
            fixed = ConceptAwareSampler(index, 8, 40, targets=still, seed=5)
            assert batch.tolist() == epoch(fixed, number)[step].tolist()
            shares.append(share)
    assert shares[:3] == [0.0, 0.0, 0.0]
    assert 0 < shares[3] < shares[16] < 1
    assert shares[17:] == [1.0] * 3


def test_moving_targets_may_be_uniform_and_proportional():
    concepts = ConceptIndex.from_lists([["a"]] * 3 + [["b"]])
    moving = MovingTargets({10: "proportional", 0: "uniform"})
    counts = moving.counts(concepts, 8)
    assert [moving.at(counts, samples).tolist() for samples in (0, 5, 10, 99)] == [[4, 4], [5, 3], [6, 2], [6, 2]]


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (
            {0: "uniform"},
            "Argument `points` must have targets at two numbers of samples at least, but got {0: 'uniform'}",
        ),
        ([0, 1], "Argument `points` must have targets at two numbers"),
        ({0: "uniform", -1: "uniform"}, "Argument `points` must be .* but got -1"),
        ({0: "uniform", 0.5: "uniform"}, "Argument `points` must be .* but got 0.5"),
        ({0: "uniform", 9: {"zebra": 1}}, "Argument `targets` must name concepts of the index, but got 'zebra'"),
        (
            {0: "uniform", 9: "even"},
            "Argument `targets` must be 'uniform', 'proportional' or a mapping, but got 'even'",
        ),
    ],
)
def test_bad_points_of_moving_targets_are_named(points, message):
    with pytest.raises(ValueError, match=message):
        ConceptAwareSampler(ConceptIndex.from_lists([["a"], ["b"]]), 1, 2, targets=MovingTargets(points))
