"""The draws of hard-sample training, and the weights that correct their bias.

Every draw takes its random numbers as the argument ``uniform``. A candidate whose score is not finite is drawn last.
No function synchronises with the host.
"""

import math

import torch
from torch import Tensor

from curation.checks import check_integer, check_number
from curation.online.top import largest


def rank_log_weights(scores: Tensor, pressure: float) -> Tensor:
    """Logarithms of weights that fall exponentially with the rank (arXiv 1511.06343, sec. 3).

    The hardest sample weighs ``pressure^((B - 1) / B)`` times as much as the easiest.

    Args:
        scores: Floating ``[B]``; the highest has rank 0, equal scores are ranked in batch order.
        pressure: Selection pressure, in [1, inf); with 1 all weights are equal.

    Returns:
        fp32 ``[B]``; -inf where the score is not finite.

    Raises:
        ValueError: If ``pressure`` is outside [1, inf).

    Example:
        >>> rank_log_weights(torch.tensor([0.1, 3.0]), 100.0).exp()
        tensor([0.1000, 1.0000])
    """
    check_number("pressure", pressure, "[1, inf)")
    finite = scores.isfinite()
    ranks = scores.masked_fill(~finite, -torch.inf).argsort(descending=True, stable=True).argsort()
    log_weights = ranks.float() * (-math.log(pressure) / len(scores))
    return log_weights.masked_fill(~finite, -torch.inf)


def low_score_sample(scores: Tensor, drop: float, k: int, uniform: Tensor) -> Tensor:
    """Leave out the rows with the highest scores, and draw ``k`` of the others uniformly.

    Samples of small loss (arXiv 1804.06872, sec. 3), but at random among them, so that easy ones have no preference.

    Args:
        scores: Floating ``[B]``; of equal ones the later are left out first. One that is not finite is the
            highest, and drawn last.
        drop: Share of the rows that is left out, in [0, 1); less where fewer than ``k`` rows would remain.
        k: Number of rows to draw, >= 0; all where ``B <= k``.
        uniform: Floating ``[B]``, independent and uniform in [0, 1).

    Returns:
        int64 ``[min(k, B)]``, ascending.

    Raises:
        ValueError: If ``drop`` is out of its range, or ``k`` not an integer >= 0.

    Example:
        >>> low_score_sample(torch.tensor([5.0, 0.1, 0.2]), 0.34, 2, torch.rand(3))
        tensor([1, 2])
    """
    check_number("drop", drop, "[0, 1)")
    size = len(scores)
    remain = max(size - int(drop * size + 0.5), min(check_integer("k", k, 0), size))
    ranks = scores.masked_fill(~scores.isfinite(), torch.inf).argsort(stable=True).argsort()
    return largest(uniform.masked_fill(~scores.isfinite(), -1).masked_fill(ranks >= remain, -2), k)


def floored_log_weights(scores: Tensor, floor: float = 0.1) -> Tensor:
    """Logarithms of weights in proportion to the score, and at least ``floor`` times the mean.

    Args:
        scores: Floating ``[B]``; negative ones count as 0.
        floor: Least weight over the mean weight, in (0, 1].

    Returns:
        fp32 ``[B]``; -inf where the score is not finite. Equal where no score is positive.

    Raises:
        ValueError: If ``floor`` is out of its range.

    Example:
        >>> floored_log_weights(torch.tensor([0.0, 1.0, 5.0])).exp()
        tensor([0.2000, 1.0000, 5.0000])
    """
    check_number("floor", floor, "(0, 1]")
    finite = scores.isfinite()
    weights = scores.double().masked_fill(~finite, 0).clamp(min=0)
    mean = weights.sum() / finite.sum().clamp(min=1)
    return torch.maximum(weights, (floor * mean).clamp(min=1e-300)).log().float().masked_fill(~finite, -torch.inf)


def cdf_power(scores: Tensor, pool: Tensor, beta: float) -> Tensor:
    """Selective backpropagation's probability of a sample, ``P(pool <= score)^beta`` (arXiv 1910.00762, sec. 3).

    Args:
        scores: Floating ``[B]``.
        pool: Floating ``[N]``, the scores to compare with; scores that are not finite are left out.
        beta: Exponent, in [0, inf); with 0 all probabilities are equal.

    Returns:
        fp64 ``[B]`` in (0, 1]; 0 where the score is not finite.

    Raises:
        ValueError: If ``beta`` is outside [0, inf).

    Example:
        >>> cdf_power(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0, 2.0, 2.0]), 1.0)
        tensor([0.5000, 1.0000], dtype=torch.float64)
    """
    check_number("beta", beta, "[0, inf)")
    finite = pool.isfinite()
    ordered = pool.masked_fill(~finite, torch.inf).sort().values
    below = torch.searchsorted(ordered, scores.to(ordered.dtype).contiguous(), right=True)
    share = torch.minimum(below, finite.sum()).double() / finite.sum().clamp(min=1)
    return share.pow(beta).clamp(min=1e-300).masked_fill(~scores.isfinite(), 0)


