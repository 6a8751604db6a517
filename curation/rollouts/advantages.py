"""Advantages of rollouts in groups of any sizes, and the weight of each token in the loss."""

from typing import Literal, get_args

import torch
from torch import Tensor

from curation.checks import check_choice, check_integer

Baseline = Literal["centred", "std", "rloo", "maxrl", "none"]
Normalizer = Literal["token", "rollout", "prompt"]


def advantages(rewards: Tensor, groups: Tensor, size: int, baseline: Baseline = "centred") -> Tensor:
    """The advantage of each rollout over its group: fp32 ``[R]``, 0 in a group whose rewards are all equal.

    Args:
        rewards: Floating ``[R]``, finite.
        groups: int64 ``[R]`` in ``[0, G)``: the prompt of each rollout.
        size: ``G``, the number of groups.
        baseline: ``"centred"``, ``r - mean`` (Dr. GRPO, arXiv 2503.20783); ``"std"``, ``(r - mean) / std`` of the
            group (GRPO, 2402.03300); ``"rloo"``, ``r`` minus the mean of the other rollouts (2402.14740);
            ``"maxrl"``, ``(r - mean) / mean``, the gradient of log-accuracy (2602.02710); ``"none"``, ``r`` itself.

    Raises:
        ValueError: If ``baseline`` is unknown, ``size`` is not an integer >= 0, or ``rewards`` and ``groups`` differ
            in length; on a CPU also if a reward is not finite, or negative with ``"maxrl"``, or a group is out of
            its range.

    Example:
        >>> advantages(torch.tensor([1.0, 0, 0, 0, 1, 1]), torch.tensor([0, 0, 0, 0, 1, 1]), 2)
        tensor([ 0.7500, -0.2500, -0.2500, -0.2500,  0.0000,  0.0000])
    """
    check_choice("baseline", baseline, get_args(Baseline))
    check_groups(groups, size, rewards=rewards)
    if rewards.device.type == "cpu" and len(rewards):  # elsewhere it would wait for the device
        invalid = rewards[~rewards.isfinite() | ((rewards < 0) & (baseline == "maxrl"))].tolist()
        if invalid:
            raise ValueError(
                f"Argument `rewards` must be finite, and >= 0 with the baseline 'maxrl', but has {invalid[0]} with "
                f"{baseline!r}."
            )
    r = rewards.to(torch.float32 if rewards.device.type == "mps" else torch.float64)
    n = _sums(torch.ones_like(r), groups, size).clamp(min=1)
    mean = _sums(r, groups, size) / n
    centred = r - mean.index_select(0, groups)
    variance = _sums(centred.square(), groups, size) / n
    informative = variance > 1e-12 * (mean.square() + variance)  # equal rewards need not have their mean
    if baseline == "centred":
        scale = torch.ones_like(n)
    elif baseline == "std":
        scale = variance.rsqrt()
    elif baseline == "rloo":
        scale = n / (n - 1)
    elif baseline == "maxrl":
        scale = mean.reciprocal()
    else:
        centred, scale = r, torch.ones_like(n)
    return (centred * torch.where(informative, scale, 0).index_select(0, groups)).float()


def check_groups(groups: Tensor, size: int, **columns: Tensor) -> None:
    """Check the groups of rollouts.

    Args:
        groups: int32 or int64 ``[R]`` in ``[0, G)``: the prompt of each rollout.
        size: ``G``, the number of groups.
        **columns: Other values of the rollouts, ``[R]``, by their names in an error.

    Raises:
        ValueError: If ``size`` is not an integer >= 0, a shape or the type of the groups is another, or, on a CPU, a
            group is out of its range.
    """
    check_integer("size", size, 0)
    for name, values in columns.items():
        if values.shape != groups.shape or groups.dim() != 1:
            raise ValueError(
                f"Argument `groups` must be [R] as the {name}, {list(values.shape)}, but got {list(groups.shape)}."
            )
    if groups.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"Argument `groups` must be int64, but got {groups.dtype}.")
    if groups.device.type == "cpu" and len(groups) and not 0 <= int(groups.min()) <= int(groups.max()) < size:
        raise ValueError(
            f"Argument `groups` must be in [0, {size}), but got {int(groups.min())} to {int(groups.max())}."
        )


def _sums(values: Tensor, groups: Tensor, size: int) -> Tensor:
    return torch.zeros(size, dtype=values.dtype, device=values.device).index_add_(0, groups, values)


def loss_weights(
    advantage: Tensor, groups: Tensor, size: int, lengths: Tensor, normalizer: Normalizer, max_tokens: int
) -> tuple[Tensor, Tensor]:
    """The weight of every token of a rollout, and the denominator of the sum of weighted token losses.

    Groups whose advantages are all 0 do not count in the denominator. The denominators of several processes add up.

    Args:
        advantage: fp32 ``[R]``.
        groups: int64 ``[R]`` in ``[0, G)``: the prompt of each rollout.
        size: ``G``, the number of groups.
        lengths: int64 ``[R]``, the number of tokens of each rollout.
        normalizer: The denominator. ``"token"``: the number of tokens. ``"rollout"``: ``max_tokens`` per rollout, so
            that the tokens of a long rollout weigh no less (Dr. GRPO). ``"prompt"``: ``max_tokens`` per prompt, with
            the mean over its rollouts, so that a prompt weighs the same whatever their number.
        max_tokens: The largest number of tokens of a rollout.

    Returns:
        The weights, fp32 ``[R]``, and the denominator, a scalar; 0 if all advantages are 0.

    Raises:
        ValueError: If ``normalizer`` is unknown, ``size`` or ``max_tokens`` is out of its range, or the tensors
            differ in length; on a CPU also if a group is out of its range.

    Example:
        >>> groups, lengths = torch.tensor([0, 0, 1, 1]), torch.tensor([3, 5, 2, 2])
        >>> loss_weights(torch.tensor([0.5, -0.5, 0, 0]), groups, 2, lengths, "token", 8)
        (tensor([ 0.5000, -0.5000,  0.0000,  0.0000]), tensor(8.))
    """
    check_choice("normalizer", normalizer, get_args(Normalizer))
    check_integer("max_tokens", max_tokens, 1)
    check_groups(groups, size, advantage=advantage, lengths=lengths)
    informative = (_sums(advantage.abs(), groups, size) > 0).float()
    counts = informative.index_select(0, groups)
    if normalizer == "token":
        return advantage, (counts * lengths).sum()
    if normalizer == "rollout":
        return advantage, counts.sum() * max_tokens
    n = _sums(torch.ones_like(counts), groups, size).index_select(0, groups)
    return advantage / n, informative.sum() * max_tokens
