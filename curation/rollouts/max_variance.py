"""Which answers of a group to update on: those whose rewards have the largest variance (PODS, arXiv 2504.13818)."""

import torch
from torch import Tensor

from curation.checks import check_integer
from curation.rollouts.advantages import check_groups


def max_variance(rewards: Tensor, groups: Tensor, size: int, m: int) -> Tensor:
    """For every group the ``m`` answers whose rewards have the largest variance: bool ``[R]``.

    These are some of the lowest and the rest of the highest rewards (PODS, theorem 1), so ``m + 1`` subsets are
    compared; of equal variances the one with fewer low rewards is taken, of equal rewards the first of the lowest and
    the last of the highest. Costs a sort, and ``m`` steps over the groups at once.

    Args:
        rewards: Floating ``[R]``, finite.
        groups: int64 ``[R]`` in ``[0, G)``: the prompt of each answer.
        size: ``G``, the number of groups.
        m: Number of answers to keep of a group; smaller groups are kept whole.

    Raises:
        ValueError: If ``m`` is not an integer >= 1, or the other arguments are not as in
            :func:`~curation.rollouts.advantages.advantages`.

    Example:
        >>> max_variance(torch.tensor([0.0, 1, 1, 1, 0, 0.5]), torch.tensor([0, 0, 0, 0, 1, 1]), 2, 2).tolist()
        [True, False, False, True, True, True]
    """
    check_integer("m", m, 1)
    check_groups(groups, size, rewards=rewards)
    by_reward = rewards.argsort(stable=True)
    order = by_reward[groups[by_reward].argsort(stable=True)]  # by group, in it by reward
    counts = torch.zeros(size, dtype=torch.int64, device=groups.device).index_add_(0, groups, torch.ones_like(groups))
    ends = counts.cumsum(0)
    starts, kept = ends - counts, counts.clamp(max=m)
    values = rewards[order].to(torch.float32 if rewards.device.type == "mps" else torch.float64)
    sums, squares = (torch.cat([x.new_zeros(1), x.cumsum(0)]) for x in (values, values.square()))
    best, low = torch.full_like(sums[ends], -1.0), torch.zeros_like(counts)
    for i in range(m + 1):
        taken = kept.clamp(max=i)
        total, square = (x[starts + taken] - x[starts] + x[ends] - x[ends - kept + taken] for x in (sums, squares))
        variance = square / kept.clamp(min=1) - (total / kept.clamp(min=1)).square()
        better = variance > best + 1e-9  # sums of equal rewards differ by rounding
        best, low = torch.where(better, variance, best), torch.where(better, taken, low)
    sorted_groups = groups[order]
    place = torch.arange(len(order), device=order.device) - starts[sorted_groups]
    chosen = (place < low[sorted_groups]) | (place >= (counts - kept + low)[sorted_groups])
    return torch.zeros_like(chosen).scatter(0, order, chosen)
