"""Plans of rollouts, against tables of the paper's rule, exact fractions and slow references."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.rollouts.allocation import (
    DifficultyMemory,
    EqualTreatment,
    HardnessWeighted,
    Neyman,
    Uniform,
    fill,
    plan,
)

TABLES = [  # schedule, n, extra for 0, 1, 2, ... successes
    (EqualTreatment(), 8, [24, 11, 3, 1, 0, 0, 0, 0, 0]),
    (HardnessWeighted(), 8, [56, 24, 8, 3, 0, 0, 0, 0, 0]),
    (EqualTreatment(std=True), 8, [9, 5, 2, 1, 0, 0, 0, 0, 0]),
    (HardnessWeighted(std=True), 8, [23, 14, 6, 3, 0, 0, 0, 0, 0]),
    (EqualTreatment(16), 4, [6, 2, 0, 0, 0]),
    (Uniform(16), 8, [8] * 9),
    (Uniform(4), 8, [0] * 9),
]


@pytest.mark.parametrize(("schedule", "n", "extra"), TABLES)
def test_the_rule_to_the_integer(schedule, n, extra):
    found = plan(schedule, np.arange(n + 1), n)
    assert found.tolist() == extra
    assert found.dtype == np.int64


def ceil_of_root(square):
    """The smallest whole number whose square is at least a fraction."""
    root = math.isqrt(math.floor(square))
    return root + (root * root < square)


@pytest.mark.parametrize("n", range(1, 129))
def test_no_success_count_is_misrounded(n):
    for k in range(n + 1):
        u = Fraction(max(2 * k, 1), 2 * n)  # half a success where there is none
        for cls, exact, squared in (
            (EqualTreatment, lambda u: 1 / (4 * u * (1 - u)), lambda u: 1 / (4 * u * (1 - u))),
            (HardnessWeighted, lambda u: 1 / (2 * u), lambda u: (1 - u) / u),
        ):
            totals = [n, n]
            if 2 * u < 1:
                totals = [max(math.ceil(n * exact(u)), n), max(ceil_of_root(n**2 * squared(u)), n)]
            for std, total in zip((False, True), totals, strict=True):
                assert cls(10**6, std).extra(np.array([k]), n)[0] == total - n, (cls, std, n, k)


@pytest.mark.parametrize(("schedule", "weight"), [(EqualTreatment, "logit"), (HardnessWeighted, "log")])
def test_weights_are_those_of_the_objective(schedule, weight):
    """``n u (1 - u)`` of advantages, for all that is below 1/2, is the gradient of the objective up to a factor."""
    n = 1000
    k = np.array([10.0, 50, 100, 250, 400])
    total = schedule(10**9).extra(k, n) + n
    u = k / n
    derivative = {"logit": 1 / (u * (1 - u)), "log": 1 / u}[weight]
    ratio = total / derivative
    np.testing.assert_allclose(ratio, ratio.mean(), rtol=1e-2)
    std = schedule(10**9, std=True).extra(k, n) + n
    ratio = std / (derivative * np.sqrt(u * (1 - u)))  # Neyman's
    np.testing.assert_allclose(ratio, ratio.mean(), rtol=1e-2)


def fill_reference(weights, least, most, total):
    """One after the other, to whoever is furthest below its share of a common level, found by bisection."""
    weights, least = np.asarray(weights, float), np.asarray(least)
    most = np.where(weights > 0, np.maximum(most, least), least)
    total = min(max(total, least.sum()), most.sum())
    low, high = 0.0, 1e15
    for _ in range(300):
        level = (low + high) / 2
        low, high = (level, high) if np.clip(level * weights, least, most).sum() < total else (low, level)
    return np.clip(high * weights, least, most), total


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 100).map(lambda v: 0.0 if v < 1e-3 else v), st.integers(0, 10), st.integers(0, 40)),
        min_size=1,
        max_size=20,
    ),
    st.integers(0, 400),
)
def test_filling_keeps_to_the_sum_the_bounds_and_the_proportion(rows, total):
    weights, least, room = (np.array(column) for column in zip(*rows, strict=True))
    most = least + room
    found = fill(weights, least, most, total)
    ideal, reachable = fill_reference(weights, least, most, total)
    assert found.sum() == reachable
    assert (found >= least).all()
    assert (found <= np.where(weights > 0, most, least)).all()
    assert (np.abs(found - ideal) <= 1 + 1e-6).all()


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from([EqualTreatment(), HardnessWeighted(), HardnessWeighted(std=True), Neyman("logit"), Uniform(20)]),
    st.lists(st.integers(0, 8), min_size=1, max_size=60),
    st.integers(0, 3000),
)
def test_a_budget_is_never_exceeded_and_used(schedule, successes, beyond):
    budget = 8 * len(successes) + beyond
    extra = plan(schedule, successes, 8, budget)
    wanted = plan(schedule, successes, 8)
    assert (extra >= 0).all()
    assert extra.sum() == min(beyond, schedule.cap(8) * (wanted > 0).sum())
    assert not extra[wanted == 0].any()


@pytest.mark.parametrize("objective", ["accuracy", "logit", "log"])
def test_neyman_has_the_least_variance(objective):
    """Of the sum of ``w`` times accuracy: no other plan of as many rollouts has less."""
    k = np.array([1.0, 2, 4, 6, 7])
    u = k / 8
    w = {"accuracy": u**0, "logit": 1 / (u * (1 - u)), "log": 1 / u}[objective]
    total = 8 + Neyman(objective, rollouts=200, max_rollouts=10**6).extra(k, 8)
    assert total.sum() == 1000

    def variance(n):
        return (w**2 * u * (1 - u) / n).sum()

    draw = np.random.default_rng(0)
    for _ in range(200):
        moved = total + draw.permutation([10, -10, 0, 0, 0])
        assert variance(total) <= variance(moved)


def test_memory_is_a_posterior_that_forgets():
    memory = DifficultyMemory(forgetting=0.5)
    memory.update([2, 0], [8.0, 0.0], 8)
    memory.update([2], [0.0], 8)
    assert memory.counts == {0: (0, 4), 2: (2, 6)}
    now = memory.successes([0, 1, 2], [4.0, 4, 4], 8)
    np.testing.assert_allclose(now, 8 * np.array([4 / 12, 4 / 8, 6 / 14]))


@pytest.mark.parametrize("n", range(1, 20))
def test_memory_of_what_is_always_solved_does_not_round_above_that(n):
    memory = DifficultyMemory(forgetting=0.8)
    for _ in range(40):
        plan(HardnessWeighted(), memory.successes([0], [n], n), n)
        memory.update([0], [n], n)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Uniform(0), r"Argument `rollouts` must be an integer in \[1, 2147483648\), but got 0"),
        (lambda: EqualTreatment(2.5), r"Argument `max_rollouts` must be an integer in \[1, .*\), but got 2.5"),
        (lambda: Neyman("speed"), "Argument `objective` must be 'accuracy', 'logit' or 'log', but got 'speed'"),
        (lambda: DifficultyMemory(1.0), r"Argument `forgetting` must be in \[0, 1\), but got 1.0"),
        (lambda: plan(Uniform(9), [9], 8), r"Rewards of 8 rollouts must sum to \[0, 8\], but sum to 9.0"),
        (lambda: plan(Uniform(9), [np.nan], 8), r"Rewards of 8 rollouts must sum to \[0, 8\], but sum to nan"),
        (lambda: plan(Uniform(9), [1, 2], 8, 15), r"Argument `budget` must be in \[16, inf\), but got 15"),
    ],
)
def test_what_is_wrong_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_plan_of_impossible_numbers_is_refused():
    for n in (0, 1.5, -1):
        with pytest.raises(ValueError, match=rf"`n` must be an integer in \[1, 2147483648\), but got {n}"):
            plan(Uniform(9), np.zeros(2), n)
    with pytest.raises(ValueError, match=r"`budget` must be in \[8, inf\), but got nan"):
        plan(Uniform(9), np.zeros(2), 4, math.nan)
    with pytest.raises(ValueError, match=r"`successes` must be \[P\], but got \[2, 1\]"):
        plan(Uniform(9), np.zeros((2, 1)), 4)
    with pytest.raises(
        ValueError, match=r"`rollouts` must be an integer in \[1, 2147483648\), but got 1000000000000000000000"
    ):
        Uniform(10**21)


def test_a_plan_is_the_same_for_an_integer_of_numpy():
    assert plan(EqualTreatment(1000), np.zeros(1), np.int32(300)).tolist() == [700]


@pytest.mark.parametrize("wrong", [math.nan, -1.0, 4.5])
def test_a_memory_takes_no_impossible_rewards(wrong):
    memory = DifficultyMemory()
    with pytest.raises(ValueError, match=rf"Rewards of 4 rollouts must sum to \[0, 4\], but sum to {wrong}"):
        memory.update([1, 2], [1.0, wrong], 4)
    assert memory.counts == {}
