"""The statistics of a comparison, against hand calculations, SciPy and simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from curation.evaluation.statistics import paired_interval, performance_profile, time_to_target


def test_interval_by_hand():
    """Differences 1, 2, 3, 4, 5: mean 3, deviation sqrt(2.5), t with 4 degrees of freedom 2.776."""
    mean, low, high = paired_interval([1, 2, 3, 4, 5])
    assert mean == 3
    assert low == pytest.approx(3 - 2.7764451 * math.sqrt(2.5 / 5))
    assert high == pytest.approx(3 + 2.7764451 * math.sqrt(2.5 / 5))


@pytest.mark.parametrize("n", [2, 3, 5, 30])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_interval_is_that_of_scipys_paired_test(n, confidence):
    draw = np.random.default_rng(n)
    ours, base = draw.normal(0.3, 1, n), draw.normal(0, 1, n)
    test = stats.ttest_rel(ours, base)
    expected = test.confidence_interval(confidence)
    assert paired_interval(ours - base, confidence) == pytest.approx(((ours - base).mean(), *expected))
    _, low, high = paired_interval(ours - base, 1 - test.pvalue)  # the level at which it just leaves zero out
    assert min(abs(low), abs(high)) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_identical_arms_differ_in_about_one_of_twenty_comparisons(seeds):
    draw = np.random.default_rng(0)
    wrong = 0
    for _ in range(2000):
        shared = draw.normal(0, 3, seeds)  # what a seed does to both arms
        ours, base = (shared + draw.normal(0, 1, seeds) for _ in range(2))
        _, low, high = paired_interval(ours - base)
        wrong += low > 0 or high < 0
    assert 0.035 <= wrong / 2000 <= 0.065


def test_a_difference_that_is_there_is_found():
    draw = np.random.default_rng(1)
    found = [paired_interval(draw.normal(2, 1, 5))[1] > 0 for _ in range(500)]
    assert np.mean(found) == pytest.approx(0.93, abs=0.04)  # power of the t test: noncentral t, effect 2, n = 5
    power = 1 - stats.nct.cdf(stats.t.ppf(0.975, 4), 4, 2 * math.sqrt(5))
    assert np.mean(found) == pytest.approx(power, abs=0.04)


@pytest.mark.parametrize("differences", [[0.5] * 3, [1 / 256] * 2, [0.0, 0.0], [0.913 - 0.912, 0.847 - 0.846]])
def test_equal_differences_say_nothing_about_their_spread(differences):
    mean, low, high = paired_interval(differences)
    assert mean == pytest.approx(differences[0])
    assert (low, high) == (-math.inf, math.inf)


def test_differences_within_the_resolution_are_equal():
    assert paired_interval([1.0, 1.001], resolution=0.002)[1:] == (-math.inf, math.inf)
    assert math.isfinite(paired_interval([1.0, 1.001], resolution=0.0005)[1])
    with pytest.raises(ValueError, match=r"Argument `resolution` must be in \[0, inf\), but got -1"):
        paired_interval([1.0, 2.0], resolution=-1)


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("deviation", [0.5, 1, 2, 5, 20])  # of an arm, in the smallest step of its metric
def test_identical_arms_with_a_coarse_metric_differ_no_more_often(seeds, deviation):
    """As the accuracy of a few hundred samples: with two seeds 12 % were a win by an interval of no width."""
    draw = np.random.default_rng(seeds)
    wrong = 0
    for _ in range(2000):
        ours, base = (np.round(draw.normal(0.3, deviation, seeds)) / 256 for _ in range(2))
        _, low, high = paired_interval(ours - base)
        wrong += low > 0 or high < 0
    assert wrong / 2000 <= 0.065


@pytest.mark.parametrize("differences", [[], [1.0], [1.0, math.nan], [1.0, math.inf]])
def test_too_few_or_broken_differences_are_refused(differences):
    with pytest.raises(ValueError, match="Argument `differences` must be at least two finite numbers"):
        paired_interval(differences)


@pytest.mark.parametrize("confidence", [0, 1, 1.5, math.nan])
def test_a_confidence_out_of_range_is_refused(confidence):
    with pytest.raises(ValueError, match=r"Argument `confidence` must be in \(0, 1\), but got"):
        paired_interval([1, 2], confidence)


def test_time_to_target_is_that_of_the_first_evaluation_that_reaches_it():
    assert time_to_target([1, 2, 3, 4], [9, 5, 7, 4], 5, "min") == 2  # though it is left again
    assert time_to_target([1, 2, 3], [0.1, math.nan, 0.5], 0.5, "max") == 3
    assert time_to_target([1, 2], [0.1, 0.2], 0.5, "max") == math.inf
    assert time_to_target([], [], 0.5, "max") == math.inf
    with pytest.raises(ValueError, match="Argument `mode` must be 'min' or 'max', but got 'low'"):
        time_to_target([1], [1], 1, "low")
    with pytest.raises(ValueError, match="Argument `values` must be one for each of 2 times, but got 1"):
        time_to_target([1, 2], [1], 1, "min")


def test_performance_profile_by_hand():
    times = {
        "a": {"x": 10.0, "y": 15.0, "z": math.inf},
        "b": {"x": 40.0, "y": 10.0, "z": 30.0},
        "c": {"x": math.inf, "y": math.inf, "z": math.inf},
    }
    assert performance_profile(times, [1, 1.5, 3, 4]) == {
        "x": [1 / 3, 1 / 3, 1 / 3, 2 / 3],
        "y": [1 / 3, 2 / 3, 2 / 3, 2 / 3],
        "z": [0, 0, 1 / 3, 1 / 3],
    }


def test_performance_profile_refuses_what_cannot_be_compared():
    with pytest.raises(ValueError, match="Argument `times` must hold the same methods"):
        performance_profile({"a": {"x": 1.0}, "b": {"y": 1.0}}, [1])
    with pytest.raises(ValueError, match="Argument `times` must hold"):
        performance_profile({}, [1])
    with pytest.raises(ValueError, match="Argument `ratios` must be >= 1, but got"):
        performance_profile({"a": {"x": 1.0}}, [0.5])
