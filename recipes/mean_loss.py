"""The mean of validation losses, in which a loss that is not a number is not lost."""

import torch
from torch import Tensor
from torchmetrics import MeanMetric


class MeanLoss(MeanMetric):
    """Mean of the losses of batches, each with its weight; NaN as soon as a batch with a weight has it.

    ``MeanMetric`` leaves NaN out with a warning, so that a model that broke on some batches would be judged by the
    others. A batch of weight 0, whose mean is NaN since it has nothing to average, counts for nothing.

    Example:
        >>> mean = MeanLoss()
        >>> for loss, tokens in ((1.0, 3), (2.0, 1), (float("nan"), 0)):
        ...     mean.update(torch.tensor(loss), torch.tensor(tokens))
        >>> mean.compute()
        tensor(1.2500)
    """

    def update(self, value: Tensor, weight: Tensor | int) -> None:  # type: ignore[override]
        """Add the mean loss of a batch.

        Args:
            value: Mean loss of the batch, a scalar.
            weight: What it is the mean of, such as the number of tokens; >= 0.
        """
        weight = torch.as_tensor(weight, dtype=self.dtype, device=self.device)
        self.mean_value += torch.where(weight > 0, value.to(self.dtype) * weight, 0.0)
        self.weight += weight
