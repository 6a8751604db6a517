r"""Load-balancing losses of mixtures of experts, over more than a micro-batch (arXiv 2501.11873).

A router gives each of ``N`` tokens to ``k`` of ``E`` experts. Expert ``i`` is chosen ``c_i`` times, which is the
fraction ``f_i = c_i / (k N)`` of all choices; ``P_i`` is its mean probability. The loss of a layer is

.. math:: E \sum_{i=1}^{E} f_i P_i

and 1 where all experts are used alike. Fractions have no gradient: of tokens elsewhere only the counts are needed, so
that the tokens over which a layer is balanced may be more than a process holds.
"""

import torch
from torch import Tensor

from curation.checks import check_choice, check_integer, check_number


def expert_counts(indices: Tensor, experts: int, mask: Tensor | None = None) -> Tensor:
    """How often each expert was chosen.

    Args:
        indices: int64 ``[N, k]``, the experts of each token; -1 for none.
        experts: Number of experts ``E``.
        mask: bool ``[N]``, True for tokens that count; None if all do.

    Returns:
        int64 ``[E]``.

    Raises:
        ValueError: If ``experts`` is no positive integer, ``indices`` are no integers ``[N, k]``, or ``mask`` is not
            ``[N]``; on a CPU also if an expert is not below ``E``.

    Example:
        >>> expert_counts(torch.tensor([[0, 1], [0, 3]]), 4).tolist()
        [2, 1, 0, 1]
    """
    check_integer("experts", experts, 1)
    _check_choices(indices, experts, mask)
    counted = indices >= 0 if mask is None else (indices >= 0) & mask[:, None].bool()
    counts = torch.zeros(experts, dtype=torch.int64, device=indices.device)
    return counts.scatter_add_(0, indices.clamp(min=0).flatten(), counted.long().flatten())


def _check_choices(indices: Tensor, experts: int, mask: Tensor | None) -> None:
    if indices.dim() != 2 or indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"Argument `indices` must be int64 [N, k], but got {indices.dtype} {list(indices.shape)}.")
    if mask is not None and mask.shape != indices.shape[:1]:
        raise ValueError(f"Argument `mask` must be bool [{len(indices)}], but got {list(mask.shape)}.")
    if indices.device.type == "cpu" and indices.numel() and int(indices.max()) >= experts:  # elsewhere it would wait
        raise ValueError(f"Argument `indices` must be below {experts}, but has {int(indices.max())}.")


def expert_fractions(counts: Tensor) -> Tensor:
    """The fraction ``f_i`` of the choices that fell on each expert.

    Args:
        counts: ``[..., E]``, how often each expert was chosen.

    Returns:
        fp32 ``[..., E]``, which sums to 1; 0 where nothing was chosen.

    Example:
        >>> expert_fractions(torch.tensor([2, 1, 0, 1])).tolist()
        [0.5, 0.25, 0.0, 0.25]
    """
    counts = counts.float()
    return counts / counts.sum(-1, keepdim=True).clamp(min=1)


def probabilities(logits: Tensor, scores: str = "softmax") -> Tensor:
    """The probabilities of a router, for all experts and not only those that were chosen.

    Args:
        logits: ``[N, E]``.
        scores: ``"softmax"``; ``"sigmoid"``, scaled to sum to 1 (as in DeepSeek-V3, arXiv 2412.19437, eq. 17 to 20);
            ``"sqrtsoftplus"``, the square root of a softplus, scaled alike (DeepSeek-V4); or ``"none"`` where
            ``logits`` are probabilities already.

    Returns:
        fp32 ``[N, E]``.

    Raises:
        ValueError: If ``scores`` is something else.

    Example:
        >>> probabilities(torch.tensor([[0.0, 0.0]]), "sigmoid")
        tensor([[0.5000, 0.5000]])
    """
    check_choice("scores", scores, ("softmax", "sigmoid", "sqrtsoftplus", "none"))
    if scores == "softmax":
        return logits.float().softmax(-1)
    p = raw_scores(logits, scores)
    return p / p.sum(-1, keepdim=True).clamp(min=1e-20)


def raw_scores(logits: Tensor, scores: str) -> Tensor:
    """The scores of a router that treats each expert by itself, before they are scaled to sum to 1.

    Args:
        logits: ``[N, E]``.
        scores: ``"sigmoid"``, ``"sqrtsoftplus"`` or ``"none"``, see :func:`probabilities`.

    Returns:
        fp32 ``[N, E]``.
    """
    logits = logits.float()
    if scores == "sqrtsoftplus":
        return torch.nn.functional.softplus(logits.clamp(min=-80)).sqrt()  # below, its derivative is no number
    return logits.sigmoid() if scores == "sigmoid" else logits


