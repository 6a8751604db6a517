"""A dual encoder of pictures and texts, trained contrastively, measured on frequent and rare tags."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from curation.checks import check_integer, check_number
from curation.contrastive import contrastive_loss, micro_batched, similarity


class ImageTextModel(LightningModule):
    """A small convolutional network and a bag of words, trained as CLIP is (arXiv 2103.00020).

    The loss is over the batches of all ranks; equal texts are positives of each other. No layer mixes the samples of
    a batch. Words are looked up by two hashes and added (arXiv 1709.03933), so that there is no vocabulary to keep.
    In training, pictures are changed by :func:`augment`, and a text is a random part of its words.

    Metrics, over the whole validation set, and with ``test_`` over the test set: ``val_loss``; ``val_retrieval``, the
    mean of :func:`recall` from images to texts and back; ``val_tags``, the mean of :func:`tag_precision` over the
    concepts in the set, each embedded as the text of its name; ``val_tags_head`` and ``val_tags_tail``, over those
    among the most frequent tenth and the least frequent half of the training concepts (NaN where there are none).

    Args:
        width: Channels of the first convolution; the last has eight times as many.
        dimension: Dimension of the embeddings.
        words: Entries of the table of words.
        lr: Learning rate of AdamW.
        weight_decay: Weight decay of AdamW.
        micro_batch: Samples whose activations are in memory at a time (:func:`curation.contrastive.micro_batched`);
            None for all.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> model = ImageTextModel(width=4, dimension=8, words=16)
        >>> model.images(torch.zeros(2, 3, 64, 64, dtype=torch.uint8)).shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        width: int = 32,
        dimension: int = 512,
        words: int = 8192,
        lr: float = 5e-4,
        weight_decay: float = 0.1,
        micro_batch: int | None = None,
    ) -> None:
        super().__init__()
        check_integer("width", width, 1)
        check_integer("dimension", dimension, 1)
        check_integer("words", words, 1)
        check_number("lr", lr, "(0, inf)")
        check_number("weight_decay", weight_decay, "[0, inf)")
        check_integer("micro_batch", micro_batch, 1, optional=True)
        self.save_hyperparameters()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 4), nn.GroupNorm(1, width), nn.GELU()]
        for c in (width, 2 * width, 4 * width):
            layers += [nn.Conv2d(c, 2 * c, 3, 2, 1), nn.GroupNorm(1, 2 * c), nn.GELU()]
        layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32 * width, dimension)]
        self.image_tower = nn.Sequential(*layers)
        self.words = nn.Embedding(words, dimension)
        mlp = [nn.Linear(dimension, 2 * dimension), nn.GELU(), nn.Linear(2 * dimension, dimension)]
        self.text_tower = nn.Sequential(nn.LayerNorm(dimension), *mlp)
        self.log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        self._seen: list[list[Tensor]] = []

    def images(self, images: Tensor) -> Tensor:
        """Embeddings ``[B, D]`` of pictures uint8 ``[B, 3, H, W]``."""
        return self._encode(self._embed_images, images)

    def texts(self, tokens: Tensor) -> Tensor:
        """Embeddings ``[B, D]`` of texts int64 ``[B, T]``, hashes of words, 0 where there is none."""
        return self._encode(self._embed_texts, tokens)

    def _encode(self, tower: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        size = self.hparams["micro_batch"]
        return tower(x) if size is None or len(x) <= size else micro_batched(tower, x, size)

    def _embed_images(self, images: Tensor) -> Tensor:
        x = images.float() / 127.5 - 1
        return self.image_tower(augment(x) if self.training else x)

    def _embed_texts(self, tokens: Tensor) -> Tensor:
        used = tokens.ne(0)
        if self.training:  # one word at least: a single tag is to say something too
            draw = torch.rand_like(used, dtype=torch.float) * used
            used = used & (draw >= torch.rand_like(draw[:, :1]) * draw.amax(1, keepdim=True))
        n = self.words.num_embeddings
        words = (self.words(tokens % n) + self.words(tokens // n % n)) * used.unsqueeze(-1)
        return self.text_tower(words.sum(1) / used.sum(1, keepdim=True).clamp(min=1))

    def _gathered(self, x: Tensor, sync_grads: bool = False) -> Tensor:
        """The rows of all ranks."""
        return self.all_gather(x, sync_grads=sync_grads).flatten(0, -x.dim())  # type: ignore[union-attr]

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Contrastive loss of the pairs of all ranks."""
        image = self._gathered(self.images(batch["image"]), sync_grads=True)
        text = self._gathered(self.texts(batch["tokens"]), sync_grads=True)
        loss = contrastive_loss(image, text, self.log_scale.exp(), same_rows(self._gathered(batch["tokens"])))
        self.log("train_loss", loss, prog_bar=True, batch_size=len(image))
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep the scale of the logits at 100 at most, as CLIP does."""
        with torch.no_grad():
            self.log_scale.clamp_(max=math.log(100))

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Embed the pictures and the texts; the metrics are those of the whole set."""
        image, text = self.images(batch["image"]), self.texts(batch["tokens"])
        self._seen.append([image, text, batch["tokens"], batch["row"]])

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the whole validation set."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """As in validation, on the test set."""
        self._log_metrics("test")

    def _log_metrics(self, stage: str) -> None:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        *embedded, gathered = (self._gathered(torch.cat(x)) for x in zip(*self._seen, strict=True))
        self._seen = []
        # Every rank has the same number of rows, so some rows are there twice.
        rows, first = (torch.from_numpy(x) for x in np.unique(gathered.cpu().numpy(), return_index=True))
        image, text, tokens = (x[first.to(x.device)] for x in embedded)
        same, pairs = same_rows(tokens), similarity(image, text)
        tags = data.tags[stage][rows]
        is_present = tags.any(0)
        names = self.texts(data.names[is_present].to(image.device))
        precision = tag_precision(similarity(image, names).cpu(), tags[:, is_present])
        values = {
            "loss": contrastive_loss(image, text, self.log_scale.exp(), same),
            "retrieval": (recall(pairs, same) + recall(pairs.T, same.T)) / 2,
            **{name: precision[concepts[is_present]].mean() for name, concepts in data.groups.items()},
        }
        for name, value in values.items():
            self.log(f"{stage}_{name}", value.to(image.device), prog_bar=name == "tags", sync_dist=True)

    def configure_optimizers(self) -> Any:
        """AdamW."""
        lr, weight_decay = self.hparams["lr"], self.hparams["weight_decay"]
        return torch.optim.AdamW(self.parameters(), lr=lr, weight_decay=weight_decay, fused=True)


def augment(images: Tensor) -> Tensor:
    """Zoom, turn and move each picture a little and change its colours; white stays white.

    Args:
        images: fp32 ``[B, 3, H, W]`` in [-1, 1].

    Returns:
        Pictures of the same shape.
    """
    zoom, turn, x, y = ((2 * torch.rand(4, len(images), device=images.device) - 1) * 0.15).unbind()
    matrix = torch.stack([1 + zoom, -turn, x, turn, 1 + zoom, y], 1).view(-1, 2, 3)
    ink = (images - 1) * (0.5 + torch.rand_like(images[:, :, :1, :1]))
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(ink, grid, align_corners=False) + 1


def same_rows(tokens: Tensor) -> Tensor:
    """Which texts are equal: bool ``[B, B]``.

    Args:
        tokens: int64 ``[B, T]``.

    Example:
        >>> same_rows(torch.tensor([[1, 2], [1, 2], [3, 0]]))[0]
        tensor([ True,  True, False])
    """
    text = tokens.unique(dim=0, return_inverse=True)[1]
    return text[:, None] == text


def recall(similarities: Tensor, right: Tensor) -> Tensor:
    """Recall at 1: the share of the rows whose most similar column is right.

    Args:
        similarities: floating ``[N, M]``.
        right: bool ``[N, M]``, which columns are right.

    Returns:
        fp32 scalar.

    Example:
        >>> recall(torch.tensor([[0.9, 0.1], [0.8, 0.2]]), torch.eye(2).bool())
        tensor(0.5000)
    """
    return right.gather(1, similarities.argmax(1, keepdim=True)).float().mean()


def tag_precision(similarities: Tensor, tags: Tensor) -> Tensor:
    """For each concept the share of its pictures that rank it among their first ``|C_i|``.

    Args:
        similarities: Similarities of pictures and concepts, floating ``[N, V]``.
        tags: ``C``, the concepts of each picture, bool ``[N, V]``.

    Returns:
        fp32 ``[V]``; NaN for a concept that no picture has.
    """
    rank = similarities.argsort(1, descending=True).argsort(1)
    return (tags & (rank < tags.sum(1, keepdim=True))).sum(0) / tags.sum(0)
