"""Best ranks against a sort of all similarities, budgets in rows and tokens, and what is refused."""

import math
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import Classifier, data, trainer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from curation.callbacks import InstanceSelection
from curation.instances import FeatureShards, TargetedSelector, targeted
from curation.instances.targeted import best_ranks, examples_by_weight


def twin(pool, examples, agree=1):
    """Best rank of each row, from 1, or the k-th best, and mean similarity; fp64."""
    pool, examples = (x.astype(np.float64) for x in (pool, examples))
    similarities = (
        examples / np.linalg.norm(examples, axis=1)[:, None] @ (pool / np.linalg.norm(pool, axis=1)[:, None]).T
    )
    ranks = np.empty(similarities.shape, int)
    for row, order in zip(ranks, np.argsort(-similarities, axis=1, kind="stable"), strict=True):
        row[order] = np.arange(1, len(pool) + 1)
    return np.sort(ranks, 0)[agree - 1], similarities.mean(0)


def drawn(n, m, d, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)).astype(np.float32), rng.standard_normal((m, d)).astype(np.float32)


@pytest.fixture(params=["float32", "bfloat16"])
def screened_in(request, monkeypatch):
    monkeypatch.setattr(targeted, "_faster", lambda _: getattr(torch, request.param))


@pytest.mark.parametrize(
    ("n", "m", "d", "depth"), [(1, 1, 1, 1), (50, 3, 4, 50), (3000, 20, 16, 200), (900, 70, 5, 3)]
)
@pytest.mark.parametrize("cells", [16, 1 << 12])
def test_ranks_are_those_of_a_sort(n, m, d, depth, cells, screened_in, monkeypatch):
    monkeypatch.setattr(targeted, "CELLS", cells)
    monkeypatch.setattr(targeted, "CACHED", 64)
    pool, examples = drawn(n, m, d)
    best, mean = best_ranks(pool, examples, depth)
    expected, means = twin(pool, examples)
    assert best.tolist() == np.where(expected <= depth, expected, 0).tolist()
    np.testing.assert_allclose(mean, means, atol=1e-6)


def test_rows_that_get_nearer_and_nearer(screened_in, monkeypatch):
    """Each displaces the one before: floors have to rise for little to be remembered."""
    monkeypatch.setattr(targeted, "CELLS", 64)
    angles = np.linspace(1, 0.1, 500)
    pool = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    best, _ = best_ranks(pool, np.array([[1, 0]], np.float32), 20)
    assert best.tolist() == [0] * 480 + list(range(20, 0, -1))


def test_equal_rows_are_ranked_in_their_order(screened_in):
    pool = np.tile(np.array([[1, 0], [0, 1]], np.float32), (8, 1))
    best, _ = best_ranks(pool, np.array([[1, 0]], np.float32), 10)
    assert best[::2].tolist() == list(range(1, 9))
    assert best[1::2].tolist() == [9, 10, 0, 0, 0, 0, 0, 0]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 200), st.integers(1, 12), st.integers(0, 2**20), st.floats(0.02, 1.0), st.floats(0.0, 1.0))
def test_what_stays_is_first_by_best_rank_and_mean(n, m, seed, budget, share):
    pool, examples = drawn(n, m, 6, seed)
    agree = 1 + int(share * (m - 1))
    best, mean = twin(pool, examples, agree)
    order = np.lexsort((np.arange(n), -mean, best))
    selector = TargetedSelector(budget, targets=examples, agree=agree).fit(pool)
    kept = max(1, round(budget * n))
    assert selector.ranking_.tolist() == order[:kept].tolist()
    assert selector.sample_indices_.tolist() == sorted(order[:kept])
    scores = selector.scores_
    assert (scores[selector.ranking_] == -best[selector.ranking_]).all()
    assert selector.report_["kept"] == kept


def test_examples_that_are_alike_look_deeper():
    pool, _ = drawn(2000, 1, 8)
    examples = np.tile(pool[:1], (50, 1))
    selector = TargetedSelector(0.5, targets=examples).fit(pool)
    assert selector.ranking_.tolist() == np.argsort(-twin(pool, examples[:1])[1], kind="stable")[:1000].tolist()
    assert selector.report_["depth"] >= 1000


