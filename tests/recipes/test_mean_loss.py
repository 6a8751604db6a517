"""The mean of validation losses is the weighted mean, and NaN where a model broke."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics import MeanMetric

from curation.recipes.mean_loss import MeanLoss

BATCHES = st.lists(
    st.tuples(st.floats(-100, 100, width=32) | st.just(math.nan), st.integers(0, 50)), min_size=1, max_size=8
)


@given(BATCHES)
def test_it_is_numpys_weighted_mean_of_all_batches_with_a_weight(batches):
    mean = MeanLoss()
    for loss, weight in batches:
        mean.update(torch.tensor(loss), torch.tensor(weight))
    counted = [(loss, weight) for loss, weight in batches if weight]
    if not counted:
        assert math.isnan(mean.compute())
        return
    expected = np.average([loss for loss, _ in counted], weights=[weight for _, weight in counted])
    assert float(mean.compute()) == pytest.approx(expected, rel=1e-5, abs=1e-4, nan_ok=True)


def test_without_nan_it_is_torchmetrics_to_the_bit():
    ours, theirs, draw = MeanLoss(), MeanMetric(), torch.Generator().manual_seed(0)
    for _ in range(50):
        loss, weight = torch.rand((), generator=draw), torch.randint(1, 999, (), generator=draw)
        ours.update(loss, weight)
        theirs.update(loss, weight)
    assert torch.equal(ours.compute(), theirs.compute())
