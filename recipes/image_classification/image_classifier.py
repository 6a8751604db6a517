"""A small convolutional network for images, trained with cross-entropy."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import Accuracy

from curation.checks import check_integer, check_number


class ImageClassifier(LightningModule):
    """Two convolutions and two linear layers, trained with cross-entropy.

    Args:
        channels: Output channels of the first convolution; the second has twice as many.
        hidden: Width of the hidden linear layer.
        classes: Number of classes.
        lr: Learning rate of AdamW.
        weight_decay: Weight decay of AdamW.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> ImageClassifier()(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self, channels: int = 16, hidden: int = 128, classes: int = 10, lr: float = 1e-3, weight_decay: float = 0.01
    ) -> None:
        super().__init__()
        check_integer("channels", channels, 1)
        check_integer("hidden", hidden, 1)
        check_integer("classes", classes, 1)
        check_number("lr", lr, "(0, inf)")
        check_number("weight_decay", weight_decay, "[0, inf)")
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.LazyConv2d(channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.LazyConv2d(2 * channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.LazyLinear(hidden), nn.ReLU(), nn.Linear(hidden, classes),
        )  # fmt: skip
        self.val_accuracy = Accuracy("multiclass", num_classes=classes)
        self.test_accuracy = Accuracy("multiclass", num_classes=classes)

    def setup(self, stage: str) -> None:
        """Take the size of the images from the data."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if data is not None:
            self.net(torch.zeros(1, *data.shape))

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of images ``[B, C, H, W]``."""
        return self.net(x)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Mean cross-entropy."""
        x, y = batch[:2]  # ids follow where no callback strips them
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Loss and accuracy."""
        x, y = batch
        logits = self(x)
        self.val_accuracy(logits, y)
        self.log("val_loss", F.cross_entropy(logits, y), prog_bar=True)
        self.log("val_accuracy", self.val_accuracy, prog_bar=True)

    def test_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Accuracy."""
        x, y = batch
        self.test_accuracy(self(x), y)
        self.log("test_accuracy", self.test_accuracy)

    def predict_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Logits."""
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"], weight_decay=self.hparams["weight_decay"])
