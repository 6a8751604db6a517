"""The statistics of a router in a micro-batch from which its losses are computed."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curation.experts.load_balancing import excess_loss, expert_counts, sequence_loss, z_loss
from curation.experts.routers import Router


@dataclass
class RouterStatistics:
    """What a router did in a micro-batch of ``N`` tokens that count, in all its calls.

    Attributes:
        counts: int64 ``[E]``, how often each expert was chosen.
        tokens: int64 scalar ``N``.
        probabilities: fp32 ``[E]``, the mean probability ``P_i`` of each expert, with gradient.
        sequence_loss: fp32 scalar, the loss of the sequences, with gradient; 0 if it was not asked for.
        z_loss: fp32 scalar, with gradient; 0 if it was not asked for.
    """

    counts: Tensor
    tokens: Tensor
    probabilities: Tensor
    sequence_loss: Tensor
    z_loss: Tensor


def router_statistics(
    router: Router, outputs: list[Any], mask: Tensor | None = None, sequences: bool = False, z: bool = False
) -> RouterStatistics:
    """The statistics of a router over its calls in a micro-batch.

    Args:
        router: The router.
        outputs: Its outputs, one for each call.
        mask: ``[B, T]`` or flat, not 0 for tokens that count; None if all do.
        sequences: Whether to compute the loss of the sequences, the rows of ``mask``.
        z: Whether to compute the z-loss.

    Raises:
        TypeError: If there are no logits in an output.
        ValueError: If the scores of the router are unknown, ``z`` is True for one that returns probabilities,
            ``mask`` has not one value for each token, or is not ``[B, T]`` where ``sequences`` is True.

    Example:
        >>> router = Router("gate", nn.Linear(2, 2), top_k=1, scores="none")
        >>> statistics = router_statistics(router, [torch.tensor([[0.75, 0.25], [0.25, 0.75], [0.5, 0.5]])])
        >>> statistics.counts.tolist(), statistics.tokens.item(), statistics.probabilities.tolist()
        ([2, 1], 3, [0.5, 0.5])
    """
    if sequences and (mask is None or mask.dim() != 2):
        raise ValueError("Argument `mask` must give [B, T] with the scope 'sequence', to know where sequences end.")
    calls = [_statistics_of_call(router, output, mask, sequences, z) for output in outputs]
    tokens = torch.stack([call.tokens for call in calls]).sum()
    totals = torch.stack([call.probabilities for call in calls]).sum(0)
    z_losses = torch.stack([call.z_loss * call.tokens for call in calls]).sum()
    return RouterStatistics(
        counts=torch.stack([call.counts for call in calls]).sum(0),
        tokens=tokens,
        probabilities=totals / tokens.clamp(min=1),
        sequence_loss=torch.stack([call.sequence_loss for call in calls]).mean(),
        z_loss=z_losses / tokens.clamp(min=1),
    )


def _statistics_of_call(
    router: Router, output: Any, mask: Tensor | None, sequences: bool, z: bool
) -> RouterStatistics:
    """The same for one call, but with sums of probabilities."""
    logits, indices = router.read(output)
    flat = None if mask is None else mask.reshape(-1).bool()
    if mask is not None and mask.numel() != len(logits):
        raise ValueError(
            f"Argument `mask` must give one value for each token, but it gives {list(mask.shape)} and the "
            f"router {router.name} saw {len(logits)} tokens."
        )
    p = router.probabilities(logits, flat, output)
    if z and router.scores == "none":
        raise ValueError(
            f"Argument `z_coefficient` must be 0 where a router returns probabilities, as {router.name} does: its "
            "logits are unknown."
        )
    zero = p.new_zeros(())
    return RouterStatistics(
        counts=expert_counts(indices, p.size(1), flat),
        tokens=torch.full((), len(p), device=p.device) if flat is None else flat.sum(),
        probabilities=p.sum(0),
        sequence_loss=sequence_loss(p, indices, len(mask), flat) if sequences and mask is not None else zero,
        z_loss=z_loss(logits, flat) if z else zero,
    )


def stack_counts(statistics: list[RouterStatistics]) -> Tensor:
    """Choices of each expert, and the tokens in the last column.

    Args:
        statistics: The statistics of ``L`` routers.

    Returns:
        int64 ``[L, E + 1]``; 0 where a router has fewer than ``E`` experts.
    """
    width = max(len(each.counts) for each in statistics)
    rows = [nn.functional.pad(each.counts, (0, width - len(each.counts))) for each in statistics]
    return torch.cat([torch.stack(rows), torch.stack([each.tokens for each in statistics])[:, None]], 1)


@torch.no_grad()
def balance_metrics(f: Tensor, statistics: list[RouterStatistics]) -> dict[str, Tensor]:
    """How far the layers are from balance.

    Args:
        f: fp32 ``[L, E]``, fractions of the choices.
        statistics: The statistics of ``L`` routers.

    Returns:
        Scalars: ``max_load``, ``E max f`` of the worst layer; ``dead``, the fraction of experts that were not chosen;
        ``excess_loss``, see :func:`~curation.experts.load_balancing.excess_loss`; the last two are means over layers.
    """
    layers = [(f_i[: len(each.counts)], each.probabilities) for f_i, each in zip(f, statistics, strict=True)]
    return {
        "max_load": torch.stack([f_i.max() * len(f_i) for f_i, _ in layers]).max(),
        "dead": torch.stack([(f_i == 0).float().mean() for f_i, _ in layers]).mean(),
        "excess_loss": torch.stack([excess_loss(f_i, p) for f_i, p in layers]).mean(),
    }
