"""A small causal language model on bytes, which tells the loss on a target from that on everything else."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from curation.checks import check_integer, check_number
from curation.recipes.mean_loss import MeanLoss
from curation.recipes.schedules import linear_schedule

KERNEL = 3


class ByteConvolutions(LightningModule):
    """Gated causal convolutions (arXiv 1612.08083) with dilations of 1, 2, 4, ..., on bytes.

    A byte is predicted from the ``2^(layers + 1) - 1`` before it. Validation logs in nats per byte ``val_loss``, of
    the rows of the target, and ``val_other_loss``, of all other rows.

    Args:
        hidden: Width of the model.
        layers: Number of layers.
        lr: Learning rate of AdamW; it rises over a twentieth of the fit and falls to 0 at its end.
        weight_decay: Weight decay of AdamW.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> ByteConvolutions(hidden=8, layers=2)(torch.zeros(3, 5, dtype=torch.long)).shape
        torch.Size([3, 5, 256])
    """

    def __init__(self, hidden: int = 64, layers: int = 4, lr: float = 1e-2, weight_decay: float = 0.1) -> None:
        super().__init__()
        check_integer("hidden", hidden, 1)
        check_integer("layers", layers, 1)
        check_number("lr", lr, "(0, inf)")
        check_number("weight_decay", weight_decay, "[0, inf)")
        self.save_hyperparameters()
        self.embedding = nn.Embedding(256, hidden)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(hidden, 2 * hidden, KERNEL, dilation=2**layer) for layer in range(layers)
        )
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, 256)
        self.losses = nn.ModuleDict({name: MeanLoss() for name in ("val_loss", "val_other_loss")})

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, T, 256]`` of the next bytes after bytes int64 ``[B, T]``."""
        hidden = self.embedding(x).mT
        for layer, convolution in enumerate(self.convolutions):
            past = F.pad(hidden, ((KERNEL - 1) * 2**layer, 0))
            hidden = hidden + F.glu(convolution(past), 1)
        return self.head(self.norm(hidden.mT))

    def score_step(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits ``[B, T - 1, 256]`` and the bytes that they are of, int64 ``[B, T - 1]``."""
        x = batch["input_ids"]
        return self(x)[:, :-1], x[:, 1:]

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """The mean cross-entropy of all bytes but the first of each row."""
        logits, bytes_ = self.score_step(batch)
        loss = F.cross_entropy(logits.flatten(0, 1), bytes_.flatten())
        self.log("train_loss", loss, prog_bar=True, batch_size=len(bytes_))
        return loss

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Enter the losses of both kinds of rows."""
        logits, bytes_ = self.score_step(batch)
        losses = F.cross_entropy(logits.mT, bytes_, reduction="none").mean(1)
        for name, rows in (("val_loss", batch["is_target"]), ("val_other_loss", ~batch["is_target"])):
            self.losses[name].update(losses[rows].mean(), rows.sum())  # type: ignore[operator]

    def on_validation_epoch_end(self) -> None:
        """Log the losses over all processes."""
        for name, metric in self.losses.items():
            self.log(name, metric.compute(), prog_bar=True)  # type: ignore[operator]
            metric.reset()  # type: ignore[operator]

    def configure_optimizers(self) -> Any:
        """AdamW with a linear schedule."""
        lr, weight_decay = self.hparams["lr"], self.hparams["weight_decay"]
        optimizer = torch.optim.AdamW(self.parameters(), lr, weight_decay=weight_decay)
        return linear_schedule(optimizer, self.trainer, warmup=0.05)
