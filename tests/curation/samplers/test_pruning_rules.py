"""The rules of dynamic pruning, against slow twins."""

import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from twins import slow_clusters, slow_probabilities, slow_pruning

from curation.samplers.pruning_rules import RULES, cluster_sorted, inclusion_probabilities, mean, proportional

known = st.floats(0, 10, width=32)
records = st.lists(st.one_of(known, st.just(math.nan)), min_size=1, max_size=40)
shares = st.sampled_from([0.0, 0.25, 0.5, 0.9])


def draw(rule, losses, seed=0, **kwargs):
    generator = torch.Generator().manual_seed(seed)
    ids, weights = RULES[rule](torch.tensor(losses), generator, **{"progress": 0.5, "round": 3, **kwargs})
    return dict(zip(ids.tolist(), [1.0] * len(ids) if weights is None else weights.tolist(), strict=True)), ids


@pytest.mark.parametrize("rule", ["mean", "random", "hide", "drop_high", "signal"])
@given(losses=records, prune=shares, progress=st.floats(0, 1), number=st.integers(1, 5), seed=st.integers(0, 9))
def test_a_round_equals_the_slow_twin(rule, losses, prune, progress, number, seed):
    got, ids = draw(rule, losses, seed, prune=prune, progress=progress, round=number)
    losses = torch.tensor(losses).tolist()
    expected = slow_pruning(rule, losses, torch.Generator().manual_seed(seed), progress, number, prune)
    assert len(got) == len(ids) > 0
    assert got == pytest.approx(expected)


def test_a_share_of_wrong_answers_at_the_bound_is_silent():
    visited, _ = draw("signal", [0.0, 0.89, 0.5, 0.02], prune=0.99)
    assert 2 in visited
    assert len(visited) == 2  # one of the three silent ones is tested again


@pytest.mark.parametrize("rule", list(RULES))
@given(losses=records, prune=shares, seed=st.integers(0, 9))
def test_what_was_not_seen_is_visited(rule, losses, prune, seed):
    visited, ids = draw(rule, losses, seed, prune=prune)
    assert len(visited) == len(ids)
    assert {i for i, loss in enumerate(losses) if math.isnan(loss)} <= visited.keys() <= set(range(len(losses)))


@given(records, shares, st.integers(0, 9))
def test_weights_of_a_mean_round_sum_to_the_number_of_samples(losses, prune, seed):
    visited, _ = draw("mean", losses, seed, prune=prune)
    assert sum(visited.values()) == pytest.approx(len(losses))


@pytest.mark.parametrize("options", [{"rule": "mean"}, {"rule": "proportional", "weighted": True}])
def test_a_weighted_round_has_the_gradient_of_an_epoch(options):
    """On ten projections within three standard errors of 1,000 rounds; without weights it is off."""
    losses = torch.rand(50, generator=torch.Generator().manual_seed(0)).pow(2).tolist()
    gradients = (
        torch.randn(50, 10, generator=torch.Generator().manual_seed(1)).double() + torch.tensor(losses)[:, None]
    )
    options = dict(options)
    rule = options.pop("rule")

    def rounds(weighted):
        sums = []
        for seed in range(1000):
            visited, _ = draw(rule, losses, seed, **options)
            weights = torch.tensor(list(visited.values()), dtype=torch.float64)
            rows = gradients[list(visited)]
            sums.append((weights[:, None] * rows).sum(0) if weighted else rows.mean(0) * 50)
        return torch.stack(sums)

    full = gradients.sum(0)
    sums = rounds(weighted=True)
    assert ((sums.mean(0) - full).abs() < 3 * sums.std(0) / len(sums) ** 0.5).all()
    sums = rounds(weighted=False)
    assert ((sums.mean(0) - full).abs() > 3 * sums.std(0) / len(sums) ** 0.5).any()


def test_the_authors_weight_is_biased_where_the_number_is_no_integer():
    ids, weights = mean(torch.tensor([0.0, 0, 0, 9]), torch.Generator(), progress=0, round=1, prune=0.5)
    assert sorted(weights.tolist()) == [1, 3]  # 1 / (1 - prune) would be 2, of a sum of 3
    assert 3 in ids.tolist()


