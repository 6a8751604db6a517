"""Accuracy retention, against slow and obvious twins."""

import numpy as np
import pytest
from scipy import stats

from curation.evaluation.retention import Retention, random_forest, retention

sklearn_datasets = pytest.importorskip("sklearn.datasets", reason="needs scikit-learn, from the [demo] extra")


def stratified_random(y, budget, seed):
    from curation.instances import StratifiedRandomSelector

    return StratifiedRandomSelector(budget, random_state=seed).fit(y[:, None], y).sample_indices_


@pytest.fixture(scope="module")
def digits():
    x, y = sklearn_datasets.load_digits(return_X_y=True)
    return (x[:1200], y[:1200]), (x[1200:], y[1200:])


def nearest(seed):
    """A probe without chance."""
    from sklearn.neighbors import KNeighborsClassifier

    return KNeighborsClassifier(1)


def nearest_twin(train, test, rows):
    right = 0
    for x, label in zip(*test, strict=True):
        distances = [((x - train[0][i]) ** 2).sum() for i in rows]
        right += train[1][rows[int(np.argmin(distances))]] == label
    return right / len(test[1])


def test_retention_is_that_of_the_slow_twin(digits):
    train, test = digits
    test = (test[0][:60], test[1][:60])
    indices = np.arange(40, 80)
    found = retention(train, test, indices, nearest, repeats=3, seed=5)
    assert found.full == nearest_twin(train, test, range(1200))
    assert found.selected == (nearest_twin(train, test, indices),) * 3
    random = [nearest_twin(train, test, stratified_random(train[1], 1 / 30, seed)) for seed in (5, 6, 7)]
    assert found.random == tuple(random)
    assert len(set(random)) > 1
    assert found.reduction == 1 - 40 / 1200
    np.testing.assert_allclose(found.of_selected, [s / found.full for s in found.selected])
    np.testing.assert_allclose(found.of_random, [s / found.full for s in random])
    assert found.effectiveness == pytest.approx(found.selected[0] * (1 - 40 / 1200))


def test_a_random_selection_equals_the_random_one_of_its_seed(digits):
    """Paired: the same samples and the same seed of the probe."""
    train, test = digits
    found = retention(train, test, stratified_random(train[1], 0.05, 3), repeats=2, seed=3)
    assert found.selected[0] == found.random[0]
    assert found.selected[1] != found.selected[0]  # another forest
    assert found.full == random_forest(3).fit(*train).score(*test)


def test_everything_retains_everything(digits):
    train, test = digits
    found = retention(train, test, np.arange(1200), nearest, repeats=1)
    assert found == Retention(found.full, (found.full,), (found.full,), 0.0)
    assert found.effectiveness == 0


def test_progress_is_by_fit(digits):
    seen = []

    def track(fits):
        for rows, seed in fits:
            seen.append((len(digits[0][1][rows]), seed))
            yield rows, seed

    retention(*digits, np.arange(50), nearest, repeats=2, seed=2, track=track)
    assert seen == [(1200, 2), (50, 2), (50, 2), (50, 3), (50, 3)]


@pytest.mark.parametrize(("repeats", "paired"), [(2, 0.0), (5, 0.0), (5, 0.7), (10, 0.7)])
def test_a_selection_that_is_a_random_one_is_seldom_told_from_random(repeats, paired):
    """Draws of samples vary by 1, probes by ``paired``; the interval holds 0 at least as often as it says."""
    draw = np.random.default_rng(0)
    told, n = 0, 4000
    for _ in range(n):
        probes = paired * draw.normal(size=repeats)
        selected = tuple(50 + draw.normal() + probes)
        random = tuple(50 + draw.normal(size=repeats) + probes)
        _, low, high = Retention(50.0, selected, random, 0.9).difference()
        told += low > 0 or high < 0
    assert told / n <= 0.05 + 3 * (0.05 * 0.95 / n) ** 0.5
    assert paired or told / n >= 0.05 - 3 * (0.05 * 0.95 / n) ** 0.5


