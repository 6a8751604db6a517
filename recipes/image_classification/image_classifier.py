"""A small convolutional network for images, trained with cross-entropy or focal loss."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import Accuracy

from curation.checks import check_choice, check_flag, check_integer, check_number
from curation.recipes.schedules import linear_schedule
from curation.scoring import per_sample_loss


class ImageClassifier(LightningModule):
    """Two convolutions and two linear layers, trained with cross-entropy or focal loss.

    The validation loss is the plain cross-entropy, whatever the training loss is.

    Args:
        channels: Output channels of the first convolution; the second has twice as many.
        hidden: Width of the hidden linear layer.
        classes: Number of classes.
        lr: Learning rate of AdamW.
        weight_decay: Weight decay of AdamW.
        strides: Convolve with strides of 2 in the place of pooling, which takes a quarter of the operations.
        shift: Largest shift of a training image in pixels, at random in each direction; edges are repeated.
        mirror: Whether half of the training images are mirrored.
        schedule: ``"linear"`` lets the learning rate rise over 2 % of the steps and fall to 0 at the end of the fit.
        class_weights: True weighs the classes by ``n / (C n_c)``, from the ``concepts`` of the data module: ``n``
            training labels, of which ``n_c`` are of class ``c``. Or the weights, ``[C]``; a batch's loss is divided
            by their sum over its rows. False weighs all alike.
        label_smoothing: Share of the target that is spread over all classes, in [0, 1).
        focal_gamma: Exponent of focal loss (arXiv 1708.02002, eq. 4), ``(1 - p)^gamma`` times the cross-entropy, with
            ``p`` the probability of the target; its mean over the rows. 0 for cross-entropy.

    Attributes:
        sample_losses: Losses of the rows of the last step, ``[B]``; with ``focal_gamma`` alone.

    Raises:
        ValueError: If an argument is out of its range, or the data module does not tell the frequencies of the
            classes.

    Example:
        >>> ImageClassifier()(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        channels: int = 16,
        hidden: int = 128,
        classes: int = 10,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        strides: bool = False,
        shift: int = 0,
        mirror: bool = False,
        schedule: Literal["constant", "linear"] = "constant",
        class_weights: bool | list[float] = False,
        label_smoothing: float = 0.0,
        focal_gamma: float = 0.0,
    ) -> None:
        super().__init__()
        check_integer("channels", channels, 1)
        check_integer("hidden", hidden, 1)
        check_integer("classes", classes, 1)
        check_number("lr", lr, "(0, inf)")
        check_number("weight_decay", weight_decay, "[0, inf)")
        check_flag("strides", strides)
        check_integer("shift", shift, 0)
        check_flag("mirror", mirror)
        check_choice("schedule", schedule, ("constant", "linear"))
        check_number("label_smoothing", label_smoothing, "[0, 1)")
        self.focal_gamma: float = check_number("focal_gamma", focal_gamma, "[0, inf)")
        self.save_hyperparameters()
        self._counted = class_weights is True
        weights = class_weight_list(class_weights, classes)
        self.criterion = nn.CrossEntropyLoss(weights, label_smoothing=label_smoothing)
        if focal_gamma:  # callbacks ask whether a module has these
            self.sample_losses: Tensor | None = None
            self.score_step = self._focal_losses
        stride, pool = (2, nn.Identity()) if strides else (1, nn.MaxPool2d(2))
        self.net = nn.Sequential(
            nn.LazyConv2d(channels, 5 if strides else 3, stride, 2 if strides else 1), nn.ReLU(), pool,
            nn.LazyConv2d(2 * channels, 3, stride, 1), nn.ReLU(), pool,
            nn.Flatten(), nn.LazyLinear(hidden), nn.ReLU(), nn.Linear(hidden, classes),
        )  # fmt: skip
        self.val_accuracy = Accuracy("multiclass", num_classes=classes)
        self.test_accuracy = Accuracy("multiclass", num_classes=classes)

    def setup(self, stage: str) -> None:
        """Take the size of the images from the data, and in a fit the weights of the classes."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if data is not None:
            self.net(torch.zeros(1, *data.shape))
        if self._counted and stage == "fit":
            self._count_classes(getattr(data, "concepts", None))

    def _count_classes(self, concepts: Any) -> None:
        weight = self.criterion.weight
        assert weight is not None
        if concepts is None or len(concepts.frequencies) != len(weight):
            raise ValueError(
                f"Argument `class_weights` must be a list of {len(weight)} numbers or False where the data module "
                "has no `concepts` with the frequencies of as many classes, but got True."
            )
        counts = torch.from_numpy(concepts.frequencies)
        weight.copy_(counts.sum() / (len(counts) * counts.clamp(min=1)))

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of images ``[B, C, H, W]``."""
        return self.net(x)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch."""
        x, y = batch[:2]  # ids follow where no callback strips them
        x = varied(x, self.hparams.get("shift", 0), self.hparams.get("mirror", False))  # not of a subclass
        if self.focal_gamma:
            self.sample_losses = self._focal_losses((x, y))
            loss = self.sample_losses.mean()
        else:
            loss = self.criterion(self(x), y)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def _focal_losses(self, batch: Sequence[Tensor]) -> Tensor:
        """Focal losses of the rows, fp32 ``[B]``."""
        logits, y = self(batch[0]).float(), batch[1]
        losses = per_sample_loss(logits, y, self.criterion.weight, self.criterion.label_smoothing)
        others = 1 - logits.softmax(1).gather(1, y[:, None])[:, 0]
        return others.clamp(min=1e-6) ** self.focal_gamma * losses  # the slope of a root at 0 is infinite

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
        optimizer = torch.optim.AdamW(
            self.parameters(), lr=self.hparams["lr"], weight_decay=self.hparams["weight_decay"]
        )
        if self.hparams.get("schedule", "constant") == "constant":
            return optimizer
        return linear_schedule(optimizer, self.trainer, warmup=0.02)


def class_weight_list(class_weights: Any, classes: int) -> Tensor | None:
    """Weights of the classes, fp32 ``[classes]``: ones for True, None for False.

    Raises:
        ValueError: If the weights are not one number > 0 for each class.
    """
    if isinstance(class_weights, bool):
        return torch.ones(classes) if class_weights else None
    if not isinstance(class_weights, (list, tuple)) or len(class_weights) != classes:
        raise ValueError(
            f"Argument `class_weights` must be True, False or a list of {classes} numbers, but got {class_weights!r}."
        )
    return torch.tensor([check_number("class_weights", weight, "(0, inf)") for weight in class_weights])


def varied(x: Tensor, shift: int, mirror: bool) -> Tensor:
    """Images shifted by up to ``shift`` pixels in each direction, and half of them mirrored, at random.

    Args:
        x: ``[B, C, H, W]``.
        shift: Largest shift; edges are repeated.
        mirror: Whether images are mirrored.
    """
    if not (shift or mirror):
        return x
    size, (height, width) = len(x), x.shape[-2:]
    padded = F.pad(x, (shift,) * 4, mode="replicate")
    rows = torch.randint(2 * shift + 1, (size, 1), device=x.device) + torch.arange(height, device=x.device)
    columns = torch.arange(width, device=x.device).expand(size, -1)
    if mirror:
        columns = torch.where(torch.rand(size, 1, device=x.device) < 0.5, columns, width - 1 - columns)
    columns = columns + torch.randint(2 * shift + 1, (size, 1), device=x.device)
    images = torch.arange(size, device=x.device)[:, None, None]
    return padded.movedim(1, -1)[images, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)
