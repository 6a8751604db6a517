"""The greedy choice, against brute force."""

import math
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twins import slow_diverse

from curation.samplers import concept_choice
from curation.samplers.concept_choice import (
    Diversity,
    FirstCome,
    Frequency,
    choose_diverse,
    round_targets,
    target_counts,
)
from curation.samplers.concept_index import ConceptIndex


def index(rows, count):
    offsets = np.cumsum([0, *map(len, rows)])
    return ConceptIndex(offsets, np.array([c for row in rows for c in sorted(row)], np.int32), range(count))


@st.composite
def instances(draw):
    """Rows of concepts, k, targets, penalties, cap; single labels in every third."""
    count = draw(st.integers(1, 9))
    most = draw(st.sampled_from([1, 3, 5]))
    rows = draw(st.lists(st.sets(st.integers(0, count - 1), max_size=most), min_size=1, max_size=20))
    k = draw(st.integers(0, len(rows)))
    weights = st.sampled_from([0.0, 0.1, 1 / 3, 1.0, 1.5, 2.0, 7.0])
    targets = draw(st.one_of(st.just([max(1.0, k / count)] * count),
                             st.lists(weights, min_size=count, max_size=count)))  # fmt: skip
    penalties = draw(st.lists(st.sampled_from([0.0, 0.1, 0.2, 3.0]), min_size=len(rows), max_size=len(rows)))
    return rows, count, k, np.array(targets), np.array(penalties), draw(st.sampled_from([None, 1, 2, 5]))


@settings(max_examples=600, deadline=None)  # the first is compiled
@given(instances())
def test_equals_brute_force(instance):
    rows, count, k, targets, penalties, cap = instance
    chosen = choose_diverse(index(rows, count), k, targets, penalties, cap)
    assert chosen.dtype == np.int64
    assert chosen.tolist() == slow_diverse(rows, k, targets, penalties, cap)


@settings(max_examples=200, deadline=None)
@given(instances())
def test_plain_python_chooses_the_same(instance):
    rows, count, k, targets, penalties, cap = instance
    expected = choose_diverse(index(rows, count), k, targets, penalties, cap).tolist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(concept_choice, "_compiled", lambda: concept_choice._greedy)
        assert choose_diverse(index(rows, count), k, targets, penalties, cap).tolist() == expected


def test_without_numba_it_says_so_once():
    code = """
import sys, warnings
sys.modules["numba"] = None
import numpy as np
from curation.samplers.concept_aware import ConceptIndex, choose_diverse
index = ConceptIndex.from_lists([["a", "b"], ["a"], ["c"]])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    print([choose_diverse(index, 2, np.ones(3)).tolist() for _ in range(2)], [str(w.message)[:22] for w in caught])
"""
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert printed == "[[2, 0], [2, 0]] ['numba is not installed']\n"


def test_where_nothing_can_be_written_it_is_compiled_every_time(monkeypatch):
    import numba

    compiled = []

    def njit(cache=False, nogil=False):
        def compile_it(function):
            if cache:
                raise RuntimeError("no locator available")
            compiled.append(function)
            return function

        return compile_it

    monkeypatch.setattr(numba, "njit", njit)
    assert concept_choice._compiled.__wrapped__() is concept_choice._greedy
    assert compiled == [concept_choice._greedy]


def test_large_super_batches_are_filled_with_different_rows():
    draw = np.random.default_rng(0)
    rows = [set(draw.zipf(1.3, draw.integers(0, 12)) % 500) for _ in range(3000)]
    for k, cap in ((600, None), (600, 1), (2999, 3), (3000, 1)):
        chosen = choose_diverse(index(rows, 500), k, np.full(500, max(1, k / 500)), None, cap)
        assert len(chosen) == len(np.unique(chosen)) == k


def test_a_cap_holds_where_it_can():
    """Of 12 single labels a, a, ..., b: at most 2 of each while there are others."""
    labels = [0] * 8 + [1, 1, 1, 2]
    chosen = choose_diverse(index([{c} for c in labels], 3), 5, np.array([5.0, 1, 1]), cap=2)
    assert Counter(labels[i] for i in chosen) == {0: 2, 1: 2, 2: 1}


