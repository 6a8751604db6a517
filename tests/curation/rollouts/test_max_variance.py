"""The answers of largest variance, against all subsets."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from curation.rollouts import max_variance

groups = st.lists(
    st.lists(st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1, width=32)), min_size=1, max_size=8),
    min_size=1,
    max_size=6,
)


def variance(values):
    values = torch.tensor(values, dtype=torch.float64)
    return float((values - values.mean()).square().mean())


@given(groups, st.integers(1, 9), st.integers(0, 9))
def test_no_subset_has_a_larger_variance(rewards, m, seed):
    index = torch.tensor([i for i, group in enumerate(rewards) for _ in group])
    mixed = torch.randperm(len(index), generator=torch.Generator().manual_seed(seed))  # groups need not be together
    values = torch.tensor([r for group in rewards for r in group])
    kept = torch.empty(len(index), dtype=torch.bool)
    kept[mixed] = max_variance(values[mixed], index[mixed], len(rewards), m)
    for i, group in enumerate(rewards):
        chosen = values[(index == i) & kept].tolist()
        assert len(chosen) == min(m, len(group))
        best = max(variance(subset) for subset in itertools.combinations(group, len(chosen)))
        assert variance(chosen) == pytest.approx(best, abs=1e-7)


def test_half_of_a_binary_group_is_balanced():
    rewards = torch.tensor([1.0] * 3 + [0.0] * 13)
    assert rewards[max_variance(rewards, torch.zeros(16, dtype=torch.int64), 1, 8)].sum() == 3
    assert rewards[max_variance(rewards, torch.zeros(16, dtype=torch.int64), 1, 4)].sum() == 2


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="Argument `m` must be an integer >= 1, but got 0"):
        max_variance(torch.ones(2), torch.zeros(2, dtype=torch.int64), 1, 0)
    with pytest.raises(ValueError, match=r"Argument `groups` must be in \[0, 1\), but got 1 to 1"):
        max_variance(torch.ones(2), torch.ones(2, dtype=torch.int64), 1, 1)
