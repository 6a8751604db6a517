"""Load-balancing losses of mixtures of experts, over more than a micro-batch (arXiv 2501.11873).

A router gives each of ``N`` tokens to ``k`` of ``E`` experts. Expert ``i`` has been chosen ``c_i`` times, a share
``f_i = c_i / (k N)``, and ``P_i`` is its mean probability. The loss of a layer is ``E sum_i f_i P_i``, 1 where all
is balanced. Shares have no gradient, so that of tokens elsewhere only their counts are needed: what is to be balanced
may be larger than what a process holds.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def expert_counts(indices: Tensor, experts: int, mask: Tensor | None = None) -> Tensor:
    """How often each expert was chosen: int64 ``[E]``.

    Args:
        indices: int64 ``[N, k]``, the experts of each token; -1 for none.
        experts: ``E``.
        mask: bool ``[N]``, which tokens count; None for all.

    Raises:
        ValueError: If ``indices`` are no integers ``[N, k]``, or ``mask`` is not ``[N]``; on a CPU also if an expert
            is not below ``E``.

    Example:
        >>> expert_counts(torch.tensor([[0, 1], [0, 3]]), 4).tolist()
        [2, 1, 0, 1]
    """
    _check(indices, experts, mask)
    counted = indices >= 0 if mask is None else (indices >= 0) & mask[:, None].bool()
    counts = torch.zeros(experts, dtype=torch.int64, device=indices.device)
    return counts.scatter_add_(0, indices.clamp(min=0).flatten(), counted.long().flatten())


def _check(indices: Tensor, experts: int, mask: Tensor | None) -> None:
    if indices.dim() != 2 or indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"Argument `indices` must be int64 [N, k], but got {indices.dtype} {list(indices.shape)}.")
    if mask is not None and mask.shape != indices.shape[:1]:
        raise ValueError(f"Argument `mask` must be bool [{len(indices)}], but got {list(mask.shape)}.")
    if indices.device.type == "cpu" and indices.numel() and int(indices.max()) >= experts:  # elsewhere it would wait
        raise ValueError(f"Argument `indices` must be below {experts}, but has {int(indices.max())}.")


def shares(counts: Tensor) -> Tensor:
    """Shares of choices, fp32, of counts ``[..., E]``; 0 where there were none.

    Example:
        >>> shares(torch.tensor([2, 1, 0, 1])).tolist()
        [0.5, 0.25, 0.0, 0.25]
    """
    counts = counts.float()
    return counts / counts.sum(-1, keepdim=True).clamp(min=1)


def probabilities(logits: Tensor, scores: str = "softmax") -> Tensor:
    """fp32 probabilities ``[N, E]`` of a router: of all experts, not only those that were chosen.

    Args:
        logits: ``[N, E]``.
        scores: ``"softmax"``; ``"sigmoid"``, scaled to sum to 1 (as in DeepSeek-V3, arXiv 2412.19437, eq. 17 to 20);
            or ``"none"`` where they are probabilities already.

    Raises:
        ValueError: If ``scores`` is something else.
    """
    if scores not in ("softmax", "sigmoid", "none"):
        raise ValueError(f"Argument `scores` must be 'softmax', 'sigmoid' or 'none', but got {scores!r}.")
    if scores == "softmax":
        return logits.float().softmax(-1)
    p = logits.float().sigmoid() if scores == "sigmoid" else logits.float()
    return p / p.sum(-1, keepdim=True).clamp(min=1e-20)


def load_balancing_loss(f: Tensor, p: Tensor) -> Tensor:
    """``E sum_i f_i P_i`` (arXiv 2501.11873, eq. 2).

    Args:
        f: fp32 ``[..., E]``, shares of the choices, of whatever is to be balanced.
        p: fp32 ``[..., E]``, mean probabilities of the tokens at hand.

    Example:
        >>> load_balancing_loss(torch.tensor([0.5, 0.5, 0.0, 0.0]), torch.tensor([0.4, 0.4, 0.1, 0.1]))
        tensor(1.6000)
    """
    return f.size(-1) * (f.detach() * p).sum(-1)


def sequence_loss(p: Tensor, indices: Tensor, sequences: int, mask: Tensor | None = None) -> Tensor:
    """The loss of each sequence by its own shares, averaged over those that have a token.

    Args:
        p: ``[N, E]``, with the tokens of a sequence side by side.
        indices: int64 ``[N, k]``.
        sequences: ``S``, of equal length.
        mask: bool ``[N]``.

    Raises:
        ValueError: As :func:`expert_counts`, and if the tokens are not ``sequences`` times as many.
    """
    experts = p.size(-1)
    _check(indices, experts, mask)
    if sequences < 1 or len(p) % sequences or len(p) != len(indices):
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
    loss = load_balancing_loss(shares(chosen.view(sequences, -1, experts).sum(1)), mean)
    return loss.sum() / (tokens > 0).sum().clamp(min=1)


def z_loss(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean square of the log of the sum of exponentials of a router's logits ``[N, E]`` (arXiv 2202.08906, eq. 5)."""
    if mask is None:
        return logits.float().logsumexp(-1).square().mean()
    if mask.shape != logits.shape[:1]:
        raise ValueError(f"Argument `mask` must be bool [{len(logits)}], but got {list(mask.shape)}.")
    square = logits.float().masked_fill(~mask[:, None].bool(), 0).logsumexp(-1).square()  # padding may be NaN
    return (square * mask).sum() / mask.sum().clamp(min=1)


