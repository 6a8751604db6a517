"""Log-probabilities of tokens from hidden states, with the logits of a few tokens in memory at a time.

The logits ``[N, V]`` of all tokens, their softmax and its gradient would be the largest tensors of a training step.
Here the backward pass computes the logits of each chunk again, at the cost of one more product with the head.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from curation.checks import check_integer, check_number
from curation.scoring import IGNORED


def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    chunk: int = 1024,
) -> Tensor:
    r"""Log-probability of each target token under a linear head, in ``O(chunk V)`` memory for any number of tokens.

    .. math:: \log \operatorname{softmax}((W h + b) / \tau)_t

    Logits are accumulated in fp32 and not rounded to the dtype of the model. Differentiable once, with respect to
    ``hidden``, ``weight`` and ``bias``. Under autocast, the factors of a product have the dtype of autocast, as in a
    linear layer, where the device can accumulate them in fp32 (CUDA), and fp32 elsewhere.

    Args:
        hidden: Floating ``[..., d]``, the input ``h`` of the head.
        weight: Floating ``[V, d]``, the weight ``W`` of the head.
        targets: int64 ``[...]`` in ``[0, V)``, the tokens ``t``; -100 is not scored.
        bias: Floating ``[V]``, the bias ``b`` of the head; None for a head without bias.
        temperature: Divisor ``tau`` of the logits.
        chunk: Number of tokens whose logits are in memory at a time.

    Returns:
        fp32 ``[...]``, fp64 for fp64 input; 0, without gradient, where a token is not scored.

    Raises:
        ValueError: If shapes or dtypes do not fit, or ``temperature`` or ``chunk`` is out of its range.

    Example:
        >>> token_log_probs(torch.zeros(2, 3), torch.ones(8, 3), torch.tensor([5, -100]))
        tensor([-2.0794,  0.0000])
    """
    _check(hidden, weight, bias, temperature, chunk)
    if targets.dtype != torch.int64 or targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"Argument `targets` must be int64 {list(hidden.shape[:-1])}, but got {targets.dtype} "
            f"{list(targets.shape)}."
        )
    rows = hidden.reshape(-1, hidden.size(-1))
    flat: Tensor = _TokenLogProbs.apply(rows, weight, bias, targets.reshape(-1), temperature, chunk)
    return flat.view(targets.shape)


@torch.no_grad()
def token_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, temperature: float = 1.0, chunk: int = 1024
) -> Tensor:
    """Entropy in nats of the next-token distribution at each position, without gradient.

    Args:
        hidden: Floating ``[..., d]``, the input of the head.
        weight: Floating ``[V, d]``, the weight of the head.
        bias: Floating ``[V]``, the bias of the head; None for a head without bias.
        temperature: Divisor of the logits.
        chunk: Number of positions whose logits are in memory at a time.

    Returns:
        fp32 ``[...]``, fp64 for fp64 input.

    Raises:
        ValueError: If shapes or dtypes do not fit, or ``temperature`` or ``chunk`` is out of its range.

    Example:
        >>> token_entropy(torch.zeros(1, 3), torch.ones(8, 3))
        tensor([2.0794])
    """
    _check(hidden, weight, bias, temperature, chunk)
    rows = hidden.reshape(-1, hidden.size(-1))
    factor, dtype = _dtypes(rows, weight)
    entropy = rows.new_empty(len(rows), dtype=dtype)
    for part, logits in _logits(rows, weight.to(factor), bias, temperature, chunk, dtype):
        entropy[part] = torch.special.entr(logits.softmax(1)).sum(1)
    return entropy.view(hidden.shape[:-1])


def _check(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, chunk: int) -> None:
    if hidden.dim() == 0 or not hidden.is_floating_point():
        raise ValueError(f"Argument `hidden` must be floating [..., d], but got {hidden.dtype} {list(hidden.shape)}.")
    if weight.dim() != 2 or weight.size(1) != hidden.size(-1):
        raise ValueError(f"Argument `weight` must be [V, {hidden.size(-1)}], but got {list(weight.shape)}.")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"Argument `bias` must be [{weight.size(0)}], but got {list(bias.shape)}.")
    check_number("temperature", temperature, "(0, inf)")
    check_integer("chunk", chunk, 1)


def _dtypes(hidden: Tensor, weight: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """The dtype of the factors of products, and the dtype that they are accumulated and returned in."""
    device = hidden.device.type
    factor = torch.promote_types(hidden.dtype, weight.dtype)
    if torch.is_autocast_enabled(device):
        factor = torch.get_autocast_dtype(device)
    dtype = torch.promote_types(factor, torch.float32)
    # Only CUDA accumulates in another dtype than that of the factors.
    return (factor if device == "cuda" else dtype), dtype


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    with torch.autocast(a.device.type, enabled=False):
        return torch.mm(a, b) if a.dtype == dtype else torch.mm(a, b, out_dtype=dtype)


def _logits(
    rows: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, chunk: int, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """The rows of each chunk, and their logits divided by the temperature, ``[n, V]``."""
    for start in range(0, len(rows), chunk):
        part = slice(start, start + chunk)
        logits = _product(rows[part].to(weight.dtype), weight.T, dtype)
        if bias is not None:
            logits += bias
        logits /= temperature
        yield part, logits


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, chunk: int
    ) -> Tensor:
        ctx.factor, dtype = _dtypes(rows, weight)
        ctx.temperature, ctx.chunk = temperature, chunk
        chosen, total = rows.new_empty(2, len(rows), dtype=dtype)
        scored = targets.ne(IGNORED)
        index = targets.where(scored, 0)[:, None]
        for part, logits in _logits(rows, weight.to(ctx.factor), bias, temperature, chunk, dtype):
            chosen[part] = logits.gather(1, index[part])[:, 0]
            total[part] = logits.logsumexp(1)
        ctx.save_for_backward(rows, weight, bias, targets, total)
        return (chosen - total).where(scored, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, bias, targets, total = ctx.saved_tensors
        for_rows, for_weight, for_bias = ctx.needs_input_grad[:3]
        factor, dtype = ctx.factor, total.dtype
        scored = targets.ne(IGNORED)
        index = targets.where(scored, 0)[:, None]
        grad = grad.where(scored, 0)[:, None] / ctx.temperature
        grad_rows = torch.empty_like(rows) if for_rows else None
        grad_weight = weight.new_zeros(weight.shape, dtype=dtype) if for_weight else None
        grad_bias = weight.new_zeros(len(weight), dtype=dtype) if for_bias else None
        head = weight.to(factor)
        for part, logits in _logits(rows, head, bias, ctx.temperature, ctx.chunk, dtype):
            # (onehot - softmax) times the gradient, in the memory of the logits
            slope = logits.sub_(total[part, None]).exp_().mul_(-grad[part]).scatter_add_(1, index[part], grad[part])
            if grad_bias is not None:
                grad_bias += slope.sum(0)
            slope = slope.to(factor)
            if grad_rows is not None:
                grad_rows[part] = _product(slope, head, dtype)
            if grad_weight is not None:
                grad_weight += _product(slope.T, rows[part].to(factor), dtype)
        return (
            grad_rows,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            *3 * (None,),
        )
