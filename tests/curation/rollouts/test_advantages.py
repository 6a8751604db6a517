"""Ragged groups against a loop over prompts, and the direction of the gradient by enumeration."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.rollouts.advantages import advantages, loss_weights
from curation.rollouts.allocation import EqualTreatment, HardnessWeighted, plan

BASELINES = ("centred", "std", "rloo", "maxrl", "none")


def reference(group, baseline):
    """One prompt."""
    n, mean = len(group), sum(group) / len(group)
    if min(group) == max(group):
        return [0.0] * n
    if baseline == "centred":
        return [r - mean for r in group]
    if baseline == "std":
        deviation = math.sqrt(sum((r - mean) ** 2 for r in group) / n)
        return [(r - mean) / max(deviation, 1e-6) for r in group]
    if baseline == "rloo":
        return [r - (sum(group) - r) / (n - 1) for r in group]
    if baseline == "maxrl":
        return [(r - mean) / max(mean, 1e-6) for r in group]
    return list(group)


def reference_weights(groups, lengths, normalizer, longest):
    """One prompt after the other; ``groups`` are lists of advantages."""
    active = [i for i, group in enumerate(groups) if any(group)]
    tokens = sum(sum(lengths[i]) for i in active)
    rollouts = sum(len(groups[i]) for i in active)
    out = []
    for group in groups:
        whole = {"token": tokens, "rollout": rollouts * longest, "prompt": len(active) * len(group) * longest}
        out += [a / max(whole[normalizer], 1) for a in group]
    return out


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from([0.0, 1.0, 0.25]), min_size=1, max_size=9), min_size=1, max_size=8),
    st.sampled_from(BASELINES),
    st.sampled_from(["token", "rollout", "prompt"]),
    st.integers(0, 10**6),
)
def test_ragged_groups_equal_a_loop_over_prompts(groups, baseline, normalizer, seed):
    g = torch.Generator().manual_seed(seed)
    of = torch.tensor([i for i, group in enumerate(groups) for _ in group])
    lengths = torch.randint(1, 9, (len(of),), generator=g)
    mixed = torch.randperm(len(of), generator=g)  # groups need not be together
    rewards = torch.tensor([r for group in groups for r in group])
    got = torch.empty(len(of))
    got[mixed] = advantages(rewards[mixed], of[mixed], len(groups), baseline)
    expected = [reference(group, baseline) for group in groups]
    torch.testing.assert_close(got, torch.tensor([a for group in expected for a in group]), rtol=1e-5, atol=1e-6)
    by_group = [lengths[of == i].tolist() for i in range(len(groups))]
    weights, denominator = loss_weights(got, of, len(groups), lengths, normalizer, 8)
    weights = weights / denominator.clamp(min=1)
    expected_weights = reference_weights(expected, by_group, normalizer, 8)
    torch.testing.assert_close(weights, torch.tensor(expected_weights), rtol=1e-5, atol=1e-7)


def test_equal_rewards_that_floats_cannot_hold_teach_nothing():
    rewards = torch.full((7,), 0.1, dtype=torch.float64)
    assert not advantages(rewards, torch.zeros(7, dtype=torch.int64), 1, "std").any()


@pytest.mark.parametrize("schedule", [EqualTreatment(), HardnessWeighted(), EqualTreatment(std=True)])
def test_adaptive_groups_change_the_weight_of_a_prompt_and_not_its_direction(schedule):
    """``E[sum A grad log p] = grad u E[n mean (1 - mean)] / (u (1 - u))``, by every outcome of both stages."""
    n, u = 4, 0.3
    left = right = 0.0
    for first in itertools.product((0.0, 1.0), repeat=n):
        extra = int(plan(schedule, [sum(first)], n)[0])
        for more in range(extra + 1):  # outcomes of the second stage by their number of successes
            outcome = [*first, *[1.0] * more, *[0.0] * (extra - more)]
            k, size = sum(outcome), len(outcome)
            chance = u ** sum(first) * (1 - u) ** (n - sum(first))
            chance *= math.comb(extra, more) * u**more * (1 - u) ** (extra - more)
            a = advantages(torch.tensor(outcome), torch.zeros(size, dtype=torch.int64), 1).double()
            # d log p / du of a rollout is 1 / u if it is right, else -1 / (1 - u).
            score = torch.tensor(outcome, dtype=torch.float64) / u - (1 - torch.tensor(outcome)) / (1 - u)
            left += chance * float((a * score).sum())
            right += chance * size * (k / size) * (1 - k / size) / (u * (1 - u))
    assert left == pytest.approx(right, rel=1e-6)
    assert left > 0


def test_the_sum_of_absolute_advantages_is_what_the_schedule_aims_at():
    n, u = 64, 0.125
    total = n + int(plan(EqualTreatment(1000), [u * n], n)[0])
    k = round(total * u)
    rewards = torch.cat([torch.ones(k), torch.zeros(total - k)])
    assert float(advantages(rewards, torch.zeros(total, dtype=torch.int64), 1).abs().sum()) == pytest.approx(
        n / 2, rel=0.02
    )


def test_what_is_wrong_is_named():
    r, groups = torch.zeros(3), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"Argument `groups` must be \[R\] as the rewards, \[3\], but got \[2\]"):
        advantages(r, groups[:2], 1)
    with pytest.raises(ValueError, match=r"Argument `baseline` must be .* but got 'mean'"):
        advantages(r, groups, 1, "mean")
    with pytest.raises(ValueError, match=r"Argument `normalizer` must be .* but got 'batch'"):
        loss_weights(r, groups, 1, groups, "batch", 8)


def test_plans_are_the_same_wherever_they_are_made():
    k = np.random.default_rng(0).integers(0, 9, 500)
    assert np.array_equal(plan(HardnessWeighted(), k, 8, 9000), plan(HardnessWeighted(), list(k), 8, 9000))


@pytest.mark.parametrize("baseline", BASELINES)
def test_a_reward_that_is_no_number_spoils_no_group_quietly(baseline):
    with pytest.raises(ValueError, match=f"`rewards` must be finite, .* but has nan with '{baseline}'"):
        advantages(torch.tensor([1.0, math.nan]), torch.tensor([0, 0]), 1, baseline)


def test_negative_rewards_have_no_log_accuracy():
    rewards, of = torch.tensor([1.0, -1.0]), torch.tensor([0, 0])
    with pytest.raises(
        ValueError, match=r"`rewards` must be finite, and >= 0 with the baseline 'maxrl', but has -1.0"
    ):
        advantages(rewards, of, 1, "maxrl")
    assert advantages(rewards, of, 1).tolist() == [1, -1]


def test_groups_that_are_not_there_are_named():
    for groups, found in (([0, 2], "0 to 2"), ([-1, 1], "-1 to 1")):
        with pytest.raises(ValueError, match=rf"`groups` must be in \[0, 2\), but got {found}"):
            advantages(torch.ones(2), torch.tensor(groups), 2)
    with pytest.raises(ValueError, match=r"`groups` must be int64, but got torch.float32"):
        advantages(torch.ones(2), torch.zeros(2), 2)
    with pytest.raises(ValueError, match=r"`groups` must be \[R\] as the lengths, \[1\], but got \[2\]"):
        loss_weights(torch.ones(2), torch.tensor([0, 1]), 2, torch.ones(1), "token", 8)
