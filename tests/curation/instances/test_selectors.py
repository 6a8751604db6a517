import pickle
import warnings
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.datasets import load_digits, make_blobs
from sklearn.ensemble import RandomForestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks

from curation.instances import (
    CoverageInstanceSelector,
    EditedNearestNeighboursFilter,
    GraphAttentionInstanceSelector,
    StratifiedRandomSelector,
    attention,
)
from curation.instances.selector import class_budgets

FAST = {"n_graphs": 2, "epochs": 1}
BUDGETED = [
    StratifiedRandomSelector(random_state=0),
    CoverageInstanceSelector(random_state=0),
    GraphAttentionInstanceSelector(random_state=0, **FAST),
]
ALL = [*BUDGETED, EditedNearestNeighboursFilter(random_state=0)]
each = pytest.mark.parametrize("selector", ALL, ids=lambda s: type(s).__name__)
each_budgeted = pytest.mark.parametrize("selector", BUDGETED, ids=lambda s: type(s).__name__)


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """What is tested here, but for the graphs, does not depend on how good a network is."""
    monkeypatch.setattr(attention, "STEPS", 5)


@pytest.fixture(scope="module")
def digits():
    return load_digits(return_X_y=True)


@parametrize_with_checks(ALL)
def test_conventions_of_scikit_learn(estimator, check):
    check(estimator)


@each
def test_the_same_seed_gives_the_same_indices(selector, digits):
    one, same, other = (clone(selector).set_params(random_state=s).fit(*digits) for s in (3, 3, 4))
    assert one.sample_indices_.tolist() == same.sample_indices_.tolist()
    if isinstance(selector, StratifiedRandomSelector):  # few samples are hashed into one bucket
        assert one.sample_indices_.tolist() != other.sample_indices_.tolist()


@each
def test_global_random_streams_are_left_alone(selector, digits):
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    clone(selector).fit(*digits)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()


@each
def test_what_is_known_after_a_fit(selector, digits):
    X, y = digits
    s = pickle.loads(pickle.dumps(clone(selector).fit(X, y)))
    assert s.sample_indices_.dtype == s.ranking_.dtype == np.int64
    assert (np.diff(s.sample_indices_) > 0).all()
    assert sorted(s.ranking_) == s.sample_indices_.tolist()
    assert s.scores_.dtype == np.float32
    assert s.scores_.shape == (len(X),)
    assert s.get_support().nonzero()[0].tolist() == s.get_support(indices=True).tolist() == s.sample_indices_.tolist()
    assert s.report_["kept"] == len(s.ranking_) == sum(s.report_["kept_per_class"].values())
    assert s.report_["reduction"] == 1 - len(s.ranking_) / len(X)


@each_budgeted
def test_every_class_has_its_share_and_so_has_every_beginning(selector, digits):
    X, y = digits
    rare = np.concatenate([np.flatnonzero(y > 0), np.flatnonzero(y == 0)[:2]])
    s = clone(selector).fit(X[rare], y[rare])
    assert len(s.sample_indices_) == round(0.04 * len(rare))
    assert s.report_["kept_per_class"][0] == 1
    common = y[rare][s.ranking_][y[rare][s.ranking_] > 0]
    counts = [np.bincount(common[:m], minlength=10)[1:] for m in (18, 36)]
    assert all(c.max() - c.min() <= 2 for c in counts)


@pytest.mark.parametrize("selector", BUDGETED[:2], ids=lambda s: type(s).__name__)
def test_the_beginning_of_a_ranking_is_the_selection_of_a_smaller_budget(selector):
    X, y = make_blobs(900, 5, centers=3, random_state=0)
    s = clone(selector).set_params(random_state=0, budget=0.1)
    if isinstance(s, CoverageInstanceSelector):
        s.set_params(n_neighbors=10)
    large, small = (clone(s).set_params(budget=b).fit(X, y) for b in (0.1, 0.05))
    assert set(large.ranking_[:45]) == set(small.sample_indices_)