def test_a_budget_of_tokens():
    pool, examples = drawn(300, 5, 8)
    lengths = np.random.default_rng(1).integers(1, 100, 300)
    selector = TargetedSelector(0.2, targets=examples, lengths=lengths).fit(pool)
    spent = lengths[selector.ranking_].sum()
    rows = TargetedSelector(1.0, targets=examples).fit(pool).ranking_
    assert selector.ranking_.tolist() == rows[: len(selector.ranking_)].tolist()
    assert spent <= 0.2 * lengths.sum() < spent + lengths[rows[len(selector.ranking_)]]


def test_tasks_have_as_many_examples():
    pool, examples = drawn(400, 40, 8)
    tasks = {"long": examples[:30], "short": examples[30:]}
    selector = TargetedSelector(0.1, targets=tasks, random_state=3).fit(pool)
    assert selector.report_["examples"] == 20
    rng = np.random.default_rng(np.random.RandomState(3).randint(2**31 - 1))
    both = np.concatenate([examples[:30][np.sort(rng.permutation(30)[:10])], examples[30:]])
    assert selector.ranking_.tolist() == TargetedSelector(0.1, targets=both).fit(pool).ranking_.tolist()


@given(st.lists(st.tuples(st.integers(1, 200), st.integers(1, 9)), min_size=1, max_size=5))
def test_weights_set_the_share_of_the_examples(tasks):
    sizes, weights = zip(*tasks, strict=True)
    scale = min(Fraction(size, weight) for size, weight in tasks)
    expected = [max(1, math.floor(scale * weight)) for weight in weights]
    assert examples_by_weight(list(sizes), weights) == expected
    assert examples_by_weight(list(sizes)) == [min(sizes)] * len(sizes)
    assert any(count == size for count, size in zip(expected, sizes, strict=True))


def test_a_task_of_three_times_the_weight_keeps_three_times_the_rows():
    pool, examples = drawn(4000, 120, 8)
    pool[:2000, 0] += 20
    pool[2000:, 0] -= 20
    examples[:60, 0] += 20
    examples[60:, 0] -= 20
    tasks = {"first": examples[:60], "second": examples[60:]}
    selector = TargetedSelector(0.1, targets=tasks, weights=[3, 1]).fit(pool)
    assert selector.report_["examples"] == 80
    assert (selector.sample_indices_ < 2000).mean() == pytest.approx(0.75, abs=0.04)
    kept = TargetedSelector(0.1, targets=tasks).fit(pool).sample_indices_
    assert (kept < 2000).mean() == pytest.approx(0.5, abs=0.04)


def test_of_a_large_pool_a_sample_is_ranked_and_a_classifier_scores_all():
    from sklearn.linear_model import LogisticRegression

    pool, examples = drawn(600, 8, 5)
    pool[::3] += examples.mean(0) * 4
    out = np.random.default_rng(1).random(600) < 0.2
    selector = TargetedSelector(0.2, targets=examples, exclude=out, sample=200, agree=2).fit(pool)

    draw = np.random.default_rng((np.random.RandomState(0).randint(2**31 - 1), 1))
    rows = np.sort(draw.choice(np.flatnonzero(~out), 200, replace=False, shuffle=False))
    best, mean = twin(pool[rows], examples, agree=2)
    order = rows[np.lexsort((rows, -mean, best))]
    near, far = draw.permutation(order[:20]), draw.permutation(np.sort(order[20:]))[:60]
    unit = pool / np.linalg.norm(pool, axis=1, keepdims=True)
    model = LogisticRegression(C=targeted.STRENGTH / 80, max_iter=1000)
    model.fit(unit[np.r_[np.sort(near), np.sort(far)]], np.arange(80) < 20)
    expected = np.where(out, -np.inf, model.decision_function(unit))
    np.testing.assert_allclose(selector.scores_, expected, rtol=1e-4, atol=1e-4)
    assert set(selector.sample_indices_) == set(np.argsort(-expected)[: round(0.2 * (~out).sum())])
    assert (np.diff(selector.scores_[selector.ranking_]) <= 0).all()
    assert selector.report_["trained"] == 80


