"""Load and specialisation of experts, token by token."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from curation.metrics.experts import ExpertLoad, ExpertSpecialization

DOMAINS, EXPERTS = 3, 5
# Updates of tokens, each a domain and its two experts.
updates = st.lists(
    st.lists(
        st.tuples(st.integers(0, DOMAINS - 1), st.integers(-1, EXPERTS - 1), st.integers(-1, EXPERTS - 1)), min_size=1
    ),
    min_size=1,
    max_size=4,
)


def entered(tokens):
    rows = torch.tensor(tokens)
    return rows[:, 1:], rows[:, 0]


def equal(value, expected):
    return math.isnan(value) if expected is None else value == pytest.approx(expected, abs=1e-6)


@given(updates)
def test_load_equals_that_of_a_count_of_choices(entries):
    metric, counts = ExpertLoad(EXPERTS), Counter()
    for tokens in entries:
        metric.update(entered(tokens)[0])
        counts.update(expert for token in tokens for expert in token[1:] if expert >= 0)
    total, got = sum(counts.values()), metric.compute()
    assert equal(got["max_load"], max(counts.values()) * EXPERTS / total if total else None)
    assert equal(got["dead"], sum(counts[i] == 0 for i in range(EXPERTS)) / EXPERTS)
    assert equal(got["entropy"], -sum(c / total * math.log2(c / total) for c in counts.values()) if total else None)


@given(updates)
def test_specialization_equals_that_of_single_choices(entries):
    metric, choices = ExpertSpecialization(DOMAINS, EXPERTS), []
    for tokens in entries:
        metric.update(*entered(tokens))
        choices += [(d, expert) for d, *experts in tokens for expert in experts if expert >= 0]
    got, total = metric.compute(), len(choices)
    pairs, domains, experts = Counter(choices), Counter(d for d, _ in choices), Counter(e for _, e in choices)
    # The information of every choice's expert about its domain: log2 P(d, e) / (P(d) P(e)).
    information = [math.log2(pairs[d, e] * total / (domains[d] * experts[e])) for d, e in choices]
    assert equal(got["information"], sum(information) / total if total else None)
    for d in range(DOMAINS):
        divergence = [bits for (domain, _), bits in zip(choices, information, strict=True) if domain == d]
        assert equal(got["divergence"][d], sum(divergence) / len(divergence) if divergence else None)
        for e in range(EXPERTS):
            assert equal(got["frequencies"][d, e], pairs[d, e] / domains[d] if domains[d] else None)


def test_experts_of_one_domain_each_tell_it_and_experts_of_all_tell_nothing():
    domains = torch.arange(4).repeat_interleave(6)
    separate, shared = ExpertSpecialization(4, 8), ExpertSpecialization(4, 8)
    separate.update(torch.stack([2 * domains, 2 * domains + 1], 1), domains)
    shared.update(torch.tensor([[0, 1], [2, 3]]).repeat(12, 1), domains)
    assert separate.compute()["information"] == 2
    assert separate.compute()["divergence"].tolist() == [2, 2, 2, 2]
    assert shared.compute()["information"] == 0


@pytest.mark.parametrize("metric", [ExpertLoad(4), ExpertSpecialization(1, 4)])
def test_forward_is_of_the_batch_and_compute_of_all(metric):
    indices = torch.tensor([[0, 1], [2, 3]])
    domains = () if isinstance(metric, ExpertLoad) else (torch.zeros(1, dtype=torch.int64),)
    for rows in indices.split(1):
        metric(rows, *domains)
    assert metric.counts.flatten().tolist() == [1, 1, 1, 1]
    assert metric.counts.dtype == torch.int64


def test_a_domain_or_an_expert_that_is_not_there_is_refused():
    metric = ExpertSpecialization(2, 4)
    for indices, domains in (([[4, 0]], [0]), ([[3, 0]], [2])):
        with pytest.raises(IndexError):
            metric.update(torch.tensor(indices), torch.tensor(domains))
    with pytest.raises(ValueError, match="`indices` must be below 4, but has 4"):
        ExpertLoad(4).update(torch.tensor([[4]]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ExpertLoad(0), "Argument `experts` must be an integer >= 1, but got 0"),
        (lambda: ExpertSpecialization(2, 1.5), "Argument `experts` must be an integer >= 1, but got 1.5"),
        (lambda: ExpertSpecialization(0, 2), "Argument `domains` must be an integer >= 1, but got 0"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
