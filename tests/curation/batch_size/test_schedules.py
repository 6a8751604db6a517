"""Schedules of the batch size, and where a size may begin, against Lightning's rules played out batch by batch."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curation.batch_size import (
    SCHEDULES,
    batches_within,
    count_steps,
    doubling,
    next_size,
    ramp,
    seesaw,
    steps,
    window_sizes,
)


@given(st.integers(1, 64), st.sampled_from([1, 2, 4, 8, 32]), st.integers(1, 10_000), st.integers(0, 20_000))
def test_schedules_equal_their_slow_twins(first, growth, over, seen):
    last = growth * first
    assert ramp(seen, first, last, over) == pytest.approx(
        last if seen >= over else first + (last - first) * seen / over
    )
    doublings = int(math.log2(growth))
    reached = sum(seen * doublings >= i * over for i in range(1, doublings + 1))
    assert doubling(seen, first, last, over) == first * 2**reached
    halved = 0  # times that the cosine has halved
    while halved < doublings and seen >= over / math.pi * math.acos(2 * 0.5 ** (halved + 1) - 1) * (1 + 1e-12):
        halved += 1
    if all(abs(seen - over / math.pi * math.acos(2 * 0.5**i - 1)) > 1e-6 for i in range(1, 6)):
        assert seesaw(seen, first, last, over) == first * 2**halved


@pytest.mark.parametrize("schedule", SCHEDULES.values())
@given(st.integers(1, 64), st.sampled_from([1, 2, 4, 8]), st.integers(1, 1000))
def test_a_schedule_never_shrinks_and_ends_at_its_last_size(schedule, first, growth, over):
    sizes = [schedule(seen, first, growth * first, over) for seen in range(0, 2 * over, max(1, over // 50))]
    assert sizes == sorted(sizes)
    assert (sizes[0], schedule(over, first, growth * first, over)) == (first, growth * first)


@given(st.lists(st.tuples(st.integers(1, 100), st.integers(1, 100)), max_size=5), st.integers(0, 600))
def test_pairs_are_a_staircase(changes, seen):
    pairs, at = [(0, 7)], 0
    for wait, rows in changes:
        at += wait
        pairs.append((at, rows))
    expected = 7
    for samples, rows in pairs:
        if seen >= samples:
            expected = rows
    assert steps(pairs)(seen) == expected


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 40))
def test_the_next_size_begins_where_it_divides_and_nearest_to_what_is_wanted(size, wanted, windows):
    ready = size * windows
    got = next_size(size, wanted, ready)
    assert ready % got == 0
    between = [k for k in range(min(size, wanted), max(size, wanted) + 1) if ready % k == 0]
    if wanted % size == 0:
        between = [k for k in (size, wanted) if ready % k == 0]
    assert abs(got - wanted) == min(abs(k - wanted) for k in between)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(1, 30), st.integers(1, 4))
def test_windows_are_whole_under_the_rules_of_lightning(sizes, batches, epochs):
    """Lightning zeroes where ``batch_idx % k == 0`` and steps where ``ready % k == 0`` or the epoch ends."""
    windows = list(window_sizes(lambda trained: sizes[trained % len(sizes)], batches, epochs * batches))
    assert sum(windows) == batches * epochs
    got, trained, k = [], 0, sizes[0]
    for _ in range(epochs):
        collected = 0
        for batch_idx in range(batches):
            if batch_idx % k == 0:
                assert collected == 0  # nothing that was not stepped with is thrown away
            else:
                assert collected > 0  # nothing old is left in
            collected += 1
            trained += 1
            ready = batch_idx + 1
            if ready % k == 0 or ready == batches:
                got.append(collected)
                collected = 0
                k = next_size(k, sizes[trained % len(sizes)], ready % batches)
    assert windows == got


@given(st.integers(1, 40), st.integers(2, 30), st.integers(1, 6))
def test_a_fit_of_so_many_steps_has_the_most_batches_that_take_them(steps, batches, largest):
    def stretched(total):
        return lambda trained: 1 + round((largest - 1) * trained / total)

    total = batches_within(stretched, batches, steps, largest)
    assert count_steps(stretched(total), batches, total) <= steps
    assert count_steps(stretched(total + 1), batches, total + 1) > steps
