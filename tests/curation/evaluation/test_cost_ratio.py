"""The cost ratio at equal quality: curves with a known ratio, SciPy's paired test, and simulation."""

import math

import numpy as np
import pytest
from scipy import optimize, stats

from curation.evaluation.cost_ratio import cost_ratio, fit_curve

SHARES = np.array([0.25, 0.5, 1.0, 2.0])
SEEDS = np.array([[0.03], [-0.05], [0.0], [0.01], [0.04]])  # what a seed does to every run


def line(costs):
    return 0.3 + 0.05 * np.log(costs)


@pytest.mark.parametrize("ratio", [0.33, 0.5, 0.62, 1.0, 1.55])
@pytest.mark.parametrize("price", [0.8, 1.0, 1.3])  # of a step of the method
@pytest.mark.parametrize("sign", [1, -1])
def test_a_line_that_is_shifted_is_recovered_exactly(ratio, price, sign):
    """Accuracy and nll alike: q = a + b log cost, and the method's curve is shifted by log r."""
    costs = 1e12 * price * SHARES
    mode = "max" if sign == 1 else "min"
    base, own = sign * (line(SHARES) + SEEDS), sign * (line(price * SHARES / ratio) + SEEDS)
    result = cost_ratio(1e12 * SHARES, base, costs, own, mode, 2)
    assert result.ratio == pytest.approx(ratio, rel=1e-9)
    assert (result.bound, result.quality) == ("", pytest.approx(sign * (0.3 + SEEDS.mean())))
    assert result.rise[0] == pytest.approx(0.05 * math.log(2))  # positive is better
    assert (result.low, result.high) == (0, math.inf)  # differences that are equal in all seeds say nothing


def test_budgets_of_any_number_and_distance():
    costs, own_costs = np.array([1.0, 3.0, 4.0, 20.0, 21.0]), np.array([0.5, 7.0])
    result = cost_ratio(costs, line(costs) + SEEDS, own_costs, line(own_costs / 0.8) + SEEDS, "max", 1)
    assert result.ratio == pytest.approx(0.8)


def test_the_interval_is_that_of_scipys_paired_test():
    """With two budgets the curves are straight: the ends are the costs at which the paired test is at its level."""
    draw = np.random.default_rng(0)
    base = line(np.array([1, 4])) + SEEDS + draw.normal(0, 0.004, (5, 2))
    own = line(np.array([1, 4]) / 0.6) + SEEDS + draw.normal(0, 0.004, (5, 2))

    def level(log_cost):
        share = log_cost / math.log(4)
        test = stats.ttest_rel((1 - share) * own[:, 0] + share * own[:, 1], base[:, 1])
        return math.copysign(1 - test.pvalue, test.statistic)

    result = cost_ratio([1, 4], base, [1, 4], own, "max", 1)
    ends = [math.exp(optimize.brentq(lambda x, at=at: level(x) - at, 0, math.log(4))) / 4 for at in (-0.95, 0, 0.95)]
    assert (result.low, result.ratio, result.high) == pytest.approx(tuple(ends), rel=1e-4)
    assert 0.35 < result.low < 0.6 < result.high < 1  # neither end is that of the budgets


@pytest.mark.parametrize(("ratio", "sign", "costs"), [(0.62, 1, 1.0), (1.4, -1, 1.3)])
def test_the_interval_holds_the_truth_in_about_95_percent(ratio, sign, costs):
    """Measured with 5 seeds, 400 comparisons: 92.8 and 96.0 %."""
    draw = np.random.default_rng(1)
    held = 0
    for _ in range(400):
        seeds = draw.normal(0, 0.05, (5, 1))
        base, own = (
            sign * (line(c) + seeds) + draw.normal(0, 0.006, (5, 4)) for c in (SHARES, costs * SHARES / ratio)
        )
        result = cost_ratio(SHARES, base, costs * SHARES, own, "max" if sign == 1 else "min", 2)
        held += result.low <= ratio <= result.high
        assert result.bound or result.low <= result.ratio <= result.high
    assert 0.9 <= held / 400 <= 0.99


def test_seconds_that_differ_between_seeds_widen_the_interval():
    """Measured in 400 comparisons of 5 seeds with timings that are 20 % off: 95.5 % with their spread, 20 without."""
    draw = np.random.default_rng(2)
    held, without = 0, 0
    for _ in range(400):
        seeds = draw.normal(0, 0.05, (5, 1))
        base, own = (line(c) + seeds + draw.normal(0, 0.001, (5, 4)) for c in (SHARES, SHARES / 0.62))
        times, own_times = (SHARES * np.exp(draw.normal(0, 0.2, (5, 4))) for _ in range(2))
        if min(np.diff(np.log(t).mean(0)).min() for t in (times, own_times)) <= 0:
            continue
        result = cost_ratio(times, base, own_times, own, "max", 2)
        held += result.low <= 0.62 <= result.high
        means = (np.exp(np.log(t).mean(0)) for t in (times, own_times))
        narrow = cost_ratio(next(means), base, next(means), own, "max", 2)
        assert narrow.ratio == pytest.approx(result.ratio)
        assert result.low < narrow.low
        assert narrow.high < result.high
        without += narrow.low <= 0.62 <= narrow.high
    assert 0.9 <= held / 400 <= 0.99
    assert without / 400 < 0.5