@each
@pytest.mark.parametrize("kind", ["tensor", "bf16", "frame", "memmap", "list", "strings", "column"])
def test_kinds_of_data(selector, kind, digits, tmp_path):
    X, y = digits[0][:300], digits[1][:300]
    expected = clone(selector).fit(X, y).sample_indices_
    if kind in ("tensor", "bf16"):  # grey values up to 16 are exact in bf16
        given = torch.from_numpy(X).to(torch.float32 if kind == "tensor" else torch.bfloat16), torch.from_numpy(y)
    elif kind == "frame":
        given = pd.DataFrame(X, columns=[f"f{i}" for i in range(64)]), pd.Series(y)
    elif kind == "memmap":
        mapped = np.memmap(tmp_path / "x", X.dtype, "w+", shape=X.shape)
        mapped[:] = X
        given = mapped, y
    elif kind == "list":
        given = X.tolist(), y.tolist()
    elif kind == "strings":
        given = X, np.array([f"class {c}" for c in y])
    else:
        datasets = pytest.importorskip("datasets", reason="needs datasets")
        columns = datasets.Dataset.from_dict({"x": X.tolist(), "y": y.tolist()}).with_format("numpy")
        given = columns["x"][:], columns["y"][:]
    s = clone(selector)
    rows, classes = s.fit_resample(*given)
    assert s.sample_indices_.tolist() == expected.tolist()
    assert type(rows) in (type(given[0]), np.ndarray)
    assert len(rows) == len(classes) == len(expected)


@each
def test_in_a_pipeline_of_imbalanced_learn(selector, digits):
    pipeline = pytest.importorskip("imblearn.pipeline", reason="needs imbalanced-learn").make_pipeline
    X, y = digits
    model = pipeline(
        EditedNearestNeighboursFilter(random_state=0), clone(selector), RandomForestClassifier(20, random_state=0)
    )
    assert model.fit(X[:1200], y[:1200]).score(X[1200:], y[1200:]) > 0.6
    with pytest.raises(TypeError):
        make_pipeline(clone(selector), RandomForestClassifier()).fit(X, y)  # scikit-learn's own changes no rows


@each
@pytest.mark.parametrize(
    ("X", "y"),
    [
        (np.zeros((40, 3)), np.arange(40) % 2),
        (np.tile(np.arange(8.0)[:, None], (5, 2)), np.tile(np.arange(8), 5) % 2),
        (np.column_stack([np.arange(40.0), np.full(40, 1e6)]), np.arange(40) % 2),
        (np.arange(40.0)[:, None] * 1e30, np.arange(40) % 2),
        (np.arange(40.0)[:, None], np.zeros(40, int)),
        (np.arange(4.0)[:, None], np.array([0, 0, 1, 1])),
        (np.arange(4.0)[:, None], np.arange(4)),
        (np.ones((1, 1)), np.zeros(1)),
    ],
    ids=["constant", "duplicates", "one constant", "huge", "one class", "N < k", "one each", "one sample"],
)
def test_awkward_data(selector, X, y):
    s = clone(selector).fit(X, y)
    assert set(y[s.sample_indices_]) == set(y)
    assert np.isfinite(s.scores_).all()


EXACT = [CoverageInstanceSelector(0.1, random_state=0), EditedNearestNeighboursFilter(random_state=0)]


@pytest.mark.parametrize("selector", EXACT, ids=lambda s: s.__class__.__name__)
@pytest.mark.parametrize("kind", ["f4", "f8", "i8", "M8[ns]"])
@settings(max_examples=15)
@given(offset=st.integers(0, 3), power=st.integers(0, 3))
def test_a_common_offset_changes_nothing(selector, kind, offset, power):
    """Whole numbers with an offset that is exact in the kind, up to dates in nanoseconds."""
    X = np.random.default_rng(0).integers(-500, 500, (120, 3)) * 10**power
    y = np.arange(120) % 2
    largest = {"f4": 2**23, "f8": 2**52, "i8": 2**62, "M8[ns]": 1_700_000_000_000_000_000}[kind]
    moved = X + np.array([0, largest - 10**6, -largest + 10**6]) * offset // 3
    given_x = moved.astype(kind)
    assert np.array_equal(given_x.astype(np.int64), moved)
    expected = clone(selector).fit(X.astype(np.float64), y)
    got = clone(selector).fit(given_x, y)
    assert got.sample_indices_.tolist() == expected.sample_indices_.tolist()


