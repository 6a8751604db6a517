"""The number of wrong labels, where it is known."""

import math

import numpy as np
import pytest

from curation.audit import (
    UnsupportedError,
    below_threshold,
    estimate_wrong,
    wrong_by_mixture,
    wrong_by_threshold_samples,
)
from curation.audit.estimate import _best_share, _fit_mixture


def margins(seed, wrong, right=1000, apart=3.0):
    generator = np.random.default_rng(seed)
    return np.concatenate([generator.normal(-apart, 1, wrong), generator.normal(apart, 1, right)])


@pytest.mark.parametrize("wrong", [0, 20, 100, 300])
def test_the_interval_holds_the_number_and_is_no_wider(wrong):
    inside = 0
    for seed in range(20):
        threshold = np.random.default_rng(1000 + seed).normal(-3.0, 1, 150)
        got = wrong_by_threshold_samples(margins(seed, wrong), threshold, seed)
        assert got.low <= got.count <= got.high
        assert got.high - got.low < wrong + 25
        inside += got.low - 1 <= wrong <= got.high + 1
    assert inside >= 18


def test_the_mixture_gives_the_number_where_components_are_apart():
    for seed in range(5):
        got = wrong_by_mixture(margins(seed, 150))
        assert got.count == pytest.approx(150, abs=10)
        assert got.low <= 150 <= got.high
        assert got.method == "mixture"


def test_what_the_margins_do_not_say_is_refused():
    with pytest.raises(UnsupportedError, match=r"two components .* deviations apart, and 4 are needed"):
        wrong_by_mixture(np.random.default_rng(0).normal(0, 1, 1000))
    with pytest.raises(UnsupportedError, match="there are 19 threshold samples, and 20 are needed"):
        estimate_wrong(margins(0, 10), np.zeros(19))
    with pytest.raises(UnsupportedError, match=r"\d+% of the samples look like the threshold samples"):
        estimate_wrong(np.random.default_rng(0).normal(0, 1, 1000), np.random.default_rng(1).normal(0, 1, 100))
    with pytest.raises(UnsupportedError, match="there are 3 samples, and 20 are needed"):
        estimate_wrong(np.array([1.0, 2.0, 3.0, np.nan]))
    with pytest.raises(UnsupportedError, match="two components"):
        estimate_wrong(np.zeros(100))


def test_the_share_is_that_of_plain_loops():
    generator = np.random.default_rng(0)
    for _ in range(20):
        samples, threshold = generator.normal(1, 2, 60), np.sort(generator.normal(-1, 1, 25))
        best = (math.inf, 0.0)
        for point in threshold:
            f = sum(x <= point for x in samples) / 60
            g = sum(x <= point for x in threshold) / 25
            bound = (f + 0.5 * math.sqrt(math.log(40) / 2) * (60**-0.5 + 25**-0.5)) / g
            if g >= 0.1:
                best = min(best, (bound, f / g))
        bins = np.bincount(np.searchsorted(threshold, samples), minlength=26)
        assert _best_share(bins, np.ones(25), 0.5) == pytest.approx(min(1.0, best[1]))


def test_the_mixture_is_that_of_plain_loops():
    generator = np.random.default_rng(0)
    values = np.concatenate([generator.normal(-2, 1, 40), generator.normal(2, 1, 60)])
    counts, edges = np.histogram(values, 32)
    x = ((edges[1:] + edges[:-1]) / 2).tolist()
    weight, means, deviations = _fit_mixture(counts, np.array(x), 1)
    start = [x[min(np.searchsorted(np.cumsum(counts) / 100, q), 31)] for q in (0.05, 0.75)]
    width = (x[-1] - x[0]) / 8 + (x[-1] - x[0]) / 32 + 1e-12
    sizes, firsts, seconds = [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]
    parts = [[math.exp(-(((v - m) / width) ** 2) / 2) for m in start] for v in x]
    for v, c, both in zip(x, counts, parts, strict=True):
        for k in (0, 1):
            part = c * both[k] / sum(both)
            sizes[k], firsts[k] = sizes[k] + part, firsts[k] + part * v
    expected = [firsts[k] / sizes[k] for k in (0, 1)]
    for v, c, both in zip(x, counts, parts, strict=True):
        for k in (0, 1):
            seconds[k] += c * both[k] / sum(both) * (v - expected[k]) ** 2
    assert means.tolist() == pytest.approx(expected)
    assert deviations.tolist() == pytest.approx([math.sqrt(seconds[k] / sizes[k]) for k in (0, 1)])
    assert weight == pytest.approx(sizes[0] / 100)


def test_the_threshold_is_a_quantile():
    threshold = np.arange(100.0)
    assert below_threshold(np.array([98.0, 99.0, np.nan]), threshold).tolist() == [True, False, False]
    assert below_threshold(np.array([50.0]), threshold, 0.5).tolist() == [False]