def noisy(costs, seed=3):
    return line(costs) + SEEDS + np.random.default_rng(seed).normal(0, 0.002, (5, len(costs)))


def test_what_is_not_reached_is_a_bound():
    result = cost_ratio(SHARES, noisy(SHARES), SHARES, noisy(SHARES / 2.6, 4), "max", 2)
    assert (result.bound, result.high) == (">", math.inf)
    assert (result.ratio, result.low) == pytest.approx((2, 2))
    result = cost_ratio(SHARES, noisy(SHARES), SHARES, noisy(SHARES / 0.2, 4), "max", 2)
    assert (result.bound, result.low) == ("<", 0)
    assert (result.ratio, result.high) == pytest.approx((0.25, 0.25))


@pytest.mark.parametrize(("ratio", "open_end"), [(0.252, "low"), (1.98, "high")])
def test_an_interval_is_open_where_it_leaves_the_budgets(ratio, open_end):
    result = cost_ratio(SHARES, noisy(SHARES), SHARES, noisy(SHARES / ratio, 4), "max", 2)
    assert getattr(result, open_end) == {"low": 0, "high": math.inf}[open_end]
    closed = result.high if open_end == "low" else result.low
    assert closed == pytest.approx(ratio, rel=0.15)


def test_a_plateau_is_told():
    flat = noisy(SHARES)
    flat[:, 2:] = flat[:, [1]] + np.random.default_rng(5).normal(0, 0.002, (5, 2))
    assert cost_ratio(SHARES, flat, SHARES, noisy(SHARES, 4), "max", 2).plateau
    assert not cost_ratio(SHARES, noisy(SHARES), SHARES, noisy(SHARES, 4), "max", 2).plateau
    falls = noisy(SHARES)
    falls[:, 2] = falls[:, 1] - 0.1
    assert cost_ratio(SHARES, falls, SHARES, noisy(SHARES, 4), "max", 2).plateau
    first = cost_ratio(SHARES[1:], noisy(SHARES)[:, 1:], SHARES, noisy(SHARES, 4), "max", 0)
    assert first.rise[0] == pytest.approx(0.05 * math.log(2), rel=0.2)  # to the next, as there is none before
    assert not first.plateau


def test_the_curve_is_monotone_and_its_flat_part_is_the_mean_of_neighbours_in_the_wrong_order():
    curve = fit_curve([1, 2, 4, 8], [0.5, 0.7, 0.6, 0.9], "max")
    assert curve(np.log([1, 2, 4, 8])) == pytest.approx([0.5, 0.65, 0.65, 0.9])
    assert (np.diff(curve(np.linspace(0, math.log(8), 99))) >= 0).all()
    down = fit_curve([1, 2, 4, 8], [0.5, 0.3, 0.4, 0.1], "min")
    assert down(np.log([1, 2, 4, 8])) == pytest.approx([0.5, 0.35, 0.35, 0.1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_values": [[1, 2, 3]]}, "Argument `base_values` must be finite numbers of at least two seeds"),
        ({"values": [[1], [2]]}, "Argument `values` must be finite numbers of at least two seeds and two budgets"),
        ({"values": [[1, math.nan, 2], [1, 2, 3]]}, "Argument `values` must be finite"),
        ({"values": [[1, 2, 3]] * 3}, "Argument `values` must have 2 seeds, as `base_values`, but got 3"),
        ({"costs": [1, 2]}, "Argument `costs` must be a positive number for each of `values`, but got"),
        ({"costs": [0, 1, 2]}, "Argument `costs` must be a positive number"),
        ({"base_costs": [1, 3, 2]}, "Argument `base_costs` must rise with the budgets, but got"),
        ({"read": 3}, r"Argument `read` must be an integer in \[0, 3\), but got 3"),
        ({"mode": "up"}, "Argument `mode` must be 'min' or 'max', but got 'up'"),
        ({"confidence": 1}, r"Argument `confidence` must be in \(0, 1\), but got 1"),
    ],
)
def test_what_cannot_be_compared_is_refused(changes, message):
    runs = {"base_costs": [1, 2, 3], "base_values": [[1, 2, 3], [1, 2, 4]]}
    given = {**runs, "costs": runs["base_costs"], "values": runs["base_values"], "mode": "max", "read": 1}
    with pytest.raises(ValueError, match=message):
        cost_ratio(**{**given, **changes})
