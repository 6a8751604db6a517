"""The draws of hard-sample training, against brute force and by what they must hold on average."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import CLASSES, FEATURES
from hypothesis import given
from hypothesis import strategies as st

from curation.online.hard_samples import (
    cdf_power,
    floored_log_weights,
    low_score_sample,
    pareto_sample,
    priority_sample,
    rank_log_weights,
    successive_sample,
    variance_reduction,
)
from curation.scoring import per_sample_grad_norm

numbers = st.one_of(st.floats(0, 1e6, width=32), st.sampled_from([math.nan, math.inf, 0.0, 1.0]))
DRAWS = 10_000


def uniforms(size, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).random((DRAWS, size)))


@given(st.lists(numbers, min_size=1, max_size=20), st.floats(1, 1e4))
def test_rank_weights_equal_the_formula(scores, pressure):
    got = rank_log_weights(torch.tensor(scores), pressure).tolist()
    order = sorted(range(len(scores)), key=lambda i: (-scores[i] if math.isfinite(scores[i]) else math.inf, i))
    for rank, i in enumerate(order):
        expected = -math.log(pressure) * rank / len(scores) if math.isfinite(scores[i]) else -math.inf
        assert got[i] == pytest.approx(expected, rel=1e-5, abs=1e-6)


@given(st.lists(numbers | st.floats(-9, 0, width=32), min_size=1, max_size=20), st.floats(0.01, 1))
def test_floored_weights_equal_the_formula(scores, floor):
    got = floored_log_weights(torch.tensor(scores), floor).double().exp().tolist()
    finite = [max(score, 0) for score in scores if math.isfinite(score)]
    for score, weight in zip(scores, got, strict=True):
        expected = max(score, floor * sum(finite) / len(finite)) if math.isfinite(score) else 0.0
        assert weight == pytest.approx(expected, rel=1e-4, abs=1e-30)


@given(st.lists(numbers, min_size=1, max_size=20), st.lists(numbers, max_size=20), st.floats(0, 5))
def test_cdf_equals_counting(scores, pool, beta):
    pool = pool + scores
    got = cdf_power(torch.tensor(scores), torch.tensor(pool), beta).tolist()
    finite = [p for p in pool if math.isfinite(p)]
    for score, p in zip(scores, got, strict=True):
        expected = (sum(q <= score for q in finite) / len(finite)) ** beta if math.isfinite(score) else 0.0
        assert p == pytest.approx(expected, rel=1e-5)


@given(st.lists(numbers, min_size=1, max_size=20), st.floats(0, 0.99), st.integers(0, 20), st.randoms())
def test_of_low_scores_rows_are_drawn_at_random(scores, drop, k, random):
    uniform = [random.random() for _ in scores]
    got = low_score_sample(torch.tensor(scores), drop, k, torch.tensor(uniform)).tolist()
    values = [score if math.isfinite(score) else math.inf for score in scores]
    order = sorted(range(len(scores)), key=lambda i: (values[i], i))
    remain = order[: max(len(scores) - math.floor(drop * len(scores) + 0.5), min(k, len(scores)))]
    odds = {i: float(torch.tensor(uniform)[i]) if math.isfinite(scores[i]) else -1.0 for i in remain}
    assert got == sorted(sorted(sorted(remain), key=lambda i: -odds[i])[:k])


def test_successive_draws_have_the_odds_of_their_weights():
    w = torch.tensor([4.0, 3.0, 2.0, 1.0])
    counts = dict.fromkeys(combinations(range(4), 2), 0)
    for u in uniforms(4):
        counts[tuple(successive_sample(w.log(), 2, u).tolist())] += 1
    for i, j in counts:
        p = w[i] / 10 * w[j] / (10 - w[i]) + w[j] / 10 * w[i] / (10 - w[j])
        assert counts[i, j] / DRAWS == pytest.approx(float(p), abs=4 * math.sqrt(0.25 / DRAWS))


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_pareto_draws_take_each_row_with_its_probability(factor):
    p = torch.tensor([0.9, 0.5, 0.3, 0.2, 0.1])
    odds = factor * p / (1 - p)
    shares = torch.zeros(5)
    for u in uniforms(5):
        rows = pareto_sample(odds / (1 + odds), 2, u)
        assert len(rows) == 2
        shares[rows] += 1 / DRAWS
    torch.testing.assert_close(shares, p, atol=0.02, rtol=0)


def test_certain_rows_that_are_too_many_are_drawn_evenly():
    shares = torch.zeros(4)
    for u in uniforms(4):
        shares[pareto_sample(torch.ones(4), 1, u)] += 1 / DRAWS
    torch.testing.assert_close(shares, torch.full((4,), 0.25), atol=0.02, rtol=0)


def unbiased(draw):
    """Whether the mean weighted gradient is the full one, within 3 standard errors on 10 random projections."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(16, FEATURES, generator=g), torch.randint(0, CLASSES, (16,), generator=g)
    head = torch.randn(CLASSES, FEATURES, generator=g) * 2
    logits = x @ head.T
    residual = logits.softmax(1) - F.one_hot(y, CLASSES)
    gradients = (residual[:, :, None] * x[:, None, :]).flatten(1).double()  # one per sample
    projected = gradients @ torch.randn(CLASSES * FEATURES, 10, generator=g).double()
    scores = per_sample_grad_norm(logits, y)
    estimates = []
    for u in uniforms(16, seed=1):
        rows, weights = draw(scores, u)
        estimates.append((weights.double()[:, None] * projected[rows]).mean(0))
    estimates = torch.stack(estimates)
    off = (estimates.mean(0) - projected.mean(0)).abs() / (estimates.std(0) / math.sqrt(DRAWS))
    return bool((off < 3).all())


