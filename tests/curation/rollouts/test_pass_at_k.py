"""The estimator against every choice of k rollouts, and its metrics."""

from itertools import combinations

import pytest
import torch

from curation.metrics.rollouts import PassAtK, SolveRate
from curation.rollouts.pass_at_k import pass_at_k


@pytest.mark.parametrize("n", range(1, 9))
def test_the_estimator_is_the_share_of_the_choices_with_a_right_one(n):
    for k in range(1, n + 1):
        for c in range(n + 1):
            choices = list(combinations([i < c for i in range(n)], k))
            expected = sum(map(any, choices)) / len(choices)
            assert float(pass_at_k(torch.tensor([c]), n, k)) == pytest.approx(expected, abs=1e-12)


def test_large_numbers_do_not_overflow():
    assert float(pass_at_k(torch.tensor([1]), 1024, 512)) == pytest.approx(0.5, abs=1e-9)


def test_metrics_pool_batches_and_refuse_adaptive_groups():
    metric = PassAtK(2)
    metric.update(torch.tensor([[1.0, 0, 0, 0]]))
    metric.update(torch.tensor([[0.0, 0, 0, 0], [1, 1, 1, 0]]))
    assert float(metric.compute()) == pytest.approx((0.5 + 0 + 1) / 3)
    with pytest.raises(ValueError, match="must have as many rollouts, but some have 4 and others 3"):
        metric.update(torch.zeros(1, 3))
    metric.reset()
    metric.update(torch.ones(1, 3))
    assert float(metric.compute()) == 1
    rates = SolveRate()
    rates.update(torch.tensor([0, 3]), torch.tensor([3, 3]))
    rates.update(torch.tensor([1]), torch.tensor([9]))
    assert {name: round(float(v), 3) for name, v in rates.compute().items()} == {
        "solve_none": 0.333,
        "solve_partial": 0.333,
        "solve_all": 0.333,
    }


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pass_at_k(torch.tensor([1]), 4, 5), r"Argument `k` must be in \[1, n = 4\], but got 5"),
        (lambda: pass_at_k(torch.tensor([5]), 4, 1), r"Argument `correct` must be in \[0, n = 4\]"),
        (lambda: PassAtK(0), "Argument `k` must be an integer >= 1, but got 0"),
    ],
)
def test_what_is_wrong_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
