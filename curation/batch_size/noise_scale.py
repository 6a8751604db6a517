"""The noise of gradients, estimated from the mean gradients of micro-batches; no gradient of a single sample."""

from typing import NamedTuple

import torch
from torch import Tensor

from curation.checks import check_number


class Moments(NamedTuple):
    """What micro-batches say of the gradient.

    Attributes:
        trace: Trace of the covariance of the gradient of a sample, fp32 or fp64 ``[]``.
        mean_square: Squared norm of the mean gradient of the batch, ``[]``; biased by the noise that is left in it.
        true_square: Unbiased estimate of the squared norm of the expected gradient, ``[]``; may be negative.
    """

    trace: Tensor
    mean_square: Tensor
    true_square: Tensor

    @property
    def noise_scale(self) -> Tensor:
        """Rows at which noise and gradient are equal (arXiv 1812.06162, eq. 2.9); infinite if no gradient shows."""
        infinite = torch.full_like(self.trace, torch.inf)
        return torch.where(self.true_square > 0, self.trace / self.true_square, infinite)


def gradient_moments(square_sum: Tensor, mean_square: Tensor, count: int, rows: float) -> Moments:
    r"""Unbiased moments from ``K`` micro-batches of ``m`` rows, with the mean gradients ``g_k`` and their mean ``g``.

    .. math:: V = \frac{m}{K - 1} \Big(\sum_k |g_k|^2 - K |g|^2\Big), \qquad G^2 = |g|^2 - \frac{V}{m K}

    The norm test of AdAdaGrad (arXiv 2402.11215) adds the variance between micro-batches, ``1/K sum |g_k - g|^2``, to
    the mean variance within them, which needs gradients of samples and is 1 + (K - 1) / (K m) times too large.

    Args:
        square_sum: Sum of the squared norms of the ``K`` gradients, ``[]``.
        mean_square: Squared norm of their mean, ``[]``.
        count: ``K``, at least 2.
        rows: ``m``.

    Example:
        >>> gradient_moments(torch.tensor(10.0), torch.tensor(4.0), count=2, rows=3)
        Moments(trace=tensor(6.), mean_square=tensor(4.), true_square=tensor(3.))
    """
    trace = rows / (count - 1) * (square_sum - count * mean_square)
    return Moments(trace, mean_square, mean_square - trace / (rows * count))


def wanted_rows(moments: Moments, eta: float) -> Tensor:
    """Rows of a step that pass the norm test (arXiv 2402.11215, eq. 5): ``V / (eta^2 |g|^2)``, ``[]``.

    Args:
        moments: Averaged moments.
        eta: Noise of the step's gradient relative to its norm that is allowed.
    """
    return moments.trace / (eta**2 * moments.mean_square)


class MovingMoments:
    """Exponential moving averages of moments, corrected for their start; what is not finite is left out.

    Args:
        decay: Share of the old average, in [0, 1).

    Raises:
        ValueError: If ``decay`` is out of its range.

    Attributes:
        values: Sums with decaying weights, ``[4]``: trace, mean square, true square, and the weights themselves.
    """

    def __init__(self, decay: float) -> None:
        self.decay = check_number("decay", decay, "[0, 1)")
        self.values = torch.zeros(4)

    def update(self, moments: Moments) -> None:
        """Take in moments, on their device; the host does not wait for it."""
        new = torch.stack([*moments, torch.ones_like(moments.trace)])
        self.values = self.values.to(new)
        mixed = self.decay * self.values + (1 - self.decay) * new
        self.values = torch.where(new.isfinite().all(), mixed, self.values)  # a scaler's overflow is no estimate

    @property
    def moments(self) -> Moments:
        """The averages; NaN before the first."""
        return Moments(*(self.values[:3] / self.values[3]))