@given(st.lists(known, min_size=1, max_size=30), st.floats(0.05, 1), st.floats(0, 0.5))
def test_probabilities_equal_the_slow_twin(sizes, share, floor):
    n = share * len(sizes)
    got = inclusion_probabilities(torch.tensor(sizes), n, floor)
    assert float(got.sum()) == pytest.approx(n)
    assert got.tolist() == pytest.approx(slow_probabilities(torch.tensor(sizes).tolist(), n, floor), rel=1e-4)


@given(st.lists(known, min_size=2, max_size=40), shares, st.sampled_from([0.0, 0.1]))
def test_a_proportional_round_has_the_size_that_was_asked_for(losses, prune, floor):
    visited, _ = draw("proportional", losses, prune=prune, floor=floor)
    wanted = max(1.0, (1 - prune) * len(losses))
    assert math.floor(wanted - 1e-6) <= len(visited) <= math.ceil(wanted + 1e-6)


def test_proportional_visits_in_proportion():
    losses = torch.tensor([1.0, 2.0, 4.0, 1.0])
    counts = torch.zeros(4)
    for seed in range(1000):
        ids, _ = proportional(losses, torch.Generator().manual_seed(seed), progress=0, round=1, prune=0.5, floor=0.0)
        counts[ids] += 1
    expected = torch.tensor([0.25, 0.5, 1.0, 0.25])
    assert ((counts / 1000 - expected).abs() <= 4 * (expected * (1 - expected) / 1000).sqrt()).all()


@given(st.lists(known, min_size=1, max_size=30), st.integers(1, 6))
def test_clusters_equal_the_slow_twin(values, groups):
    values = sorted(torch.tensor(values).tolist())
    cuts = cluster_sorted(torch.tensor(values), groups)
    assert cuts[0] == 0
    assert cuts[-1] == len(values)
    assert cuts == sorted(cuts)
    expected = slow_clusters(torch.tensor(values).double().tolist(), groups)
    got = [sum(cut <= i for cut in cuts[1:-1]) for i in range(len(values))]
    occupied = {g: rank for rank, g in enumerate(sorted(set(expected)))}
    assert [sorted(set(got)).index(g) for g in got] == [occupied[g] for g in expected]


def test_the_window_slides_from_easy_to_hard():
    losses = [float(i) for i in range(40)]
    means = []
    for number in range(1, 6):
        visited, _ = draw("window", losses, round=number, prune=0.0, groups=5, width=0.4)
        means.append(sum(visited) / len(visited))
    assert means[:4] == sorted(means[:4])
    assert means[4] == means[0]
    assert len(draw("window", losses, round=1, prune=0.0, groups=5, width=0.4)[0]) == 16


def test_the_window_leaves_groups_out_by_default():
    visited, _ = draw("window", [float(i) for i in range(100)], round=2, prune=0.0)
    assert set(visited) == set(range(20, 100))  # four of five groups, from the second on


def test_a_window_of_equal_losses_visits_all_of_them():
    assert all(len(draw("window", [1.0] * 20, round=number, prune=0.0)[0]) == 20 for number in (1, 2))


@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("losses", [[math.nan] * 5, [math.inf] * 5, [-math.inf] * 5, [0.0] * 5, [-2.0, -1, 0, 1, 2]])
@pytest.mark.filterwarnings("ignore:The rule `proportional`")
def test_any_losses_give_a_round(rule, losses):
    visited, ids = draw(rule, losses)
    assert 0 < len(visited) == len(ids)
    assert all(0 <= weight < math.inf for weight in visited.values())


def test_an_infinite_loss_counts_as_none():
    losses = [-math.inf, math.inf, math.nan, *[1.0] * 9, 2.0]
    for seed in range(5):
        assert {0, 1, 2, 12} <= draw("mean", losses, seed, prune=0.9)[0].keys()


def test_negative_losses_are_named_where_a_probability_would_be_in_proportion_to_them():
    with pytest.warns(UserWarning, match=r"`proportional` needs losses that are not negative.*Use `mean`"):
        draw("proportional", [-3.0, -2.0, -1.0, 0.5])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw("proportional", [-1e-6, 0.1, 0.2, 3.0])  # by rounding
        draw("mean", [-3.0, -2.0, -1.0, 0.5])