def projection(f: Tensor, p: Tensor) -> Tensor:
    """``E <f - u, P - u>`` with ``u = 1 / E``: by how much the loss exceeds 1, and not whether all is balanced."""
    u = 1 / f.size(-1)
    return f.size(-1) * ((f - u) * (p - u)).sum(-1)


@dataclass
class Window:
    """What routers did in the micro-batches between two steps of the optimizer.

    The shares of a micro-batch are those of the window so far (the paper's buffer). With ``warm``, an estimate stands
    for the micro-batches that are still to come: with ``s`` the counts after ``a`` of ``A``, and ``m`` the average
    micro-batch of earlier windows, each of which counts half as much as the next, each to come is
    ``m + (a m - s) / 2 A``. Were they drawn independently it would be ``m``, and were they what is left of an average
    window, ``(A m - s) / (A - a)``: this is between them.

    Attributes:
        warm: Whether there is one.
        counts: int64 ``[L, E + 1]``: choices of each expert, and tokens last; None before the first micro-batch.
        size: Micro-batches so far.
        average: fp32 ``[L, E + 1]``, of a micro-batch of earlier windows; None in the first.
        closed: Whether the optimizer has stepped, so that what comes next begins another.
    """

    warm: bool = False
    counts: Tensor | None = None
    size: int = 0
    average: Tensor | None = None
    closed: bool = True

    def add(self, counts: Tensor, length: int) -> Tensor:
        """Enter a micro-batch, and give the shares it is balanced by: fp32 ``[L, E]``.

        Args:
            counts: int64 ``[L, E + 1]``.
            length: ``A``, micro-batches that the window is expected to have.
        """
        if self.closed:
            if self.counts is not None:
                mean = self.counts / self.size
                self.average = mean if self.average is None else (self.average + mean) / 2
            self.counts, self.size, self.closed = None, 0, False
        self.counts = counts if self.counts is None else self.counts + counts
        self.size += 1
        rest = length - self.size
        if not self.warm or self.average is None or rest <= 0:
            return self.shares()
        each = self.average + (self.size * self.average - self.counts) / (2 * length)
        return shares((self.counts + rest * each)[:, :-1])

    def shares(self) -> Tensor:
        """Of the window so far: fp32 ``[L, E]``."""
        assert self.counts is not None
        return shares(self.counts[:, :-1])

    def state_dict(self) -> dict[str, Any]:
        """Everything but ``warm``, on the CPU."""
        tensors = {"counts": self.counts, "average": self.average}
        return {name: None if t is None else t.cpu() for name, t in tensors.items()} | {
            "size": self.size,
            "closed": self.closed,
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on with it."""
        self.counts, self.average = (None if t is None else t.to(device) for t in (state["counts"], state["average"]))
        self.size, self.closed = state["size"], state["closed"]