def test_frequency_takes_the_most_concepts_and_first_come_none():
    rows = index([{0}, {0, 1}, set(), {1, 2}, {0, 1, 2}], 3)
    nothing, some = np.zeros(5), np.array([0, 0, 0, 0, 1.5])
    assert Frequency().choose(rows, 3, nothing, nothing).tolist() == [4, 1, 3]
    assert Frequency().choose(rows, 3, nothing, some).tolist() == [1, 3, 4]
    assert FirstCome().choose(rows, 2, nothing, nothing).tolist() == [0, 1]
    assert FirstCome().choose(rows, 2, nothing, np.array([1.0, 0, 0, 0, 0])).tolist() == [1, 2]


def test_targets():
    corpus = ConceptIndex.from_lists([["a"], ["a", "b"], ["c"]])
    assert target_counts(corpus, "uniform", 6).tolist() == [2, 2, 2]
    assert target_counts(corpus, "uniform", 2).tolist() == [1, 1, 1]
    assert target_counts(corpus, "proportional", 8).tolist() == [4, 2, 2]
    assert target_counts(corpus, {"c": 3.0, "a": 1}, 8).tolist() == [2, 0, 6]
    numbers = ConceptIndex.from_labels([0, 1])
    assert target_counts(numbers, {1: 1.0}, 2).tolist() == target_counts(numbers, {"1": 1.0}, 2).tolist() == [0, 2]


@given(st.lists(st.floats(0, 5), min_size=1, max_size=9).filter(sum), st.integers(1, 30))
def test_rounded_targets_are_right_on_average(weights, k):
    targets = k * np.array(weights) / sum(weights)
    rounded = [round_targets(targets, draw) for draw in (np.arange(1000) + 0.5) / 1000]
    np.testing.assert_allclose(np.mean(rounded, 0), targets, atol=2e-3)
    assert {row.sum() for row in rounded} == {k}
    assert (np.abs(rounded - targets) < 1).all()


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({"d": 1.0}, "`targets` must name concepts of the index, but got 'd'"),
        ({"a": -1.0}, r"weights >= 0, but got -1.0 for 'a'"),
        ({"a": math.nan}, r"weights >= 0, but got nan for 'a'"),
        ({"a": math.inf}, r"weights >= 0, but got inf for 'a'"),
        ({"a": "much"}, r"weights >= 0, but got 'much' for 'a'"),
        ({"a": 0.0}, r"must have a weight > 0, but got \{'a': 0.0\}"),
        ({}, r"must have a weight > 0, but got \{\}"),
        ("even", "must be 'uniform', 'proportional' or a mapping, but got 'even'"),
    ],
)
def test_a_bad_target_is_named(targets, message):
    with pytest.raises(ValueError, match=message):
        target_counts(ConceptIndex.from_lists([["a"], ["b"]]), targets, 2)


def test_other_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"Argument `k` must be an integer in \[0, 2\), but got 2"):
        choose_diverse(index([{0}], 1), 2, np.ones(1))
    with pytest.raises(ValueError, match=r"Argument `k` must be an integer in \[0, 2\), but got 1.0"):
        choose_diverse(index([{0}], 1), 1.0, np.ones(1))
    with pytest.raises(ValueError, match="Argument `targets` must be 'uniform', 'proportional' or a mapping"):
        target_counts(index([{0}], 1), np.ones(1), 1)
    for cap in (0, -1, 1.5):
        for refuse in (
            lambda cap: Diversity(cap=cap),
            lambda cap: choose_diverse(index([{0}], 1), 1, np.ones(1), cap=cap),
        ):
            with pytest.raises(ValueError, match=f"Argument `cap` must be an integer >= 1 or None, but got {cap}"):
                refuse(cap)
    for targets in (np.ones(3), np.array([np.inf]), np.array([np.nan]), np.array([-1.0]), np.array([1e-300])):
        with pytest.raises(ValueError, match=r"Argument `targets` must be \[1\] numbers, 0 or from 1e-9 on"):
            choose_diverse(index([{0}, {0}], 1), 1, targets)
    for penalties in (np.ones(3), np.array([np.nan, 0])):
        with pytest.raises(ValueError, match=r"Argument `penalties` must be \[2\] finite numbers"):
            choose_diverse(index([{0}, {0}], 1), 1, np.ones(1), penalties)


def test_the_smallest_targets_end():
    rows = [{i % 3, 3 + i % 4} for i in range(50)]
    chosen = choose_diverse(index(rows, 7), 50, np.array([1e-9, 1e-9, 1, 5, 1e-9, 0, 1e9]))
    assert sorted(chosen) == list(range(50))


def test_weights_of_any_size_are_targets():
    corpus = ConceptIndex.from_lists([["a"], ["b"]])
    assert target_counts(corpus, {"a": 1e308, "b": 1e308}, 8).tolist() == [4, 4]