def test_dates_in_frames_are_features_and_missing_ones_are_refused():
    days = pd.date_range("2026-01-01", periods=40, freq="s")
    frame = pd.DataFrame({"begin": days, "end": days + pd.Timedelta("3s")})
    y = np.arange(40) % 2
    s = CoverageInstanceSelector(0.1, random_state=0)
    expected = clone(s).fit(np.arange(40.0)[:, None].repeat(2, 1), y).sample_indices_
    assert clone(s).fit(frame, y).sample_indices_.tolist() == expected.tolist()
    frame.loc[3, "begin"] = pd.NaT
    with pytest.raises(ValueError, match="NaT"):
        clone(s).fit(frame.to_numpy(), y)


def test_a_feature_that_is_constant_but_for_rounding_counts_for_nothing():
    x = np.random.default_rng(0).random((60, 2), np.float32)
    y = np.arange(60) % 2
    s = CoverageInstanceSelector(0.1, random_state=0)
    for dtype in (np.float32, np.float64):
        noise = 1 + np.random.default_rng(1).integers(0, 2, (60, 1)) * np.finfo(dtype).eps
        with_noise, with_zeros = (np.hstack([x.astype(dtype), c.astype(dtype)]) for c in (noise, noise * 0))
        assert clone(s).fit(with_noise, y).ranking_.tolist() == clone(s).fit(with_zeros, y).ranking_.tolist()


ANY_TARGETS = [StratifiedRandomSelector(random_state=0), CoverageInstanceSelector(random_state=0)]
each_of_any_targets = pytest.mark.parametrize("selector", ANY_TARGETS, ids=lambda s: type(s).__name__)


@each_of_any_targets
@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 300), st.floats(0.001, 1), st.sampled_from(["none", "numbers", "ties", "whole"]), st.integers(0, 9)
)
def test_numbers_and_unlabelled_samples_keep_the_budget_exactly(selector, n, budget, kind, seed):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, 2))
    values = {"none": None, "numbers": rng.normal(size=n), "ties": np.full(n, 0.5), "whole": rng.integers(0, 90, n)}
    s = clone(selector).set_params(budget=budget, targets="numbers" if kind == "whole" else "auto")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        s.fit(X, values[kind])
    assert len(s.sample_indices_) == len(set(s.ranking_)) == s.report_["kept"] == max(round(budget * n), 1)


