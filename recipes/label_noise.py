"""Wrong labels on purpose, for recipes that ask which rule trains on them."""

import numpy as np
import torch
from torch import Tensor


def corrupt_labels(
    labels: Tensor, noise: float | np.ndarray, classes: int, generator: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Labels of which a share is drawn anew from the other classes, with equal probability.

    Args:
        labels: int64 ``[N]`` in ``[0, classes)``.
        noise: Probability that a label is wrong, in ``[0, 1)``; one for all samples, or float64 ``[N]``.
        classes: Number of classes.
        generator: Source of the draws.

    Returns:
        The labels int64 ``[N]``, and whether each is wrong, bool ``[N]``.

    Example:
        >>> corrupt_labels(torch.zeros(4, dtype=torch.int64), 0.5, 2, np.random.default_rng(0))
        (tensor([0, 1, 1, 1]), tensor([False,  True,  True,  True]))
    """
    is_wrong = torch.from_numpy(generator.random(len(labels)) < noise)
    wrong_labels = (labels + torch.from_numpy(generator.integers(1, classes, len(labels)))) % classes
    return torch.where(is_wrong, wrong_labels, labels), is_wrong