def load_balancing_loss(f: Tensor, p: Tensor) -> Tensor:
    r"""The load-balancing loss of a layer (arXiv 2501.11873, eq. 2; the Switch Transformer, arXiv 2101.03961, eq. 4).

    .. math:: E \sum_{i=1}^{E} f_i P_i

    Args:
        f: fp32 ``[..., E]``, fractions of the choices, over the tokens that are to be balanced. No gradient.
        p: fp32 ``[..., E]``, mean probabilities of the tokens at hand.

    Returns:
        fp32 ``[...]``.

    Example:
        >>> load_balancing_loss(torch.tensor([0.5, 0.5, 0.0, 0.0]), torch.tensor([0.4, 0.4, 0.1, 0.1]))
        tensor(1.6000)
    """
    return f.size(-1) * (f.detach() * p).sum(-1)


def excess_loss(f: Tensor, p: Tensor) -> Tensor:
    r"""How far the load-balancing loss exceeds 1.

    .. math:: E \sum_{i=1}^{E} (f_i - 1 / E) (P_i - 1 / E)

    It may be 0 or less without balance, since ``f`` and ``P`` may differ.

    Args:
        f: fp32 ``[..., E]``, fractions of the choices.
        p: fp32 ``[..., E]``, mean probabilities.

    Returns:
        fp32 ``[...]``.

    Example:
        >>> excess_loss(torch.tensor([0.5, 0.5, 0.0, 0.0]), torch.tensor([0.4, 0.4, 0.1, 0.1]))
        tensor(0.6000)
    """
    even = 1 / f.size(-1)
    return f.size(-1) * ((f - even) * (p - even)).sum(-1)


def sequence_loss(p: Tensor, indices: Tensor, sequences: int, mask: Tensor | None = None) -> Tensor:
    """The load-balancing loss of each sequence by its own fractions, mean over sequences with tokens that count.

    Args:
        p: ``[N, E]``, probabilities; the tokens of a sequence follow each other.
        indices: int64 ``[N, k]``, the experts of each token; -1 for none.
        sequences: Number of sequences, of equal length.
        mask: bool ``[N]``, True for tokens that count; None if all do.

    Returns:
        fp32 scalar.

    Raises:
        ValueError: As :func:`expert_counts`, and if ``sequences`` is no positive integer that divides ``N``.

    Example:
        >>> p = torch.tensor([[0.75, 0.25], [0.75, 0.25], [0.25, 0.75], [0.25, 0.75]])
        >>> sequence_loss(p, torch.tensor([[0], [0], [1], [1]]), sequences=2)
        tensor(1.5000)
    """
    experts = p.size(-1)
    _check_choices(indices, experts, mask)
    check_integer("sequences", sequences, 1)
    if len(p) % sequences or len(p) != len(indices):
        raise ValueError(
            f"Argument `sequences` must divide the tokens of `p` and `indices`, {len(p)} and {len(indices)}, but got "
            f"{sequences!r}."
        )
    if mask is None:
        weight = torch.ones(len(p), device=p.device)
    else:
        weight, p = mask.float(), p.masked_fill(~mask[:, None].bool(), 0)  # padding may be NaN
    counted = weight[:, None] * (indices >= 0)
    chosen = torch.zeros(p.shape, device=p.device).scatter_add_(1, indices.clamp(min=0), counted)
    tokens = weight.view(sequences, -1).sum(1)
    mean = (p * weight[:, None]).view(sequences, -1, experts).sum(1) / tokens.clamp(min=1)[:, None]
    loss = load_balancing_loss(expert_fractions(chosen.view(sequences, -1, experts).sum(1)), mean)
    return loss.sum() / (tokens > 0).sum().clamp(min=1)


def z_loss(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""The router z-loss, which keeps logits small (arXiv 2202.08906, eq. 5).

    .. math:: \frac{1}{N} \sum_{t=1}^{N} \left( \log \sum_{i=1}^{E} e^{x_{t,i}} \right)^2

    Args:
        logits: ``[N, E]``.
        mask: bool ``[N]``, True for tokens that count; None if all do.

    Returns:
        fp32 scalar.

    Raises:
        ValueError: If ``mask`` is not ``[N]``.

    Example:
        >>> z_loss(torch.zeros(3, 2))  # log(2) squared
        tensor(0.4805)
    """
    if mask is None:
        return logits.float().logsumexp(-1).square().mean()
    if mask.shape != logits.shape[:1]:
        raise ValueError(f"Argument `mask` must be bool [{len(logits)}], but got {list(mask.shape)}.")
    square = logits.float().masked_fill(~mask[:, None].bool(), 0).logsumexp(-1).square()  # padding may be NaN
    return (square * mask).sum() / mask.sum().clamp(min=1)


def bias_update(counts: Tensor, rate: float) -> Tensor:
    r"""The step of a bias that is added for choosing alone (arXiv 2408.15664, algorithm 1).

    .. math:: u \operatorname{sign}(\bar{c} - c_i)

    Args:
        counts: ``[E]``, how often each expert was chosen.
        rate: Size ``u`` of the step.

    Returns:
        fp32 ``[E]``, positive where an expert was chosen less than the average.

    Raises:
        ValueError: If ``rate`` is not in [0, inf).

    Example:
        >>> bias_update(torch.tensor([2, 1, 0, 1]), 0.5).tolist()
        [-0.5, 0.0, 0.5, 0.0]
    """
    check_number("rate", rate, "[0, inf)")
    return rate * (counts.float().mean() - counts.float()).sign()