@each_of_any_targets
def test_every_stratum_of_the_targets_has_its_share(selector):
    rng = np.random.default_rng(0)
    y = rng.exponential(size=400)
    X = np.column_stack([rng.normal(size=400), y])
    s = clone(selector).set_params(budget=0.1).fit(X, y)
    tenth = np.argsort(np.argsort(y)) // 40
    assert np.bincount(tenth[s.sample_indices_]).tolist() == [4] * 10
    assert s.report_["kept_per_class"] == dict.fromkeys(range(10), 4)
    few = clone(selector).set_params(budget=3 / 400).fit(X, y).sample_indices_
    assert sorted(np.argsort(np.argsort(y))[few] * 3 // 400) == [0, 1, 2]


def test_unlabelled_samples_are_covered_as_those_of_one_class(digits):
    s = CoverageInstanceSelector(0.1, random_state=0)
    alone, one = clone(s).fit(digits[0]), clone(s).fit(digits[0], np.zeros(len(digits[0]), int))
    assert alone.ranking_.tolist() == one.ranking_.tolist()
    rows, targets = clone(s).fit_resample(digits[0])
    assert targets is None
    np.testing.assert_array_equal(rows, digits[0][alone.sample_indices_])
    y = np.linspace(0, 1, len(digits[0]))
    rows, targets = clone(s).fit_resample(digits[0], y)
    assert np.isin(targets, y).all()
    assert len(rows) == len(targets) == round(0.1 * len(y))


def test_numbers_are_taken_for_what_is_asked_for():
    rng = np.random.default_rng(0)
    X, ages = rng.normal(size=(200, 2)), rng.integers(20, 30, 200).astype(float)
    s = CoverageInstanceSelector(0.1, random_state=0)
    assert set(clone(s).fit(X, ages).classes_) == set(ages)
    assert clone(s).set_params(targets="numbers").fit(X, ages).classes_.tolist() == list(range(10))
    with pytest.raises(ValueError, match="Unknown label type: continuous"):
        clone(s).set_params(targets="classes").fit(X, ages + 0.5 * rng.random(200))
    with pytest.raises(ValueError, match=r"`targets` must be 'auto' or 'classes' for .*, but got 'numbers'"):
        clone(s).set_params(targets="numbers").fit(X, np.repeat(["young", "old"], 100))


@pytest.mark.parametrize("selector", [ALL[2], ALL[3]], ids=lambda s: type(s).__name__)
def test_selectors_that_learn_classes_need_them(selector):
    X = np.random.default_rng(0).normal(size=(40, 2))
    with pytest.raises(ValueError, match="requires y to be passed, but the target y is None"):
        clone(selector).fit(X)
    with pytest.raises(ValueError, match="Unknown label type: continuous"):
        clone(selector).fit(X, X[:, 0])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=3, max_size=12), st.floats(0.02, 1), st.integers(0, 99))
def test_copies_stay_when_all_that_differ_do_and_evenly(counts, budget, seed):
    rng = np.random.default_rng(seed)
    point_of = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    X = rng.normal(size=(len(counts), 4))[point_of]
    s = CoverageInstanceSelector(budget, random_state=0).fit(X, np.zeros(len(X), int))
    kept = np.bincount(point_of[s.sample_indices_], minlength=len(counts))
    assert kept.sum() == max(round(budget * len(X)), 1)
    assert (kept >= np.minimum(counts, kept.max() - 1)).all()
    assert len(set(point_of[s.ranking_[: len(counts)]])) == min(len(counts), len(s.ranking_))


def test_copies_weigh_what_they_weigh_together():
    X = np.array([[0.0], [1.0], [1.0], [1.0], [5.0]])
    s = CoverageInstanceSelector(0.2, random_state=0).fit(X, np.zeros(5, int))
    assert s.sample_indices_.tolist() == [1]


def test_more_classes_than_the_budget_has_samples_are_said():
    rng = np.random.default_rng(0)
    ages = rng.integers(0, 90, 400).astype(float)
    for selector in BUDGETED:
        s = clone(selector).set_params(budget=0.1)
        with pytest.warns(UserWarning, match=r"`budget` of 0.1 asks for 40 of 400 samples, but \d+ stay"):
            s.fit(rng.normal(size=(400, 3)), ages)
        assert len(s.sample_indices_) == len(set(ages))


