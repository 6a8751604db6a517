"""Moments of gradients from micro-batches, against gradients of single samples."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from curation.batch_size import Moments, MovingMoments, gradient_moments, wanted_rows

K, M, STEPS = 4, 2, 4000


@pytest.fixture(scope="module")
def per_sample():
    """Gradients of least squares, one for each sample, fp64 ``[N, D]``."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4096, 12, generator=g, dtype=torch.float64)
    y = x.sum(1) + 2 * torch.randn(4096, generator=g, dtype=torch.float64)
    return (x @ torch.full((12,), 0.5, dtype=torch.float64) - y)[:, None] * x


@pytest.fixture(scope="module")
def windows(per_sample):
    """``STEPS`` windows of ``K`` micro-batches of ``M`` rows: ``[STEPS, K, M, D]``."""
    rows = torch.randint(len(per_sample), (STEPS * K * M,), generator=torch.Generator().manual_seed(1))
    return per_sample[rows].view(STEPS, K, M, -1)


def test_the_trace_and_the_squared_norm_are_those_of_all_samples(per_sample, windows):
    means = windows.mean(2)
    moments = gradient_moments(means.square().sum((1, 2)), means.mean(1).square().sum(1), K, M)
    trace, square = per_sample.var(0, unbiased=False).sum(), per_sample.mean(0).square().sum()
    assert float(moments.trace.mean() / trace) == pytest.approx(1, abs=0.03)
    assert float(moments.true_square.mean() / square) == pytest.approx(1, abs=0.03)
    averaged = Moments(*(value.mean() for value in moments))
    assert float(averaged.noise_scale) == pytest.approx(float(trace / square), rel=0.06)


def test_the_combination_of_the_authors_is_too_large(per_sample, windows):
    """Variance within micro-batches plus variance between their means."""
    means = windows.mean(2)
    between = (means - means.mean(1, keepdim=True)).square().sum(2).mean(1)
    theirs = windows.var(2, unbiased=True).sum(2).mean(1) + between
    trace = per_sample.var(0, unbiased=False).sum()
    assert float(theirs.mean() / trace) == pytest.approx(1 + (K - 1) / (K * M), rel=0.02)


@given(st.integers(2, 6), st.integers(1, 5), st.integers(0, 99))
def test_moments_equal_the_slow_twin(count, rows, seed):
    gradients = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    moments = gradient_moments(gradients.square().sum(), gradients.mean(0).square().sum(), count, rows)
    g = [sum(row[i] for row in gradients.tolist()) / count for i in range(3)]
    variance = sum((a - b) ** 2 for row in gradients.tolist() for a, b in zip(row, g, strict=True)) / (count - 1)
    assert float(moments.trace) == pytest.approx(rows * variance)
    assert float(moments.true_square) == pytest.approx(sum(x * x for x in g) - variance / count)
    assert float(wanted_rows(moments, 0.5)) == pytest.approx(4 * rows * variance / sum(x * x for x in g))


def test_a_gradient_that_does_not_show_has_an_infinite_noise_scale():
    assert Moments(torch.tensor(1.0), torch.tensor(0.1), torch.tensor(-0.2)).noise_scale == torch.inf


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=8), st.sampled_from([0.0, 0.5, 0.95]))
def test_averages_equal_the_slow_twin_and_leave_out_what_is_not_finite(values, decay):
    moving = MovingMoments(decay)
    for value in values:
        moving.update(Moments(*torch.tensor([value, 2 * value, 3 * value], dtype=torch.float64)))
        moving.update(Moments(*torch.tensor([torch.inf, 1.0, torch.nan], dtype=torch.float64)))
    weights = [decay ** (len(values) - 1 - i) for i in range(len(values))]
    expected = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    assert [float(value) for value in moving.moments] == pytest.approx([expected, 2 * expected, 3 * expected])
