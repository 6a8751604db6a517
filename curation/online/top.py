"""Keeping the k best rows of a candidate batch."""

import torch
from torch import Tensor

from curation.checks import check_integer, check_number


def keep_count(keep: float, size: int) -> int:
    """Number of rows to keep of a candidate batch: ``keep * size`` rounded half up, at least one.

    Args:
        keep: Keep ratio, in (0, 1].
        size: Number of candidates, >= 0.

    Raises:
        ValueError: If an argument has the wrong type or is out of its range.

    Example:
        >>> keep_count(0.25, 8), keep_count(0.01, 8), keep_count(1.0, 8)
        (2, 1, 8)
    """
    check_number("keep", keep, "(0, 1]")
    check_integer("size", size, 0)
    return max(1, int(keep * size + 0.5))


def top_rows(scores: Tensor, k: int) -> Tensor:
    """Indices of the ``k`` highest scores, in batch order.

    Equal scores are kept in batch order. A score that is not finite ranks last: such a row is kept only if fewer
    than ``k`` rows have finite scores.

    Args:
        scores: ``[B]``, any floating dtype.
        k: Number of rows to keep, >= 0; all rows where ``B < k``.

    Returns:
        int64 ``[min(k, B)]``, ascending, without a host synchronisation.

    Raises:
        ValueError: If ``k`` is not an integer >= 0.

    Example:
        >>> top_rows(torch.tensor([0.1, float("nan"), 3.0, 2.0]), 2)
        tensor([2, 3])
    """
    return largest(scores.masked_fill(~scores.isfinite(), -torch.inf), k)


def largest(keys: Tensor, k: int) -> Tensor:
    """Indices of the ``k`` largest keys, in batch order.

    As :func:`top_rows`, but an infinite key ranks by its sign; NaN ranks with minus infinity.

    Example:
        >>> largest(torch.tensor([0.0, torch.nan, torch.inf]), 1)
        tensor([2])
    """
    check_integer("k", k, 0)
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
