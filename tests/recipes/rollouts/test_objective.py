"""The objective per token against its definition, its gradient, and the KL estimate against the exact divergence."""

import torch

from curation.recipes.rollouts.objective import clipped_objective, importance_ratio, kl_estimate


def test_the_objective_is_the_smaller_of_both_sides():
    ratio = torch.tensor([0.5, 0.5, 1.0, 2.0, 2.0], requires_grad=True)
    advantage = torch.tensor([1.0, -1.0, 3.0, 1.0, -1.0])
    objective = clipped_objective(ratio, advantage, clip_low=0.2, clip_high=0.3)
    torch.testing.assert_close(objective, torch.tensor([0.5, -0.8, 3.0, 1.3, -2.0]))
    objective.sum().backward()
    torch.testing.assert_close(ratio.grad, torch.tensor([1.0, 0.0, 3.0, 0.0, -1.0]))  # none where it is clipped


def test_the_gradient_at_the_sampling_weights_is_the_policy_gradient():
    log_probs = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    advantage = torch.tensor([0.5, -0.25, 0.0])
    ratio = importance_ratio(log_probs, log_probs.detach())
    assert ratio.tolist() == [1, 1, 1]
    clipped_objective(ratio, advantage, 0.2, 0.2).sum().backward()
    torch.testing.assert_close(log_probs.grad, advantage)


def test_the_kl_estimate_is_unbiased_and_never_negative():
    policy, reference = (torch.tensor(p, dtype=torch.float64) for p in ([0.6, 0.3, 0.1], [0.2, 0.5, 0.3]))
    estimates = kl_estimate(policy.log(), reference.log())
    assert (estimates >= 0).all()
    torch.testing.assert_close((policy * estimates).sum(), (policy * (policy / reference).log()).sum())
    assert kl_estimate(policy.log(), policy.log()).tolist() == [0, 0, 0]