def test_the_weighted_gradient_is_unbiased():
    assert unbiased(lambda scores, u: priority_sample(scores, 4, u))


def test_drawing_without_replacement_by_inverse_probabilities_would_be_biased():
    def naive(scores, u):
        p = scores / scores.sum()
        rows = successive_sample(p.log(), 4, u)
        return rows, 1 / (16 * p[rows])

    assert not unbiased(naive)


@given(st.lists(numbers, min_size=1, max_size=12), st.integers(1, 12), st.integers(0, 1000))
def test_priority_sampling_equals_its_definition(scores, k, seed):
    u = np.random.default_rng(seed).random(len(scores))
    rows, weights = priority_sample(torch.tensor(scores), k, torch.from_numpy(u))
    if k >= len(scores):
        assert rows.tolist() == list(range(len(scores)))
        assert weights.tolist() == [1.0] * len(scores)
        return
    w = [s if math.isfinite(s) else 0.0 for s in scores]
    q = [a / b if math.isfinite(s) else -1.0 for a, b, s in zip(w, u, scores, strict=True)]
    order = sorted(range(len(q)), key=lambda i: (-q[i], i))
    assert rows.tolist() == sorted(order[:k])
    for i, weight in zip(rows.tolist(), weights.tolist(), strict=True):
        stands_for = max(1.0, max(0.0, q[order[k]]) / w[i]) if w[i] > 0 else 1.0
        assert weight == pytest.approx(stands_for * k / len(w), rel=1e-5)


def test_a_row_of_weight_zero_comes_before_one_without_a_finite_score():
    for u in uniforms(5)[:50]:
        assert priority_sample(torch.tensor([math.nan, 0.0, 0.0, 0.0, 1.0]), 4, u)[0].tolist() == [1, 2, 3, 4]
        few = cdf_power(torch.tensor([math.nan, 1.0, 2.0]), torch.arange(1000.0), 1000.0)
        assert pareto_sample(few, 2, u[:3]).tolist() == [1, 2]


def test_rows_without_a_finite_score_are_drawn_last():
    scores = torch.tensor([math.nan, 1.0, math.inf, 2.0])
    for u in uniforms(4)[:100]:
        assert successive_sample(rank_log_weights(scores, 100.0), 2, u).tolist() == [1, 3]
        assert pareto_sample(cdf_power(scores, scores, 2.0), 2, u).tolist() == [1, 3]
        assert priority_sample(scores, 2, u)[0].tolist() == [1, 3]


def test_variance_reduction_equals_the_ratio_of_variances():
    g = torch.tensor([1.0, 1.0, 1.0, 5.0], dtype=torch.float64)
    # With replacement, of vectors of these norms: E ||G / (B p)||^2 is mean(g)^2 if p ~ g, mean(g^2) if p = 1 / B.
    assert float(variance_reduction(g)) == pytest.approx(math.sqrt(float(g.square().mean() / g.mean() ** 2)))
    assert float(variance_reduction(torch.full((7,), 3.0))) == pytest.approx(1.0)


def test_scores_that_are_all_zero_are_equal_and_reduce_no_variance():
    for scores in (torch.zeros(4), torch.full((4,), math.nan)):
        assert variance_reduction(scores) == 1


def test_what_is_not_a_number_is_drawn_last():
    uniform = torch.full((3,), 0.5)
    assert pareto_sample(torch.tensor([0.1, math.nan, 0.2]), 2, uniform).tolist() == [0, 2]
    assert successive_sample(torch.tensor([-9.0, math.nan, -5.0]), 2, uniform).tolist() == [0, 2]


def test_weights_are_finite_whatever_is_drawn():
    _, weights = priority_sample(torch.tensor([1e-45, 3e38, 3e38]), 1, torch.tensor([0.0, 0.9, 0.9]))
    assert weights.isfinite().all()


def test_a_pressure_or_power_out_of_range_is_named():
    for value in (0.5, math.nan, math.inf):
        with pytest.raises(ValueError, match=rf"`pressure` must be in \[1, inf\), but got {value}"):
            rank_log_weights(torch.ones(3), value)
    for value in (-0.5, math.nan, math.inf):
        with pytest.raises(ValueError, match=rf"`beta` must be in \[0, inf\), but got {value}"):
            cdf_power(torch.ones(3), torch.ones(3), value)
