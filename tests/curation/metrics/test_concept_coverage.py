"""Coverage, entropy and distance of concepts, by hand and by scipy."""

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from curation.metrics.concept_coverage import ConceptCoverage, plot_concepts


@given(st.lists(st.lists(st.integers(-1, 6), min_size=1, max_size=5), min_size=1, max_size=5), st.booleans())
def test_equals_scipy(updates, weighted):
    weights = np.arange(1.0, 8) if weighted else np.ones(7)
    metric = ConceptCoverage(7, torch.from_numpy(weights) if weighted else None)
    for update in updates:
        metric.update(torch.tensor(update))
    counts = np.bincount([c for update in updates for c in update if c >= 0], minlength=7)
    got = {name: value.item() for name, value in metric.compute().items()}
    assert got["coverage"] == pytest.approx((counts > 0).mean())
    if counts.sum():
        assert got["entropy"] == pytest.approx(scipy.stats.entropy(counts) / np.log(7), abs=1e-6)
        distance = np.abs(counts / counts.sum() - weights / weights.sum()).sum() / 2
        assert got["target_distance"] == pytest.approx(distance, abs=1e-6)
    else:
        assert np.isnan(got["target_distance"])


def test_forward_is_of_the_batch_and_compute_of_all():
    metric = ConceptCoverage(4)
    assert metric(torch.tensor([[0, 1], [2, -1]]))["coverage"] == 0.75
    assert metric(torch.tensor([3]))["coverage"] == 0.25
    assert metric.compute()["coverage"] == 1
    assert metric.compute()["entropy"] == pytest.approx(1)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="`num_concepts` must be an integer >= 1, but got 0"):
        ConceptCoverage(0)
    with pytest.raises(ValueError, match=r"`targets` must have shape \[3\], but got \[2\]"):
        ConceptCoverage(3, torch.ones(2))
    for targets in ([0.0, 0.0], [-1.0, 2.0], [float("nan"), 1.0]):
        with pytest.raises(ValueError, match="`targets` must be finite, >= 0 and not all 0"):
            ConceptCoverage(2, torch.tensor(targets))
    for concepts in (torch.tensor([0.5]), torch.tensor([True])):
        with pytest.raises(ValueError, match=f"`concepts` must be integers, but got {concepts.dtype}"):
            ConceptCoverage(2).update(concepts)


def test_the_picture_has_the_shares_of_head_middle_and_tail():
    corpus, trained = np.array([1, 50, 30, 9, 10] + [0] * 5), np.array([2, 2, 2, 2, 2] + [0] * 5)
    lines, bars = plot_concepts(corpus, trained, np.ones(10)).axes
    heights = np.array([bar.get_height() for bar in bars.patches]).reshape(3, 3)  # by curve, then head, middle, tail
    np.testing.assert_allclose(heights, [[0.5, 0.5, 0], [0.2, 0.8, 0], [0.1, 0.4, 0.5]])
    assert [line.get_label() for line in lines.lines] == ["corpus", "trained on", "wanted"]
    for line, expected in zip(lines.lines, ([0.5, 0.3, 0.1, 0.09, 0.01], [0.2] * 5, [0.1] * 10), strict=True):
        assert np.nansum(line.get_ydata()) > 0
        np.testing.assert_allclose(line.get_ydata()[: len(expected)], expected)


def test_a_picture_without_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"lightning-curation\[recipes\]"):
        plot_concepts([1], [1], [1])