@each
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(selector, bad, digits):
    X, y = digits[0].copy(), digits[1]
    X[3, 5] = bad
    with pytest.raises(ValueError, match=r"NaN|infinity"):
        clone(selector).fit(X, y)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": 0}, r"Argument `budget` must be in \(0, 1\], but got 0"),
        ({"budget": 1.5}, r"`budget` .* got 1.5"),
        ({"budget": True}, r"`budget` .* got True"),
        ({"budget": "4 %"}, r"`budget` .* got '4 %'"),
        ({"sampling_strategy": "auto"}, "`sampling_strategy` must be 'proportional', .* but got 'auto'"),
        ({"sampling_strategy": {99: 3}}, "`sampling_strategy` must name classes of `y`, but got 99"),
        ({"sampling_strategy": {1: 10**6}}, "`sampling_strategy` must ask for 1 to 182 of class 1, but got 1000000"),
        ({"sampling_strategy": {1: float("nan")}}, "must ask for 1 to 182 of class 1, but got nan"),
        ({"sampling_strategy": {1: float("inf")}}, "must ask for 1 to 182 of class 1, but got inf"),
        ({"sampling_strategy": {1: "all"}}, "must ask for 1 to 182 of class 1, but got 'all'"),
        ({"graph": "knn"}, "Argument `graph` must be 'multiview', .* or 'exact', but got 'knn'"),
        ({"criterion": "loss"}, "`criterion` .* 'loss'"),
        ({"select": "best"}, "`select` .* 'best'"),
        ({"n_neighbors": 0}, "`n_neighbors` must be an integer >= 1, but got 0"),
        ({"n_graphs": 1.5}, "`n_graphs` .* 1.5"),
        ({"edge_dropout": 1}, r"`edge_dropout` must be in \[0, 1\), but got 1"),
        ({"distance_quantile": 0}, r"`distance_quantile` must be in \(0, 1\], but got 0"),
        ({"lr": -1}, r"`lr` must be in \(0, inf\), but got -1"),
    ],
)
def test_a_bad_argument_is_named_with_its_value(changes, message, digits):
    with pytest.raises(ValueError, match=message):
        GraphAttentionInstanceSelector(**changes).fit(*digits)


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


@settings(max_examples=200, deadline=None)
@example([1, 1, 12], 0.25, "proportional")
@given(
    st.lists(st.integers(1, 200), min_size=1, max_size=8),
    st.floats(0.001, 1),
    st.sampled_from(["proportional", "equal"]),
)
def test_budgets_of_classes(counts, budget, strategy):
    y = np.repeat(np.arange(len(counts)), counts)
    got = class_budgets(y, budget, strategy, np.arange(len(counts)))
    assert got.sum() == max(round(budget * len(y)), len(counts))
    assert (got >= 1).all()
    assert (got <= counts).all()
    if strategy == "proportional":
        share = got.sum() * np.array(counts) / len(y)
        twin = counts_twin(counts, got.sum())
        np.testing.assert_allclose(np.sort(share - got), np.sort(share - twin), atol=1e-9)  # ties may go either way
        ideal = np.array(counts) * got.sum() / len(y)
        free = (got > 1) & (got < counts)  # what the others must have, these have less, all alike
        assert not free.any() or np.ptp((got - ideal)[free]) <= 1 + 1e-9
    else:
        full = got == counts
        assert full.all() or np.ptp(got[~full]) <= 1
        assert not full.any() or full.all() or got[full].max() <= got[~full].max() + 1


@each_budgeted
def test_of_the_smallest_budget_one_of_each_class_stays(selector, digits):
    kept = clone(selector).set_params(budget=5e-324).fit(*digits).report_["kept_per_class"]
    assert kept == dict.fromkeys(range(10), 1)


def test_counts_by_class(digits):
    X, y = digits
    s = CoverageInstanceSelector(sampling_strategy={3: 7, 5: 1}, random_state=0).fit(X, y)
    kept = s.report_["kept_per_class"]
    assert (kept[3], kept[5], kept[4]) == (7, 1, (y == 4).sum())


@pytest.mark.parametrize("graph", ["multiview", "multilevel", "lsh", "minibatch", "hnsw", "exact"])
def test_every_graph_tells_the_classes_out_of_fold(graph, digits, monkeypatch):
    monkeypatch.setattr(attention, "STEPS", 200)
    s = GraphAttentionInstanceSelector(graph=graph, epochs=3, random_state=0).fit(*digits)
    assert (s.margin_ > 0).mean() > (0.65 if graph in ("minibatch", "multilevel") else 0.85)
    assert s.attention_.sum() == pytest.approx((1 - 1 / 11) * len(s.attention_), rel=0.2)


