"""Advantages of rollouts in groups of any sizes, and what each token of them weighs in the loss."""

from typing import Literal

import torch
from torch import Tensor

Baseline = Literal["centred", "std", "rloo", "maxrl", "none"]
Normalizer = Literal["token", "rollout", "prompt"]


def advantages(rewards: Tensor, groups: Tensor, size: int, baseline: Baseline = "centred") -> Tensor:
    """The advantage of each rollout over its group: fp32 ``[R]``, 0 in a group whose rewards are all equal.

    Args:
        rewards: Floating ``[R]``, finite.
        groups: int64 ``[R]`` in ``[0, G)``: the prompt of each.
        size: ``G``.
        baseline: ``"centred"``, ``r - mean`` (Dr. GRPO, arXiv 2503.20783); ``"std"``, that over the group's standard
            deviation (GRPO, 2402.03300); ``"rloo"``, ``r`` less the mean of the others (2402.14740); ``"maxrl"``,
            ``(r - mean) / mean``, the gradient of log-accuracy (2602.02710); ``"none"``, ``r`` itself.

    Raises:
        ValueError: If ``baseline`` is unknown, or ``rewards`` and ``groups`` are not of one length; on a CPU also if
            a reward is not finite, or negative with ``"maxrl"``, or a group is not in its range.

    Example:
        >>> advantages(torch.tensor([1.0, 0, 0, 0, 1, 1]), torch.tensor([0, 0, 0, 0, 1, 1]), 2)
        tensor([ 0.7500, -0.2500, -0.2500, -0.2500,  0.0000,  0.0000])
    """
    _check_groups(groups, size, rewards=rewards)
    if rewards.device.type == "cpu" and len(rewards):  # elsewhere it would wait for the device
        wrong = rewards[~rewards.isfinite() | ((rewards < 0) & (baseline == "maxrl"))].tolist()
        if wrong:
            raise ValueError(
                f"Argument `rewards` must be finite, and >= 0 with the baseline 'maxrl', but has {wrong[0]} with "
                f"{baseline!r}."
            )
    r = rewards.to(torch.float32 if rewards.device.type == "mps" else torch.float64)
    n = _sums(torch.ones_like(r), groups, size).clamp(min=1)
    mean = _sums(r, groups, size) / n
    centred = r - mean.index_select(0, groups)
    variance = _sums(centred.square(), groups, size) / n
    teaches = variance > 1e-12 * (mean.square() + variance)  # equal rewards need not have their mean
    if baseline == "centred":
        scale = torch.ones_like(n)
    elif baseline == "std":
        scale = variance.rsqrt()
    elif baseline == "rloo":
        scale = n / (n - 1)
    elif baseline == "maxrl":
        scale = mean.reciprocal()
    elif baseline == "none":
        centred, scale = r, torch.ones_like(n)
    else:
        raise ValueError(f"Argument `baseline` must be centred, std, rloo, maxrl or none, but got {baseline!r}.")
    return (centred * torch.where(teaches, scale, 0).index_select(0, groups)).float()


def _check_groups(groups: Tensor, size: int, **others: Tensor) -> None:
    for name, values in others.items():
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
    """What every token of a rollout weighs, and what the sum of weighted token losses is divided by.

    Groups that teach nothing, with advantages all 0, do not count in the denominator. Of several processes, the
    denominators are added.

    Args:
        advantage: fp32 ``[R]``.
        groups: int64 ``[R]`` in ``[0, G)``.
        size: ``G``.
        lengths: int64 ``[R]``, tokens.
        normalizer: The denominator: ``"token"``, the tokens; ``"rollout"``, ``max_tokens`` for each rollout, so that
            a long one weighs no less per token (Dr. GRPO); ``"prompt"``, ``max_tokens`` for each prompt and rollouts
            averaged, so that a prompt weighs the same however many rollouts it has.
        max_tokens: A rollout may have.

    Returns:
        fp32 ``[R]`` and a scalar, 0 if nothing teaches.

    Raises:
        ValueError: If ``normalizer`` is unknown, or the arguments are not of one length; on a CPU also if a group is
            not in its range.
    """
    _check_groups(groups, size, advantage=advantage, lengths=lengths)
    teaches = (_sums(advantage.abs(), groups, size) > 0).float()
    counts = teaches.index_select(0, groups)
    if normalizer == "token":
        return advantage, (counts * lengths).sum()
    if normalizer == "rollout":
        return advantage, counts.sum() * max_tokens
    if normalizer == "prompt":
        n = _sums(torch.ones_like(counts), groups, size).index_select(0, groups)
        return advantage / n, teaches.sum() * max_tokens
    raise ValueError(f"Argument `normalizer` must be token, rollout or prompt, but got {normalizer!r}.")
