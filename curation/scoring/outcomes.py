"""How well a forward pass did on each sample: loss, margin, probability of the label, and the class in its place."""

from collections.abc import Callable

import torch
from torch import Tensor

from curation.scoring.losses import IGNORED, per_sample_loss

OUTCOMES = ("loss", "margin", "probability", "right", "label", "rival", "rival_probability", "worst")


def row_outcomes(
    logits: Tensor, targets: Tensor, loss: Callable[[Tensor, Tensor], Tensor] = per_sample_loss
) -> Tensor:
    """The columns :data:`OUTCOMES` of each sample.

    For a class ``y`` of logits ``z``: the loss; the margin ``z_y - max_{c != y} z_c`` (arXiv 2001.10528, eq. 1); the
    probability of ``y``; 1 where the margin is positive; ``y``; the largest other class and its probability; 0. For a
    sequence: the means of loss, margin and probability over its scored positions; 1 where more than half of the
    margins are positive; -1, -1, 0; and which of its scored positions has the least probability, from 0.

    Args:
        logits: ``[B, C]`` or ``[B, T, V]``, any floating dtype; computed in fp32, of sequences one at a time.
        targets: int64 ``[B]`` or ``[B, T]``; -100 is not scored.
        loss: Function of both that gives the losses, fp32 ``[B]``.

    Returns:
        fp32 ``[B, 8]``, in which classes are exact below 2^24; the loss is NaN where nothing is scored.

    Example:
        >>> row_outcomes(torch.tensor([[3.0, 1.0, 0.0]]), torch.tensor([1]))[0, [1, 3, 4, 5]]
        tensor([-2.,  0.,  1.,  0.])
    """
    losses = loss(logits, targets)
    scored = targets.ne(IGNORED)
    if targets.dim() == 1:
        margin, probability, rival, rival_probability = _of_labels(logits, targets)
        label, worst = targets.float(), torch.zeros_like(losses)
        columns = [losses, margin, probability, margin.gt(0).float(), label, rival, rival_probability, worst]
        return torch.stack(columns, 1).where(scored[:, None], torch.nan)
    return torch.stack([_of_sequence(*row) for row in zip(losses, logits, targets, scored, strict=True)])


def losses_alone(losses: Tensor) -> Tensor:
    """The columns :data:`OUTCOMES`, fp32 ``[B, 8]``, of samples of which only the losses ``[B]`` are known."""
    unknown = losses.new_tensor([torch.nan, torch.nan, 0, -1, -1, 0, 0]).expand(len(losses), -1)
    return torch.cat([losses[:, None], unknown], 1)


def _of_labels(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Margins, probabilities, largest other classes and their probabilities, each fp32 ``[n]``."""
    logits, labels = logits.float(), targets.clamp(min=0)
    own = logits.gather(1, labels[:, None])[:, 0]
    best, classes = logits.topk(2)
    is_best = classes[:, 0] == labels
    other = torch.where(is_best, best[:, 1], best[:, 0])
    rival = torch.where(is_best, classes[:, 1], classes[:, 0])
    total = logits.logsumexp(1)
    return own - other, (own - total).exp(), rival.float(), (other - total).exp()


def _of_sequence(loss: Tensor, logits: Tensor, targets: Tensor, scored: Tensor) -> Tensor:
    margin, probability, _, _ = _of_labels(logits, targets)
    count = scored.sum()
    mean_margin, mean, right = (
        (values * scored).sum() / count for values in (margin, probability, margin.gt(0).float())
    )
    place = probability.masked_fill(~scored, torch.inf).argmin()
    worst = (scored.cumsum(0)[place] - 1).float()
    none = torch.zeros_like(loss)
    return torch.stack([loss, mean_margin, mean, right.gt(0.5).float(), none - 1, none - 1, none, worst])