def test_how_scores_select(digits):
    X, y = digits
    fitted = {
        how: GraphAttentionInstanceSelector(criterion="attention", select=how, random_state=0, **FAST).fit(X, y)
        for how in ("rank", "threshold", "coverage")
    }
    scores = fitted["rank"].attention_
    for c in range(10):
        of_class = np.flatnonzero(y == c)
        kept = [i for i in fitted["rank"].sample_indices_ if y[i] == c]
        assert scores[kept].min() >= np.sort(scores[of_class])[-len(kept)]
    cut = np.sort(scores)[-72]
    assert (scores[fitted["threshold"].sample_indices_] >= cut).mean() >= 62 / 72  # but for the best of each class
    assert all((a > b) or (a == b) for a, b in pairwise(scores[fitted["threshold"].ranking_]))
    assert fitted["coverage"].sample_indices_.tolist() != fitted["rank"].sample_indices_.tolist()


def test_a_filter_finds_labels_that_are_wrong():
    X, y = make_blobs(600, 5, centers=4, cluster_std=1.0, random_state=1)
    wrong = np.random.default_rng(0).random(600) < 0.15
    noisy = np.where(wrong, (y + 1) % 4, y)
    kept = EditedNearestNeighboursFilter(random_state=0).fit(X, noisy).get_support()
    assert wrong[kept].mean() < 0.02
    assert kept[~wrong].mean() > 0.98


def test_by_chance_every_sample_of_a_class_is_equally_likely_and_the_seed_decides():
    y = np.array([0] * 6 + [1] * 3)
    taken = np.zeros(9)
    for seed in range(1000):
        taken[StratifiedRandomSelector(1 / 3, random_state=seed).fit(y[:, None], y).sample_indices_] += 1
    assert taken / 1000 == pytest.approx(1 / 3, abs=0.06)  # four standard deviations
    again = [StratifiedRandomSelector(1 / 3, random_state=7).fit(y[:, None], y).sample_indices_ for _ in range(2)]
    assert np.array_equal(*again)


@each
def test_values_that_fp32_cannot_square_are_refused(selector):
    X, y = make_blobs(60, random_state=0)
    with pytest.raises(ValueError, match=r"Argument `X` must hold values of at most 1e35, .* but has 6"):
        clone(selector).fit(X * 1e36, y)


def test_coverage_is_better_than_chance_where_clusters_are_uneven():
    rng = np.random.default_rng(0)
    X = np.concatenate([rng.normal(0, 0.1, (460, 2)), rng.normal(9, 0.1, (20, 2)), rng.normal(-9, 0.1, (20, 2))])
    kept = CoverageInstanceSelector(budget=0.06, random_state=0).fit(X, np.zeros(500)).sample_indices_
    assert (kept < 460).any()
    assert ((kept >= 460) & (kept < 480)).any()
    assert (kept >= 480).any()


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    import sys

    for name in [m for m in sys.modules if m.startswith("sklearn") or m.startswith("curation.instances.selector")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.base", None)
    import curation.instances

    with pytest.raises(ImportError, match=r"lightning-curation\[select\]"):
        curation.instances.CoverageInstanceSelector  # noqa: B018


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "selector",
    [
        CoverageInstanceSelector(0.1, random_state=0),
        EditedNearestNeighboursFilter(random_state=0),
        GraphAttentionInstanceSelector(0.1, random_state=0),
        *(GraphAttentionInstanceSelector(0.1, random_state=0, graph=g) for g in ("multilevel", "lsh", "minibatch")),
    ],
    ids=lambda s: s.__class__.__name__,
)
def test_a_gpu_keeps_what_the_cpu_keeps(selector):
    draw = np.random.default_rng(0)
    y = np.arange(600) % 3
    x = draw.normal(size=(600, 6)) + 2 * y[:, None]
    here = clone(selector).fit(x, y).sample_indices_
    there = clone(selector).set_params(device="cuda").fit(x, y).sample_indices_
    assert abs(len(there) - len(here)) <= 6
    assert np.isin(there, here).mean() > (0.3 if hasattr(selector, "n_graphs") else 0.9)