def successive_sample(log_weights: Tensor, k: int, uniform: Tensor) -> Tensor:
    """Draw ``k`` rows one after another without replacement, each with odds proportional to its weight.

    By the Gumbel-max trick: the ``k`` largest of ``log w + Gumbel noise`` (Efraimidis and Spirakis 2006).

    Args:
        log_weights: Floating ``[B]``, logarithms of the weights.
        k: Number of rows to draw, >= 0; all where ``B <= k``.
        uniform: Floating ``[B]``, independent and uniform in [0, 1).

    Returns:
        int64 ``[min(k, B)]``, ascending.

    Raises:
        ValueError: If ``k`` is not an integer >= 0.

    Example:
        >>> successive_sample(torch.tensor([0.0, -torch.inf, 0.0]), 2, torch.rand(3))
        tensor([0, 2])
    """
    gumbel = -(-(uniform.double().clamp(min=1e-300).log())).log()
    return largest(log_weights + gumbel, k)


def pareto_sample(probabilities: Tensor, k: int, uniform: Tensor) -> Tensor:
    """Draw exactly ``k`` rows, each with about its own probability where these sum to ``k``.

    Pareto sampling (Rosen 1997): the ``k`` largest ratios of the odds of ``p`` to the odds of ``uniform``. Where the
    probabilities do not sum to ``k``, all odds are in effect multiplied by the factor that makes them.

    Args:
        probabilities: Floating ``[B]`` in [0, 1].
        k: Number of rows to draw, >= 0; all where ``B <= k``.
        uniform: Floating ``[B]``, independent and uniform in [0, 1).

    Returns:
        int64 ``[min(k, B)]``, ascending.

    Raises:
        ValueError: If ``k`` is not an integer >= 0.

    Example:
        >>> pareto_sample(torch.tensor([1.0, 0.0, 1.0]), 2, torch.rand(3))
        tensor([0, 2])
    """
    p, u = probabilities.double().clamp(max=1 - 1e-12), uniform.double().clamp(min=1e-300)  # certain rows tie
    return largest(torch.logit(p) - torch.logit(u), k)


def priority_sample(scores: Tensor, k: int, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draw ``k`` distinct rows with probabilities that grow with the score, and weights that remove the bias.

    Priority sampling (Duffield, Lund and Thorup 2007): the ``k`` largest of ``q = score / uniform``; with ``t`` the
    next largest, a row stands for ``max(1, t / score)`` rows. For any values ``x`` that are 0 where the score is 0,
    ``mean(weights * x[rows])`` has the expectation ``mean(x)``. Drawing without replacement and weighting by
    ``1 / (B p)`` would not.

    Args:
        scores: Floating ``[B]``, at least 0.
        k: Number of rows to draw, >= 0; all where ``B <= k``, with weights 1.
        uniform: Floating ``[B]``, independent and uniform in [0, 1).

    Returns:
        int64 ``[min(k, B)]``, ascending, and their weights, fp32.

    Raises:
        ValueError: If ``k`` is not an integer >= 0.

    Example:
        >>> priority_sample(torch.tensor([5.0, 0.0]), 1, torch.tensor([0.5, 0.5]))
        (tensor([0]), tensor([0.5000]))
    """
    size = len(scores)
    w = scores.double().masked_fill(~scores.isfinite(), 0)
    q = (w / uniform.double().clamp(min=2**-54)).masked_fill(~scores.isfinite(), -1)
    rows = largest(q, k)
    if k >= size:
        return rows, torch.ones(size, device=scores.device)
    threshold = q.topk(k + 1).values[-1].clamp(min=0)
    stands_for = torch.where(w > 0, (threshold / w).clamp(min=1), 1.0)[rows]
    return rows, (stands_for * (k / size)).float()


def variance_reduction(scores: Tensor) -> Tensor:
    """The paper's ``tau``: the root mean square norm of a uniformly drawn gradient over that of one drawn by score.

    A uniform batch has to be ``tau^2`` times as large for the same second moment.
    ``tau = (1 - ||g - u||^2 / ||g||^2)^(-1/2)`` with ``g`` the normalised scores and ``u = 1 / B``
    (arXiv 1803.00942, sec. 3.3).

    Args:
        scores: Floating ``[B]``, bounds of the gradient norms, at least 0.

    Returns:
        fp32 scalar, at least 1; 1 where all scores are equal.

    Example:
        >>> variance_reduction(torch.tensor([1.0, 0.0, 0.0, 0.0]))  # a uniform batch has to be 4 times as large
        tensor(2.)
    """
    w = scores.double().masked_fill(~scores.isfinite(), 0)
    g = w / w.sum().clamp(min=1e-300)
    squares = g.square().sum()
    lost = (g - 1 / len(g)).square().sum() / squares.clamp(min=1e-300)
    lost = torch.where(squares > 0, lost, 0)  # scores of 0 are equal
    return (1 - lost).clamp(min=1e-12).rsqrt().float()
