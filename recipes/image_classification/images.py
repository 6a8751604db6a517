"""Image classification, with label noise where asked, by a small convolutional network."""

import gzip
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, TensorDataset
from torchmetrics import Accuracy

from curation.batch import SampleIds
from curation.callbacks.online.choice import Choice, SelectionListener
from curation.callbacks.online.online_selection import logs_now
from curation.recipes.sources import require_extra, sampled
from curation.samplers.concept_index import ConceptIndex

FASHION_MNIST = "/usr/share/datasets/fashion-mnist"


class ImageClassifier(LightningModule):
    """Two convolutions and two linear layers, trained with cross-entropy.

    Args:
        channels: Of the first convolution; the second has twice as many.
        hidden: Width of the hidden linear layer.
        classes: Number of classes.
        lr: Learning rate of AdamW.
        weight_decay: Of AdamW.

    Raises:
        ValueError: If ``lr`` is not positive.
    """

    def __init__(
        self, channels: int = 16, hidden: int = 128, classes: int = 10, lr: float = 1e-3, weight_decay: float = 0.01
    ) -> None:
        super().__init__()
        if not lr > 0:
            raise ValueError(f"Argument `lr` must be > 0, but got {lr!r}.")
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


class Images(LightningDataModule):
    """Labelled images in memory; the training labels may be corrupted.

    Args:
        data: ``"digits"`` (1,797 of scikit-learn), a folder with the four ``idx`` files of MNIST or Fashion-MNIST
            (gzipped or not), or a hub name with the columns ``image`` and ``label``.
        label_noise: Share of the training labels that are drawn anew from the other classes.
        holdout: Share of the training images that are held out, with right labels: validation, and what ``swap``
            trains on.
        swap: Train on the held-out images and validate on the others, for irreducible losses.
        holdout_noise: As ``label_noise``, of the held-out images where ``swap`` trains on them.
        imbalance: How many times as many training images the first class has as the last, with an exponential in
            between, as in long-tailed CIFAR (arXiv 1901.05555).
        batch_size: Candidates per training batch and device.
        sampler: Of the training batches, made from ``concepts`` and the batch size, such as
            :class:`~curation.samplers.concept_aware.ConceptAwareSampler` or
            :class:`~curation.samplers.hard_batches.HardBatchSampler`; None reshuffles every epoch.
        num_workers: Of the data loaders.
        seed: Of the split, the noise and the imbalance.

    Attributes:
        concepts: The training labels, by sample id.
        corrupted: bool ``[N]`` by sample id, whether a training label is wrong.

    Raises:
        ValueError: If an argument is out of its range, or ``data`` holds no images.
    """

    def __init__(
        self,
        data: str = FASHION_MNIST,
        label_noise: float = 0.0,
        holdout: float = 0.1,
        swap: bool = False,
        holdout_noise: float = 0.0,
        imbalance: float = 1.0,
        batch_size: int = 128,
        sampler: Callable[[Any, int], Sampler] | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("label_noise", label_noise), ("holdout_noise", holdout_noise)):
            if not 0 <= value < 1:
                raise ValueError(f"Argument `{name}` must be in [0, 1), but got {value!r}.")
        if not 0 < holdout < 1:
            raise ValueError(f"Argument `holdout` must be in (0, 1), but got {holdout!r}.")
        if not 1 <= imbalance < float("inf"):
            raise ValueError(f"Argument `imbalance` must be finite and >= 1, but got {imbalance!r}.")
        if batch_size < 1:
            raise ValueError(f"Argument `batch_size` must be >= 1, but got {batch_size!r}.")
        if seed < 0:
            raise ValueError(f"Argument `seed` must be >= 0, but got {seed!r}.")
        self.data = data
        self.label_noise = label_noise
        self.holdout = holdout
        self.swap = swap
        self.holdout_noise = holdout_noise
        self.imbalance = imbalance
        self.batch_size = batch_size
        self.sampler = sampler
        self.num_workers = num_workers
        self.seed = seed
        self.corrupted = torch.zeros(0, dtype=torch.bool)
        self.train: SampleIds | None = None

    def setup(self, stage: str) -> None:
        """Load, split, corrupt; once."""
        if self.train is not None:
            return
        images, labels, test_images, test_labels = load(self.data)
        mean, deviation = images.mean(), images.std()
        self.shape = images.shape[1:]
        draw = np.random.default_rng(self.seed)
        order = torch.from_numpy(draw.permutation(len(images)))
        classes = int(labels.max()) + 1
        held = int(self.holdout * len(images))
        rest, out = order[held:], order[:held]
        noise = np.full(len(images), self.label_noise)
        noise[out] = self.holdout_noise
        corrupted = torch.from_numpy(draw.random(len(images)) < noise)
        other = (labels + torch.from_numpy(draw.integers(1, classes, len(images)))) % classes
        noisy = torch.where(corrupted, other, labels)
        validation = labels
        if self.swap:
            rest, out, validation = out, rest, noisy
        if self.imbalance > 1:
            rest = rest[long_tailed(labels[rest], self.imbalance)]
        images, test_images = (images - mean) / deviation, (test_images - mean) / deviation
        self.corrupted = corrupted[rest]
        self.train = SampleIds(TensorDataset(images[rest], noisy[rest]))
        self.concepts = ConceptIndex.from_labels(noisy[rest], range(classes))
        self.val = TensorDataset(images[out], validation[out])
        self.test = TensorDataset(test_images, test_labels)

    def train_dataloader(self) -> DataLoader:
        """Candidate batches, as the sampler draws them."""
        assert self.train is not None
        return DataLoader(
            self.train, self.batch_size, num_workers=self.num_workers, **sampled(self, self.concepts, self.sampler)
        )

    def val_dataloader(self) -> DataLoader:
        """The held-out images, in order."""
        return DataLoader(self.val, 1000, num_workers=self.num_workers)

    def test_dataloader(self) -> DataLoader:
        """The test images, in order."""
        return DataLoader(self.test, 1000, num_workers=self.num_workers)


