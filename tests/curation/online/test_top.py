"""Keeping the best rows, against a slow twin."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from curation.online.top import keep_count, standardize, top_rows

numbers = st.one_of(st.floats(-1e6, 1e6, width=32), st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 1.0]))


def slow_top_rows(scores, k):
    ranked = sorted(range(len(scores)), key=lambda i: (-scores[i] if math.isfinite(scores[i]) else math.inf, i))
    return sorted(ranked[:k])


@given(st.lists(numbers, min_size=1, max_size=40), st.integers(1, 40))
def test_top_rows_equal_a_sort(scores, k):
    assert top_rows(torch.tensor(scores), k).tolist() == slow_top_rows(scores, k)


@given(st.lists(numbers, min_size=1, max_size=30))
def test_standardize_equals_the_definition(values):
    values = [float(torch.tensor(v)) for v in values]
    finite = [v for v in values if math.isfinite(v)]
    got = standardize(torch.tensor(values, dtype=torch.float64))
    mean = sum(finite) / max(1, len(finite))
    deviation = math.sqrt(sum((v - mean) ** 2 for v in finite) / max(1, len(finite)))
    for value, z in zip(values, got.tolist(), strict=True):
        if not math.isfinite(value):
            assert math.isnan(z)
        elif deviation <= 1e-13 * abs(mean):
            assert abs(z) <= 1e-6 or deviation > 0
        else:
            assert z == pytest.approx((value - mean) / deviation, rel=1e-3, abs=1e-6)


def test_equal_values_have_no_deviation_even_after_rounding():
    assert torch.equal(standardize(torch.full((7,), 0.1)), torch.zeros(7))


@pytest.mark.parametrize(
    ("keep", "size", "k"), [(0.25, 8, 2), (0.125, 8, 1), (0.5, 3, 2), (0.01, 5, 1), (1.0, 7, 7), (0.99, 1, 1)]
)
def test_keep_count_rounds_and_never_is_zero(keep, size, k):
    assert keep_count(keep, size) == k


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e30, 1e38])
def test_scores_of_any_size_are_standardized(scale):
    z = standardize(torch.tensor([1.0, 2.0, 3.0, math.nan]) * scale)
    assert z[:3].tolist() == pytest.approx([-(1.5**0.5), 0, 1.5**0.5], abs=0.3 if scale < 1e-40 else 1e-5)
    assert z[3].isnan()
    largest = torch.finfo(torch.float32).max
    assert standardize(torch.tensor([largest, -largest])).tolist() == [1, -1]


def test_what_cannot_be_kept_is_named():
    for keep in (0, -0.5, 1.5, math.nan, math.inf):
        with pytest.raises(ValueError, match=rf"Argument `keep` must be in \(0, 1\], but got {keep}"):
            keep_count(keep, 8)
    with pytest.raises(ValueError, match="Argument `k` must be an integer >= 0, but got -1"):
        top_rows(torch.ones(4), -1)
