"""A linear classifier of embeddings."""

from torch import nn

from curation.checks import check_integer
from curation.recipes.image_classification import ImageClassifier
from curation.recipes.text_classification.labelled_texts import FAMILIES


class LinearProbe(ImageClassifier):
    """The classifier of the image recipes with one linear layer, or two, in the place of its network.

    Args:
        classes: Number of classes.
        hidden: Width of a hidden layer; None for none.
        lr: Learning rate of AdamW.
        weight_decay: Weight decay of AdamW.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> LinearProbe(classes=3)(torch.zeros(2, 384)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self, classes: int = len(FAMILIES), hidden: int | None = None, lr: float = 1e-2, weight_decay: float = 0.01
    ) -> None:
        super().__init__(classes=classes, lr=lr, weight_decay=weight_decay)
        check_integer("hidden", hidden, 1, optional=True)
        inner = [nn.LazyLinear(hidden), nn.ReLU()] if hidden else []
        self.net = nn.Sequential(*inner, nn.LazyLinear(classes))
