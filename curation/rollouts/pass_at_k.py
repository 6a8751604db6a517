"""The chance that one of ``k`` rollouts is right, from more of them (arXiv 2107.03374, eq. 1)."""

import torch
from torch import Tensor


def pass_at_k(correct: Tensor, n: int, k: int) -> Tensor:
    """``1 - C(n - c, k) / C(n, k)`` of each prompt, without bias: fp64 ``[P]``.

    Only for groups whose number of rollouts was fixed in advance: where prompts that begin badly get more, it is too
    low. Hence one ``n`` for all.

    Args:
        correct: ``[P]``, right ones of the ``n`` rollouts of each prompt.
        n: Rollouts of every prompt.
        k: At most ``n``.

    Raises:
        ValueError: If ``k`` is not in [1, n], or a count not in [0, n].

    Example:
        >>> pass_at_k(torch.tensor([0, 1, 4]), 4, 2)
        tensor([0.0000, 0.5000, 1.0000], dtype=torch.float64)
    """
    if not 1 <= k <= n:
        raise ValueError(f"Argument `k` must be in [1, n = {n}], but got {k!r}.")
    c = correct.double()
    if not ((c >= 0) & (c <= n)).all():
        raise ValueError(f"Argument `correct` must be in [0, n = {n}], but has {c.min()} to {c.max()}.")
    i = torch.arange(k, dtype=torch.float64, device=c.device)
    return 1 - ((n - i - c[:, None]).clamp(min=0) / (n - i)).prod(1)
