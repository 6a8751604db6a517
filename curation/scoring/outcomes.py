"""How well a forward pass did on each sample: loss, margin, probability of the label, and the class in its place."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from curation.scoring.losses import IGNORED

OUTCOMES = ("loss", "margin", "probability", "right", "label", "rival", "rival_probability", "worst")


def row_outcomes(logits: Tensor, targets: Tensor, loss: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
    """The columns :data:`OUTCOMES` of each sample.

    For a class ``y`` of logits ``z``: the loss; the margin ``z_y - max_{c != y} z_c`` (arXiv 2001.10528, eq. 1); the
    probability of ``y``; 1 where the margin is positive; ``y``; the largest other class and its probability; 0. For a
    sequence: the means of loss, margin and probability over its scored positions; 1 where more than half of the
    margins are positive; -1, -1, 0; and which of its scored positions has the least probability, from 0.

    Args:
        logits: ``[B, C]`` or ``[B, T, V]``, any floating dtype; computed in fp32, of sequences one at a time.
        targets: int64 ``[B]`` or ``[B, T]``; -100 is not scored.
        loss: Function of both that gives the losses, fp32 ``[B]``; None for the cross-entropy.

    Returns:
        fp32 ``[B, 8]``, in which classes are exact below 2^24; the loss is NaN where nothing is scored.

    Example:
        >>> row_outcomes(torch.tensor([[3.0, 1.0, 0.0]]), torch.tensor([1]))[0, [1, 3, 4, 5]]
        tensor([-2.,  0.,  1.,  0.])
    """
    scored = targets.ne(IGNORED)
    if targets.dim() == 1:
        of = _of_labels(logits, targets)
        right, label = of.margin.gt(0).float(), targets.float()
        none = torch.zeros_like(of.loss)
        rows = torch.stack(
            [of.loss, of.margin, of.probability, right, label, of.rival, of.rival_probability, none], 1
        ).where(scored[:, None], torch.nan)
    else:
        rows = torch.stack([_of_sequence(*row) for row in zip(logits, targets, scored, strict=True)])
    if loss is None:
        return rows
    losses = loss(logits, targets).where(rows[:, 0].isfinite(), torch.nan)
    return torch.cat([losses[:, None], rows[:, 1:]], 1)


def losses_alone(losses: Tensor) -> Tensor:
    """The columns :data:`OUTCOMES`, fp32 ``[B, 8]``, of samples of which only the losses ``[B]`` are known."""
    unknown = losses.new_tensor([torch.nan, torch.nan, 0, -1, -1, 0, 0]).expand(len(losses), -1)
    return torch.cat([losses[:, None], unknown], 1)


class _OfLabels(NamedTuple):
    """Of ``n`` labels, each fp32 ``[n]``."""

    loss: Tensor
    margin: Tensor
    probability: Tensor
    rival: Tensor
    rival_probability: Tensor


def _of_labels(logits: Tensor, targets: Tensor) -> _OfLabels:
    logits, labels = logits.float(), targets.clamp(min=0)
    own = logits.gather(1, labels[:, None])[:, 0]
    best, classes = logits.topk(2)
    is_best = classes[:, 0] == labels
    other = torch.where(is_best, best[:, 1], best[:, 0])
    rival = torch.where(is_best, classes[:, 1], classes[:, 0])
    total = logits.logsumexp(1)
    return _OfLabels(total - own, own - other, (own - total).exp(), rival.float(), (other - total).exp())


def _of_sequence(logits: Tensor, targets: Tensor, scored: Tensor) -> Tensor:
    of = _of_labels(logits, targets)
    count = scored.sum()
    kinds = (of.loss, of.margin, of.probability, of.margin.gt(0).float())
    loss, margin, probability, right = (values.where(scored, 0).sum() / count for values in kinds)
    place = of.probability.masked_fill(~scored, torch.inf).argmin()
    worst = (scored.cumsum(0)[place] - 1).float()
    none = torch.zeros_like(loss)
    return torch.stack([loss, margin, probability, right.gt(0.5).float(), none - 1, none - 1, none, worst])