def test_the_difference_and_its_interval():
    mean, low, high = Retention(0.5, (0.4, 0.5), (0.2, 0.3), 0.9).difference(0.5)
    assert mean == pytest.approx(0.4)
    half = 1.0 * np.std([0.4, 0.6], ddof=1) * 1.5**0.5  # the quartile of Student's t of one degree of freedom is 1
    assert (low, high) == pytest.approx((0.4 - half, 0.4 + half))
    assert Retention(1.0, (0.5, 0.6), (0.3, 0.3), 0.9).difference()[1:] == (-np.inf, np.inf)
    with pytest.raises(ValueError, match="at least two repeats, but there are 1"):
        Retention(1.0, (0.5,), (0.3,), 0.9).difference()
    with pytest.raises(ValueError, match=r"`confidence` must be in \(0, 1\), but got 95"):
        Retention(1.0, (0.5, 0.6), (0.3, 0.4), 0.9).difference(95)


def test_selections_of_every_seed_are_a_comparison_of_the_selector(digits):
    train, test = digits
    drawn = [stratified_random(train[1], 0.05, seed) for seed in (3, 4, 5)]
    found = retention(train, test, drawn, nearest, repeats=3, seed=3)
    assert found.redrawn
    assert found.selected == found.random
    assert found.difference() == (0.0, -np.inf, np.inf)  # nothing is known of the spread of what never differs
    others = [np.arange(60 * i, 60 * i + 60) for i in range(3)]
    found = retention(train, test, others, nearest, repeats=3, seed=3)
    paired = (np.array(found.selected) - np.array(found.random)) / found.full
    interval = stats.ttest_1samp(paired, 0).confidence_interval()
    assert found.difference() == pytest.approx((paired.mean(), interval.low, interval.high))
    once, thrice = (retention(train, test, rows, nearest, repeats=3, seed=3) for rows in (others[0], [others[0]] * 3))
    assert once == thrice
    assert not once.redrawn
    with pytest.raises(ValueError, match="`indices` must be one selection or 3, but got 2"):
        retention(train, test, others[:2], nearest, repeats=3)


def test_the_verdict_on_a_selector_that_is_random_itself_is_seldom_wrong():
    draw = np.random.default_rng(0)
    told, n = 0, 4000
    for _ in range(n):
        selected, random = (tuple(50 + row) for row in draw.normal(size=(2, 5)))
        _, low, high = Retention(50.0, selected, random, 0.9, redrawn=True).difference()
        told += low > 0 or high < 0
    assert told / n == pytest.approx(0.05, abs=3 * (0.05 * 0.95 / n) ** 0.5)


def test_random_samples_of_a_regression_are_stratified_by_its_targets():
    from sklearn.neighbors import KNeighborsRegressor

    y = np.random.default_rng(0).random(400)
    x = y[:, None]
    seen = []

    def track(fits):
        for rows, seed in fits:
            seen.append(rows)
            yield rows, seed

    found = retention((x, y), (x, y), np.arange(40), lambda seed: KNeighborsRegressor(1), repeats=2, track=track)
    assert found.full == 1
    for rows in (seen[2], seen[4]):
        assert np.bincount(np.argsort(np.argsort(y))[rows] // 40).tolist() == [4] * 10


def test_random_samples_are_as_many_as_those_of_a_selection_smaller_than_the_classes(digits):
    seen = []

    def track(fits):
        for rows, seed in fits:
            seen.append(len(digits[0][1][rows]))
            yield rows, seed

    retention(*digits, np.arange(4), nearest, repeats=2, track=track)
    assert seen == [1200, 4, 4, 4, 4]


@pytest.mark.parametrize("indices", [[], [-1], [1200], [3, 3]])
def test_what_is_no_selection_is_refused(digits, indices):
    with pytest.raises(ValueError, match="Argument `indices` must be different numbers from 0 to 1199, at least one"):
        retention(*digits, np.array(indices, np.int64), nearest)
    with pytest.raises(ValueError, match="Argument `repeats` must be an integer >= 1, but got 0"):
        retention(*digits, np.arange(3), nearest, repeats=0)
