"""Losses and gradient norms of each sample, from logits or from the head's input."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100  # the target of a position that is not scored


def compact(outputs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move the scored positions of each sample to the front and cut to the longest; the rest is zero.

    Padding and prompts then cost nothing and change nothing. Costs one host synchronisation where ``T > 1``.

    Args:
        outputs: ``[B, T, D]``.
        mask: bool ``[B, T]``, true where a position is scored.

    Returns:
        ``[B, n, D]`` and the numbers of scored positions, int64 ``[B]``; ``n`` is their maximum, at least 1.
    """
    order = _scored_first(mask)
    front = outputs.gather(1, order[..., None].expand(-1, -1, outputs.size(-1)))
    return front.masked_fill(~mask.gather(1, order)[..., None], 0), mask.sum(1)


def _scored_first(mask: Tensor) -> Tensor:
    """Positions, the scored ones in front, as many as the most of any sample: int64 ``[B, n]``."""
    n = max(1, int(mask.sum(1).max())) if mask.size(1) > 1 else 1
    return mask.int().argsort(dim=1, descending=True, stable=True)[:, :n]


def per_sample_loss(
    logits: Tensor, targets: Tensor | None, weight: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy of each sample, averaged over its scored positions.

    Args:
        logits: ``[B, T, V]`` or ``[B, C]``, any floating dtype; computed in fp32, one sample ``[T, V]`` at a time;
            with ``targets=None`` the losses ``[B]`` themselves.
        targets: int64 ``[B, T]`` or ``[B]``; -100 is ignored.
        weight: Floating ``[V]``, weights of the classes; None for equal ones.
        label_smoothing: Share of the target that is spread over all classes, in [0, 1].

    Returns:
        fp32 ``[B]``; NaN for a sample with no scored position.

    Example:
        >>> per_sample_loss(torch.zeros(2, 3, 8), torch.tensor([[-100, 1, 2], [0, 0, 0]]))
        tensor([2.0794, 2.0794])
    """
    if targets is None:
        return logits.float()
    if targets.dim() == 1:
        return _cross_entropy(logits, targets, weight, label_smoothing, "none")
    if weight is None:
        losses = [_cross_entropy(x, t, None, label_smoothing, "mean") for x, t in zip(logits, targets, strict=True)]
        return torch.stack(losses)
    losses = [_cross_entropy(x, t, weight, label_smoothing, "sum") for x, t in zip(logits, targets, strict=True)]
    return torch.stack(losses) / targets.ne(IGNORED).sum(1)


def _cross_entropy(
    logits: Tensor, targets: Tensor, weight: Tensor | None, smoothing: float, reduction: str
) -> Tensor:
    weight = None if weight is None else weight.float()
    return F.cross_entropy(
        logits.float(), targets, weight, ignore_index=IGNORED, reduction=reduction, label_smoothing=smoothing
    )


def per_sample_grad_norm(
    logits: Tensor, targets: Tensor, weight: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """Norm of the gradient of each sample's loss with respect to its logits, ``||softmax - onehot|| / n``.

    Up to a constant an upper bound of the norm with respect to all parameters (arXiv 1803.00942, sec. 3.2).

    Args:
        logits: ``[B, T, V]`` or ``[B, C]``, any floating dtype; computed in fp32, one sample ``[T, V]`` at a time.
        targets: int64 ``[B, T]`` or ``[B]``; -100 is ignored.
        weight: Floating ``[V]``, weights of the classes; None for equal ones.
        label_smoothing: Share of the target that is spread over all classes, in [0, 1].

    Returns:
        fp32 ``[B]``; NaN for a sample with no scored position.

    Example:
        >>> per_sample_grad_norm(torch.zeros(1, 2), torch.tensor([0]))
        tensor([0.7071])
    """

    def squares(x: Tensor, t: Tensor) -> Tensor:
        p = x.float().softmax(-1)
        scored = t.ne(IGNORED)
        t = t.masked_fill(~scored, 0)
        p_target = p.gather(-1, t[..., None])[..., 0]
        if weight is None and not label_smoothing:
            squared_norm = torch.linalg.vector_norm(p, dim=-1).square()  # without a tensor of squares
            return (squared_norm - 2 * p_target + 1).clamp(min=0) * scored
        # The loss is -sum_c a_c log p_c, and its gradient is p sum_c a_c - a.
        w = p.new_ones(p.size(-1)) if weight is None else weight.float()
        spread = w * (label_smoothing / p.size(-1))
        a = spread.expand_as(p).scatter_add(-1, t[..., None], (1 - label_smoothing) * w[t][..., None])
        return (p * a.sum(-1, keepdim=True) - a).square().sum(-1) * scored

    scored = targets.ne(IGNORED)
    if targets.dim() == 1:
        return squares(logits, targets).sqrt().masked_fill(~scored, torch.nan)
    total = torch.stack([squares(x, t).sum() for x, t in zip(logits, targets, strict=True)])
    return total.sqrt() / scored.sum(1).float().masked_fill(~scored.any(1), torch.nan)


def per_sample_from_hidden(
    value: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, targets: Tensor, head: nn.Linear
) -> Tensor:
    """A value of ``head(hidden)``, with the logits of one sample's scored positions at a time.

    Costs one host synchronisation.

    Args:
        value: :func:`per_sample_loss` or :func:`per_sample_grad_norm`, or a partial application of one of them.
        hidden: ``[B, T, d]`` or ``[B, d]``, the head's input.
        targets: int64 ``[B, T]`` or ``[B]``.
        head: The output layer.

    Returns:
        fp32 ``[B]``; NaN for a sample with no scored position.

    Example:
        >>> head, hidden, targets = nn.Linear(3, 8), torch.randn(2, 5, 3), torch.zeros(2, 5, dtype=torch.int64)
        >>> loss = per_sample_from_hidden(per_sample_loss, hidden, targets, head)
        >>> torch.allclose(loss, per_sample_loss(head(hidden), targets))
        True
    """
    if targets.dim() == 1:
        return value(head(hidden.to(head.weight.dtype)), targets)
    order = _scored_first(targets.ne(IGNORED))
    rows = hidden.gather(1, order[..., None].expand(-1, -1, hidden.size(-1)))
    labels = targets.gather(1, order)
    return torch.cat([value(head(h)[None], t[None]) for h, t in zip(rows.to(head.weight.dtype), labels, strict=True)])