class CorruptedShare(Callback, SelectionListener):
    """Logs the share of wrong labels so far, ``curation/kept_corrupted`` and ``curation/all_corrupted``."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._wrong: Tensor | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier fit."""
        if stage == "fit":
            self._sums = self._wrong = None

    def on_selection(self, trainer: Trainer, pl_module: LightningModule, step: int, choice: Choice) -> None:
        """Count."""
        assert choice.sample_ids is not None
        if self._wrong is None:
            self._wrong = trainer.datamodule.corrupted.to(choice.sample_ids.device)  # type: ignore[attr-defined]
        wrong = self._wrong[choice.sample_ids].double()
        kept = wrong if choice.rows is None else wrong[choice.rows]
        new = torch.stack(
            [kept.sum(), torch.full_like(kept.sum(), len(kept)), wrong.sum(), kept.new_tensor(len(wrong))]
        )
        self._sums = new if self._sums is None else self._sums + new
        if logs_now(trainer):
            for i, name in enumerate(("kept", "all")):
                share = self._sums[2 * i] / self._sums[2 * i + 1]
                pl_module.log(f"curation/{name}_corrupted", share, on_step=True, on_epoch=False, batch_size=1)

    def state_dict(self) -> dict[str, Any]:
        """The counts of this rank."""
        return {"sums": self._sums}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._sums = state_dict["sums"]


def long_tailed(labels: Tensor, imbalance: float) -> Tensor:
    """The first ``max(1, n imbalance^(-c / (C - 1)))`` samples of each class ``c``: int64 positions, ascending.

    Args:
        labels: int64 ``[N]`` in ``[0, C)``.
        imbalance: Of the first class over the last.
    """
    counts = labels.bincount()
    last = max(len(counts) - 1, 1)
    kept = [
        (labels == c).nonzero().flatten()[: max(1, round(int(counts.max()) * imbalance ** (-c / last)))]
        for c in range(len(counts))
    ]
    return torch.cat(kept).sort().values


def load(data: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images fp32 ``[N, C, H, W]`` in [0, 1] and int64 labels ``[N]``, and the same of the test set.

    Args:
        data: As in :class:`Images`.

    Raises:
        ValueError: If the folder lacks a file.
        ImportError: If scikit-learn or datasets is missing for what is asked.
    """
    if data == "digits":
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        x = torch.from_numpy(images).float().view(-1, 1, 8, 8) / 16
        y = torch.from_numpy(labels).long()
        return x[:-360], y[:-360], x[-360:], y[-360:]
    folder = Path(data)
    if folder.is_absolute() or folder.is_dir():
        parts = [
            _idx(folder, f"{part}-{kind}-ubyte")
            for part in ("train", "t10k")
            for kind in ("images-idx3", "labels-idx1")
        ]
    else:
        require_extra()
        import datasets

        parts = []
        for part in ("train", "test"):
            rows = datasets.load_dataset(data, split=part).with_format("numpy")
            parts += [torch.from_numpy(np.stack(list(rows["image"]))), torch.from_numpy(np.asarray(rows["label"]))]
    x, y, test_x, test_y = parts
    x, test_x = ((t.unsqueeze(1) if t.dim() == 3 else t.movedim(-1, 1)).float() / 255 for t in (x, test_x))
    return x, y.long(), test_x, test_y.long()


def _idx(folder: Path, name: str) -> Tensor:
    """An array in the format of MNIST: a magic number, big-endian int32 sizes, bytes."""
    file = next((f for f in (folder / f"{name}.gz", folder / name) if f.is_file()), None)
    if file is None:
        raise ValueError(
            f"Argument `data` must be 'digits', a hub name, or a folder with {name}.gz, but got {folder}."
        )
    content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    dimensions = content[3]
    shape = np.frombuffer(content, ">i4", dimensions, offset=4)
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape).copy())
