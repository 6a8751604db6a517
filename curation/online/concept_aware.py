"""The diversity objective of concept-aware batches on candidates that are on the device (arXiv 2511.20643)."""

import torch
from torch import Tensor

from curation.checks import check_integer


def diverse_rows(concepts: Tensor, k: int, targets: Tensor) -> Tensor:
    """:func:`curation.samplers.concept_choice.choose_diverse` without a host synchronisation.

    Costs ``k`` passes over ``[B, P]``; on a CPU the queue of the other function is far faster.

    Args:
        concepts: Integers ``[B, P]``, the concepts of each candidate, -1 where it has fewer than ``P``.
        k: Number of rows to choose, in [0, B].
        targets: Floating ``[V]``, wanted number of samples with each concept; sums are taken in its dtype.

    Returns:
        int64 ``[k]``, in the order of choice.

    Raises:
        ValueError: If ``k`` is not an integer in [0, B].

    Example:
        >>> diverse_rows(torch.tensor([[0, -1], [0, -1], [1, 2]]), 2, torch.ones(3)).tolist()
        [2, 0]
    """
    size = len(concepts)
    check_integer("k", k, 0, size + 1)
    ids, present = concepts.clamp(min=0).long(), concepts >= 0
    target = targets[ids]
    present_and_wanted = present & (target > 0)
    target = target.where(present_and_wanted, 1)
    ones = present.to(targets.dtype)
    frequencies = torch.zeros_like(targets).index_add_(0, ids.flatten(), ones.flatten())
    rarity = 1 / frequencies.clamp(min=1)[ids]
    sizes = present.sum(1).clamp(min=1)
    counts, rounds = torch.zeros_like(targets), targets.new_ones(())
    remaining = torch.ones(size, dtype=torch.bool, device=concepts.device)
    rows = torch.empty(k, dtype=torch.int64, device=concepts.device)
    for step in range(k):
        n = counts[ids]
        needed = (n / target).floor() + 1
        needed = needed + (n >= needed * target).int()
        needed = needed - ((needed > 1) & (n < (needed - 1) * target)).int()
        nearest = needed.where(present_and_wanted & remaining[:, None], torch.inf).min()
        rounds = torch.maximum(rounds, nearest).where(nearest.isfinite(), rounds)  # the targets grow
        goal = rounds * target
        gains = ((goal - n) / goal + rarity).where(present_and_wanted & (n < goal), 0)
        row = (gains.sum(1) / sizes).where(remaining, -1).argmax().view(1)
        rows[step : step + 1] = row
        remaining.index_fill_(0, row, False)
        counts.index_add_(0, ids.index_select(0, row)[0], ones.index_select(0, row)[0])
    return rows
