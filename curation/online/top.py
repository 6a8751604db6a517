"""Keeping the k best rows of a candidate batch."""

import torch
from torch import Tensor


def keep_count(keep: float, size: int) -> int:
    """Rows kept of ``size`` candidates: ``keep * size`` rounded half up, at least one.

    Raises:
        ValueError: If ``keep`` is outside (0, 1].

    Example:
        >>> keep_count(0.25, 8), keep_count(0.01, 8), keep_count(1.0, 8)
        (2, 1, 8)
    """
    if not 0 < keep <= 1:
        raise ValueError(f"Argument `keep` must be in (0, 1], but got {keep!r}.")
    return max(1, int(keep * size + 0.5))


def top_rows(scores: Tensor, k: int) -> Tensor:
    """Indices of the ``k`` highest scores, in batch order.

    Equal scores are kept in batch order. A score that is not finite ranks last: such a row is kept only if fewer
    than ``k`` rows have finite scores.

    Args:
        scores: ``[B]``, any floating dtype.
        k: Rows to keep; all rows where ``B < k``.

    Returns:
        int64 ``[min(k, B)]``, ascending, without a host synchronisation.

    Raises:
        ValueError: If ``k`` is negative.

    Example:
        >>> top_rows(torch.tensor([0.1, float("nan"), 3.0, 2.0]), 2)
        tensor([2, 3])
    """
    return largest(scores.masked_fill(~scores.isfinite(), -torch.inf), k)


def largest(keys: Tensor, k: int) -> Tensor:
    """As :func:`top_rows`, but an infinite key ranks by its sign; NaN ranks with minus infinity."""
    if k < 0:
        raise ValueError(f"Argument `k` must be >= 0, but got {k!r}.")
    ranked = keys.masked_fill(keys.isnan(), -torch.inf)
    return ranked.argsort(descending=True, stable=True)[:k].sort().values


def standardize(values: Tensor) -> Tensor:
    """Deviations from the mean in units of the standard deviation, over the finite values of a candidate set.

    All zeros where the values do not differ (up to rounding); values that are not finite stay NaN.

    Args:
        values: fp32 or fp64 ``[B]``.

    Example:
        >>> standardize(torch.tensor([1.0, 3.0])), standardize(torch.tensor([2.0, 2.0]))
        (tensor([-1.,  1.]), tensor([0., 0.]))
    """
    finite = values.isfinite()
    count = finite.sum().clamp(min=1)
    # By a power of two, which rounds nothing, so that squares stay in range.
    peak = values.masked_fill(~finite, 0).abs().amax().clamp(min=2 * torch.finfo(values.dtype).tiny)
    values = values / (peak.log2().ceil() - 1).exp2()  # of the largest number the log2 is that of infinity
    mean = values.masked_fill(~finite, 0).sum() / count
    centred = values - mean
    deviation = (centred.masked_fill(~finite, 0).square().sum() / count).sqrt()
    differs = deviation > 8 * torch.finfo(values.dtype).eps * mean.abs()
    scaled = torch.where(differs, centred / deviation, torch.zeros_like(centred))
    return torch.where(finite, scaled, torch.full_like(scaled, torch.nan))