def test_the_classifier_keeps_what_the_ranking_keeps_of_text_of_two_kinds(tmp_path, monkeypatch):
    monkeypatch.setattr(targeted, "BLOCK", 300)
    pool, examples = drawn(5000, 30, 16)
    pool[:500, :2] += 8
    examples[:, :2] += 8
    whole = TargetedSelector(0.1, targets=examples).fit(pool)
    assert "trained" not in whole.report_
    part = TargetedSelector(0.1, targets=examples, sample=1000).fit(pool)
    assert np.isin(part.sample_indices_, whole.sample_indices_).mean() > 0.95
    flat = pa.FixedSizeListArray.from_arrays(pa.array(pool.ravel()), 16)
    pq.write_table(pa.table({"features": flat}), tmp_path / "a.parquet", row_group_size=700)
    streamed = TargetedSelector(0.1, targets=examples, sample=1000).fit(FeatureShards(tmp_path))
    assert streamed.ranking_.tolist() == part.ranking_.tolist()


def test_classifiers_learn_from_as_many_rows_as_are_enough(monkeypatch):
    monkeypatch.setattr(targeted, "TRAINED", 40)
    pool, examples = drawn(2000, 5, 4)
    assert TargetedSelector(0.1, targets=examples, sample=1000).fit(pool).report_["trained"] == 160


@pytest.mark.parametrize("kind", ["array", "half", "tensor", "memory map", "list"])
def test_pools_of_every_kind(kind, tmp_path):
    pool, examples = drawn(200, 6, 8)
    np.save(tmp_path / "pool.npy", pool)
    np.save(tmp_path / "targets.npy", examples)
    made = {
        "array": pool,
        "half": pool.astype(np.float16),
        "tensor": torch.from_numpy(pool),
        "memory map": np.load(tmp_path / "pool.npy", mmap_mode="r"),
        "list": pool.tolist(),
    }[kind]
    expected = twin(np.asarray(made, np.float32), examples)[0]
    selector = TargetedSelector(0.1, targets=str(tmp_path / "targets.npy")).fit(made)
    assert (expected[selector.ranking_] <= np.sort(expected)[19]).all()


@pytest.mark.parametrize(
    ("options", "pool", "message"),
    [
        ({}, [[1.0, 0.0]], "`targets` must be the features of examples"),
        ({"targets": [[1.0, 0.0]], "losses": [[1.0], [0.5]]}, [[1.0, 0.0]], "or else `losses`"),
        ({"losses": [[1.0], [0.5]], "agree": 2}, [[1.0, 0.0]], "`agree` must be 1 with `losses`, but got 2"),
        ({"losses": [[1.0, 2.0]]}, [[1.0, 0.0]], r"`losses` must be finite numbers \[2, 1\], but is \[1, 2\]"),
        ({"losses": [[1.0], [np.nan]]}, [[1.0, 0.0]], r"`losses` must be finite .* with 1 that are not finite"),
        ({"targets": [[1.0, 0.0]], "exclude": [True]}, [[1.0, 0.0]], r"must be bool \[1\] and not all True"),
        ({"targets": [[1.0, 0.0]], "exclude": [0]}, [[1.0, 0.0]], r"`exclude` must be bool \[1\] .* is int64"),
        ({"targets": np.ones((3, 2)), "sample": 20}, np.ones((21, 2)), "`sample` must be at least ten times the 3"),
        ({"targets": [[1.0, 0.0]], "weights": [1, 2]}, [[1.0, 0.0]], "`weights` must be .* for each of 1 tasks"),
        ({"targets": [[1.0, 0.0]], "weights": [0]}, [[1.0, 0.0]], r"finite number > 0 .* but got \[0\]"),
        ({"targets": [[1.0, 0.0]], "weights": [np.inf]}, [[1.0, 0.0]], "finite number > 0"),
        ({"targets": {}}, [[1.0, 0.0]], "`targets` must have a task"),
        ({"targets": [[1.0]]}, [[1.0, 0.0]], r"`targets` must be \[M, 2\].*is \[1, 1\]"),
        ({"targets": [1.0, 0.0]}, [[1.0, 0.0]], r"`targets` must be \[M, 2\].*is \[2\]"),
        ({"targets": {"maths": [[1.0, 0.0]], "empty": np.zeros((0, 2))}}, [[1.0, 0.0]], r"`targets\['empty'\]` must"),
        ({"targets": [[1.0, 0.0], [0.0, 0.0]]}, [[1.0, 0.0]], "row 1 is not"),
        ({"targets": [[np.nan, 0.0]]}, [[1.0, 0.0]], "row 0 is not"),
        ({"targets": "nowhere.npy"}, [[1.0, 0.0]], "there is no 'nowhere.npy'"),
        ({"targets": [[1.0, 0.0]]}, [[1.0, 0.0], [np.inf, 0.0]], "but row 1 is not"),
        ({"targets": [[1.0, 0.0]]}, np.zeros((0, 2)), r"`X` must be \[N, D\]"),
        ({"targets": [[1.0, 0.0]], "budget": 0.0}, [[1.0, 0.0]], "`budget` must be in"),
        ({"targets": [[1.0, 0.0]], "budget": 1.5}, [[1.0, 0.0]], "`budget` must be in"),
        ({"targets": [[1.0, 0.0]], "agree": 0}, [[1.0, 0.0]], "`agree` must be"),
        ({"targets": [[1.0, 0.0]], "agree": 2}, [[1.0, 0.0]], r"`agree` must be in \[1, 1 examples\], but got 2"),
        ({"targets": [[1.0, 0.0]], "lengths": [1, 2]}, [[1.0, 0.0]], "`lengths` must be integers"),
        ({"targets": [[1.0, 0.0]], "lengths": [0]}, [[1.0, 0.0]], "not all 0"),
    ],
)  # fmt: skip
def test_bad_input_is_named(options, pool, message):
    with pytest.raises(ValueError, match=message):
        TargetedSelector(**options).fit(pool)


