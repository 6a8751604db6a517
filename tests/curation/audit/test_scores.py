"""Scores of labels, against plain Python."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from curation.audit import (
    area_under_margin,
    cartography_regions,
    errors_are_learned,
    forgetting_counts,
    normalized_margin,
    self_confidence,
    slices,
    suspicion,
)
from curation.records import SampleDynamics
from curation.records.dynamics import COLUMNS, COUNTS

number = st.floats(-8, 8, width=16)
matrix = st.tuples(st.integers(1, 6), st.integers(2, 5)).flatmap(
    lambda shape: arrays(np.float64, shape, elements=number)
)


def dynamics_of(**columns) -> SampleDynamics:
    size = len(next(iter(columns.values())))
    known = {name: np.asarray(column) for name, column in columns.items()}
    rest = {name: np.zeros(size, np.int64 if name in COUNTS else np.float32) for name in COLUMNS}
    return SampleDynamics({**rest, "visits": np.ones(size, np.int64), **known})


@given(matrix, st.data())
def test_area_under_the_margin_is_the_mean_over_visits(margins, data):
    missing = data.draw(arrays(bool, margins.shape))
    got = area_under_margin(np.where(missing, np.nan, margins))
    for row, gone, value in zip(margins, missing, got, strict=True):
        visits = [x for x, g in zip(row, gone, strict=True) if not g]
        assert value == pytest.approx(math.fsum(visits) / len(visits)) if visits else math.isnan(value)


@given(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=5))
def test_forgetting_is_counted_visit_by_visit(rows):
    counts, learned = forgetting_counts(np.array(rows))
    for row, count, ever in zip(rows, counts, learned, strict=True):
        slow, before = 0, False
        for right in row:
            slow += before and not right
            before = right
        assert (count, ever) == (slow, any(row))


@given(arrays(np.float64, 9, elements=st.floats(0, 1, width=16)), st.sampled_from([1 / 3, 0.5, 1.0]))
def test_regions_are_the_ends_of_sorted_lists(probability, share):
    deviation = probability * (1 - probability)
    regions = cartography_regions(probability, deviation, share)
    size = round(share * 9)
    ascending = sorted(range(9), key=lambda i: probability[i])
    assert regions["hard"].nonzero()[0].tolist() == sorted(ascending[:size])
    assert probability[regions["easy"]].tolist() == pytest.approx(
        [probability[i] for i in sorted(sorted(range(9), key=lambda i: -probability[i])[:size])]
    )
    assert sorted(deviation[regions["ambiguous"]]) == sorted(deviation)[9 - size :]


def test_samples_that_were_never_visited_are_in_no_region():
    regions = cartography_regions(np.array([0.5, np.nan]), np.array([0.1, np.nan]), 1.0)
    assert [mask.tolist() for mask in regions.values()] == [[True, False]] * 3
    with pytest.raises(ValueError, match=r"Argument `share` must be in \(0, 1\], but got 0"):
        cartography_regions(np.zeros(2), np.zeros(2), 0)


@given(matrix, st.data())
def test_scores_of_held_out_predictions(logits, data):
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = np.array([data.draw(st.integers(0, logits.shape[1] - 1)) for _ in logits])
    for p, y, own, margin in zip(
        probabilities,
        labels,
        self_confidence(probabilities, labels),
        normalized_margin(probabilities, labels),
        strict=True,
    ):
        assert own == p[y]
        assert margin == pytest.approx((p[y] - max(q for c, q in enumerate(p) if c != y) + 1) / 2)


def test_suspicion_is_by_margin_where_there_are_classes_and_by_loss_elsewhere():
    columns = {"margin": np.array([2.0, -1.0]), "loss": np.array([0.5, 0.25])}
    columns |= {"probability": np.array([0.75, 0.25]), "rival_probability": np.array([0.25, 0.5])}
    classes = dynamics_of(**columns, label=np.array([0, 1]))
    assert suspicion(classes, "margin").tolist() == [-2.0, 1.0]
    assert suspicion(classes, "probability_margin").tolist() == [-0.5, 0.25]
    assert suspicion(dynamics_of(**columns, label=np.array([-1, -1]))).tolist() == [0.5, 0.25]
    with pytest.raises(
        ValueError, match="Argument `by` must be 'auto', 'margin' or 'probability_margin', but got 'x'"
    ):
        suspicion(classes, "x")


def of_errors(share, classes=5, seed=0):
    """A hundred samples of 1,000 with low margins, of which a share has the suggestion of one other class."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, 1000)
    learned = generator.random(1000) < share
    suggested = (labels + np.where(learned, 1, generator.integers(1, classes, 1000))) % classes
    margin = np.where(np.arange(1000) < 100, -5.0, 3.0)
    return dynamics_of(
        label=labels, suggested=suggested, margin=margin, probability=margin / 9, rival_probability=-margin / 9
    )


def test_errors_that_a_model_learns_are_ranked_by_probabilities():
    assert not errors_are_learned(of_errors(0.0))
    assert not errors_are_learned(of_errors(0.2))  # 40 % have the usual suggestion, and halfway is 62.5 %
    assert errors_are_learned(of_errors(0.8))
    assert not errors_are_learned(of_errors(1.0, classes=2))  # there is no other class
    assert not errors_are_learned(dynamics_of(label=np.arange(5), suggested=np.arange(5)))  # too few samples
    learned, others = of_errors(1.0), of_errors(0.0)
    assert suspicion(learned).tolist() == suspicion(learned, "probability_margin").tolist()
    assert suspicion(others).tolist() == suspicion(others, "margin").tolist()
    columns = {**learned.columns, "margin": np.where(np.arange(1000) < 60, -9.0, learned["margin"])}
    columns["suggested"] = np.where(np.arange(1000) < 60, others["suggested"], learned["suggested"])
    mixed = SampleDynamics(columns)
    assert not errors_are_learned(mixed)
    assert errors_are_learned(mixed, np.arange(60))


def test_slices_are_compared_with_all_and_leave_out_what_was_never_visited():
    dynamics = dynamics_of(loss=np.array([1.0, 3.0, 5.0, 99.0]), visits=np.array([1, 1, 1, 0]))
    found = slices(dynamics, np.array([True, False, False, True]), {"source": np.array(["a", "a", "b", "b"])})
    assert [(part["part"], part["samples"]) for part in found] == [("b", 1), ("a", 2)]
    assert [part["excess"] for part in found] == [2.0, -1.0]
    assert [part["suspects"] for part in found] == [0.0, 0.5]
    assert found[1]["error"] == pytest.approx(1 / math.sqrt(2))
