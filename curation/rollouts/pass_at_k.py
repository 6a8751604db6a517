"""The probability that one of ``k`` rollouts succeeds, estimated from more of them (arXiv 2107.03374, eq. 1)."""

import torch
from torch import Tensor

from curation.checks import check_integer


def pass_at_k(correct: Tensor, n: int, k: int) -> Tensor:
    r"""The unbiased estimate of pass@k of each prompt: fp64 ``[P]``.

    .. math:: 1 - \binom{n - c}{k} \Big/ \binom{n}{k}

    It holds only where the number of rollouts was fixed in advance, hence one ``n`` for all prompts: where prompts
    that fail at first get more rollouts, it is too low.

    Args:
        correct: ``[P]``, the number ``c`` of correct rollouts of each prompt, in [0, n].
        n: Number of rollouts of every prompt.
        k: Number of rollouts of which one is to succeed, in [1, n].

    Raises:
        ValueError: If ``n`` is not a positive integer, ``k`` is not in [1, n], or a count is not in [0, n].

    Example:
        >>> pass_at_k(torch.tensor([0, 1, 4]), 4, 2)
        tensor([0.0000, 0.5000, 1.0000], dtype=torch.float64)
    """
    check_integer("n", n, 1)
    check_integer("k", k, 1)
    if k > n:
        raise ValueError(f"Argument `k` must be in [1, n = {n}], but got {k!r}.")
    c = correct.double()
    if not ((c >= 0) & (c <= n)).all():
        raise ValueError(f"Argument `correct` must be in [0, n = {n}], but has {c.min()} to {c.max()}.")
    i = torch.arange(k, dtype=torch.float64, device=c.device)
    return 1 - ((n - i - c[:, None]).clamp(min=0) / (n - i)).prod(1)