def test_one_example_and_more_examples_than_rows():
    pool, examples = drawn(20, 60, 4)
    assert (
        TargetedSelector(0.25, targets=examples[:1]).fit(pool).ranking_.tolist()
        == np.argsort(-twin(pool, examples[:1])[1], kind="stable")[:5].tolist()
    )
    best, mean = twin(pool, examples)
    expected = np.lexsort((np.arange(20), -mean, best))[:5]
    assert TargetedSelector(0.25, targets=examples).fit(pool).ranking_.tolist() == expected.tolist()


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 200), st.integers(1, 12), st.integers(0, 2**20), st.floats(0.02, 1.0), st.booleans())
def test_excluded_rows_are_as_if_they_were_not_there(n, m, seed, budget, tokens):
    pool, examples = drawn(n, m, 6, seed)
    rng = np.random.default_rng(seed)
    out, lengths = rng.random(n) < rng.random(), rng.integers(1, 50, n) if tokens else None
    out[0] = False
    selector = TargetedSelector(budget, targets=examples, lengths=lengths, exclude=out).fit(pool)
    rest = TargetedSelector(budget, targets=examples, lengths=None if lengths is None else lengths[~out])
    assert selector.ranking_.tolist() == np.flatnonzero(~out)[rest.fit(pool[~out]).ranking_].tolist()
    assert np.isneginf(selector.scores_[out]).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 100), st.integers(0, 2**20), st.floats(0.02, 1.0))
def test_by_losses_those_stay_that_training_on_the_target_lowers_most(n, seed, budget):
    rng = np.random.default_rng(seed)
    losses, out = rng.integers(0, 9, (2, n)) / 4, rng.random(n) < 0.3
    out[0] = False
    losses[:, out] = np.nan
    falls = [(float(after - before), row) for row, (before, after) in enumerate(losses.T.tolist()) if not out[row]]
    expected = [row for _, row in sorted(falls)][: max(1, round(budget * len(falls)))]
    selector = TargetedSelector(budget, losses=losses, exclude=out).fit(np.zeros((n, 1)))
    assert selector.ranking_.tolist() == expected
    assert selector.scores_[expected].tolist() == (losses[0] - losses[1])[expected].tolist()


def test_a_row_of_zeros_is_like_nothing():
    pool = np.array([[0, 0], [1, 0.1], [-1, 0]], np.float32)
    assert TargetedSelector(1.0, targets=[[1.0, 0.0]]).fit(pool).ranking_.tolist() == [1, 0, 2]


def test_a_fit_trains_on_what_a_target_keeps():
    pool = data(64)
    selector = TargetedSelector(0.25, targets=pool.tensors[0][:2].numpy())
    selection, module = InstanceSelection(selector=selector), Classifier()
    trainer(selection, max_epochs=1).fit(module, DataLoader(pool, 8))
    expected = TargetedSelector(0.25, targets=pool.tensors[0][:2].numpy()).fit(pool.tensors[0]).sample_indices_
    assert selection.indices.tolist() == expected.tolist()
    assert {0, 1} <= set(expected.tolist())
    assert sum(module.seen) == 16
