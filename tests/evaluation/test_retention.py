"""Accuracy retention, against slow and obvious twins."""

from fractions import Fraction

import numpy as np
import pytest

from curation.evaluation.retention import Retention, random_forest, retention, stratified_random

sklearn_datasets = pytest.importorskip("sklearn.datasets", reason="needs scikit-learn, from the [demo] extra")


def counts_twin(sizes, samples):
    """Exact shares, one sample after the other: a class first gets the floor of its share, then who misses most."""
    classes = range(len(sizes))
    share = [Fraction(samples * size, sum(sizes)) for size in sizes]
    counts = [max(1, int(s)) for s in share]
    while sum(counts) < samples:
        counts[max((c for c in classes if counts[c] < sizes[c]), key=lambda c: share[c] - counts[c])] += 1
    while sum(counts) > samples:
        counts[max((c for c in classes if counts[c] > 1), key=lambda c: counts[c] - share[c])] -= 1
    return counts


@pytest.mark.parametrize("seed", range(30))
def test_classes_are_as_frequent_as_in_all_and_none_is_missing(seed):
    draw = np.random.default_rng(seed)
    sizes = draw.integers(1, [4, 60, 1000][seed % 3], draw.integers(1, 12))
    y = draw.permutation(np.repeat(np.arange(len(sizes)) * 3 - 5, sizes))
    for budget in (0.01, 0.04, 0.3, 0.77, 1.0):
        rows = stratified_random(y, budget, seed)
        samples = max(round(budget * len(y)), len(sizes))
        assert rows.dtype == np.int64
        assert (np.diff(rows) > 0).all()
        found = [int((y[rows] == c).sum()) for c in np.unique(y)]
        assert sum(found) == samples
        share = samples * sizes / len(y)
        twin = counts_twin(sizes.tolist(), samples)
        np.testing.assert_allclose(np.sort(share - found), np.sort(share - twin), atol=1e-9)  # ties may go either way
        if share.min() >= 1:
            assert (np.abs(found - share) < 1).all()


def test_every_sample_of_a_class_is_equally_likely_and_the_seed_decides():
    y = np.array([0] * 6 + [1] * 3)
    taken = np.zeros(9)
    for seed in range(4000):
        rows = stratified_random(y, 1 / 3, seed)
        taken[rows] += 1
    assert taken / 4000 == pytest.approx(1 / 3, abs=0.03)  # four standard deviations
    assert stratified_random(y, 1 / 3, 7).tolist() == stratified_random(y, 1 / 3, 7).tolist()
    assert stratified_random(np.array(list("aab")), 1.0, 0).tolist() == [0, 1, 2]


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


@pytest.mark.parametrize("budget", [0, -0.1, 1.1, float("nan")])
def test_a_budget_out_of_range_is_refused(budget):
    with pytest.raises(ValueError, match=r"Argument `budget` must be in \(0, 1\], but got"):
        stratified_random(np.arange(4), budget, 0)


def test_no_labels_are_refused():
    with pytest.raises(ValueError, match="Argument `y` must hold labels, but got none"):
        stratified_random(np.zeros(0), 0.5, 0)


@pytest.mark.parametrize("indices", [[], [-1], [1200], [3, 3]])
def test_what_is_no_selection_is_refused(digits, indices):
    with pytest.raises(ValueError, match="Argument `indices` must be different numbers from 0 to 1199, at least one"):
        retention(*digits, np.array(indices, np.int64), nearest)
    with pytest.raises(ValueError, match="Argument `repeats` must be >= 1, but got 0"):
        retention(*digits, np.arange(3), nearest, repeats=0)
