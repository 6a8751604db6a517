"""The data module of labelled images, with wrong labels and a long tail of classes where asked."""

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, TensorDataset

from curation.audit import ThresholdSamples
from curation.batch import SampleIds
from curation.checks import check_flag, check_integer, check_number, check_path, check_seed
from curation.recipes.image_classification.fashion_mnist import IMAGES, class_names, load_images
from curation.recipes.label_noise import corrupt_labels
from curation.recipes.sources import AUTO, found, sampled
from curation.samplers.concept_index import ConceptIndex


class Images(LightningDataModule):
    """Labelled images in memory; the training labels may be corrupted.

    Args:
        data: ``"digits"`` (1,797 images of scikit-learn), a folder with the four ``idx`` files of MNIST or
            Fashion-MNIST (gzipped or not), or a hub name with the columns ``image`` and ``label``; ``"auto"`` is
            Fashion-MNIST in the folder of Debian's package, or else on the hub where ``download`` allows it, or else
            ``"digits"``.
        label_noise: Share of the training labels that are drawn anew from the other classes, in [0, 1).
        holdout: Share of the training images that are held out with right labels, in (0, 1): for validation, and for
            training where ``swap`` is True.
        swap: Train on the held-out images and validate on the others, for irreducible losses.
        holdout_noise: Share of wrong labels among the held-out images where ``swap`` trains on them, in [0, 1).
        imbalance: How many times as many training images the first class has as the last, with an exponential in
            between, as in long-tailed CIFAR (arXiv 1901.05555); 1 for all images.
        rarest: Fewest training images of a class with ``imbalance``, which small data reach sooner.
        batch_size: Candidates per training batch and device.
        sampler: Makes the sampler of the training batches from ``concepts`` and the batch size, such as
            :class:`~curation.samplers.concept_aware.ConceptAwareSampler` or
            :class:`~curation.samplers.hard_batches.HardBatchSampler`; None reshuffles every epoch.
        num_workers: Worker processes of each data loader.
        seed: Seed of the split and of the wrong labels.
        download: Whether ``"auto"`` may download from the hub, unless ``HF_HUB_OFFLINE`` is 1.
        threshold_samples: Share of the training images that get a wrong label to compare with, in [0, 1), as
            :class:`~curation.audit.threshold_samples.ThresholdSamples`.

    Attributes:
        concepts: Index of the training labels, by sample id.
        corrupted: Whether a training label is wrong, bool ``[N]`` by sample id.
        shape: ``(C, H, W)`` of an image.

    Raises:
        ValueError: If an argument is out of its range, or ``data`` holds no images.
    """

    auto_sources: ClassVar = {"data": IMAGES}

    def __init__(
        self,
        data: str = AUTO,
        label_noise: float = 0.0,
        holdout: float = 0.1,
        swap: bool = False,
        holdout_noise: float = 0.0,
        imbalance: float = 1.0,
        rarest: int = 1,
        batch_size: int = 128,
        sampler: Callable[[Any, int], Sampler] | None = None,
        num_workers: int = 0,
        seed: int = 0,
        download: bool = False,
        threshold_samples: float = 0.0,
    ) -> None:
        super().__init__()
        check_flag("download", download)
        self.data = found(self.auto_sources, {"data": check_path("data", data), "download": download})["data"]
        check_number("label_noise", label_noise, "[0, 1)")
        check_number("holdout", holdout, "(0, 1)")
        check_flag("swap", swap)
        check_number("threshold_samples", threshold_samples, "[0, 1)")
        check_number("holdout_noise", holdout_noise, "[0, 1)")
        check_number("imbalance", imbalance, "[1, inf)")
        check_integer("rarest", rarest, 1)
        check_integer("batch_size", batch_size, 1)
        check_integer("num_workers", num_workers, 0)
        check_seed(seed)
        self.label_noise = label_noise
        self.holdout = holdout
        self.swap = swap
        self.threshold_samples = threshold_samples
        self.holdout_noise = holdout_noise
        self.imbalance = imbalance
        self.rarest = rarest
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
        images, labels, test_images, test_labels = load_images(self.data)
        mean, deviation = images.mean(), images.std()
        self.shape = images.shape[1:]
        generator = np.random.default_rng(self.seed)
        order = torch.from_numpy(generator.permutation(len(images)))
        classes = int(labels.max()) + 1
        size = int(self.holdout * len(images))
        train, held_out = order[size:], order[:size]
        noise = np.full(len(images), self.label_noise)
        noise[held_out] = self.holdout_noise
        noisy_labels, corrupted = corrupt_labels(labels, noise, classes, generator)
        val_labels = labels
        if self.swap:
            train, held_out, val_labels = held_out, train, noisy_labels
        if self.imbalance > 1:
            train = train[long_tailed(labels[train], self.imbalance, self.rarest)]
        images, test_images = (images - mean) / deviation, (test_images - mean) / deviation
        self.corrupted = corrupted[train]
        dataset: Any = TensorDataset(images[train], noisy_labels[train])
        if self.threshold_samples:
            dataset = ThresholdSamples(dataset, classes, self.threshold_samples, seed=self.seed)
        self.train = SampleIds(dataset)
        self.concepts = ConceptIndex.from_labels(noisy_labels[train], class_names(self.data, classes))
        self.val = TensorDataset(images[held_out], val_labels[held_out])
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


def long_tailed(labels: Tensor, imbalance: float, rarest: int = 1) -> Tensor:
    """The first ``max(rarest, n imbalance^(-c / (C - 1)))`` samples of each class ``c`` (arXiv 1901.05555).

    Args:
        labels: int64 ``[N]`` in ``[0, C)``; ``n`` is the size of the largest class.
        imbalance: Size of the first class over that of the last, at least 1.
        rarest: Fewest samples of a class that has as many.

    Returns:
        Positions, int64 ``[M]``, ascending.

    Example:
        >>> long_tailed(torch.tensor([0, 1, 0, 1, 0, 1, 0, 1]), 4.0)
        tensor([0, 1, 2, 4, 6])
    """
    counts = labels.bincount()
    last = max(len(counts) - 1, 1)
    kept = [
        (labels == c).nonzero().flatten()[: max(rarest, round(int(counts.max()) * imbalance ** (-c / last)))]
        for c in range(len(counts))
    ]
    return torch.cat(kept).sort().values
