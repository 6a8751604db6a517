"""Where Fashion-MNIST, MNIST and handwritten digits are read: files, scikit-learn, or the Hugging Face hub."""

import gzip
import zlib
from collections.abc import Hashable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from curation.recipes.sources import Source, installed, online, require_extra

FASHION_MNIST = "/usr/share/datasets/fashion-mnist"
IMAGES = (
    Source(FASHION_MNIST, "Debian's package dataset-fashion-mnist", lambda: Path(FASHION_MNIST).is_dir()),
    Source("zalando-datasets/fashion_mnist", "Fashion-MNIST on the hub, 30 MB", online),
    Source("digits", "1,797 handwritten digits of scikit-learn", installed("sklearn")),
)

CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


def load_images(data: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, test images and labels.

    Args:
        data: ``"digits"``, a folder, or a hub name, as in :class:`~curation.recipes.image_classification.Images`.

    Returns:
        Images fp32 ``[N, C, H, W]`` in [0, 1] and labels int64 ``[N]`` to train on, and the same to test on.

    Raises:
        ValueError: If the folder lacks a file, or one is damaged.
        ImportError: If scikit-learn or datasets is missing for what is asked.
    """
    if data == "digits":
        return _digits()
    folder = Path(data)
    if folder.is_absolute() or folder.is_dir():
        arrays = [
            _read_idx(folder, f"{part}-{kind}-ubyte")
            for part in ("train", "t10k")
            for kind in ("images-idx3", "labels-idx1")
        ]
    else:
        arrays = _from_hub(data)
    x, y, test_x, test_y = arrays
    x, test_x = ((t.unsqueeze(1) if t.dim() == 3 else t.movedim(-1, 1)).float() / 255 for t in (x, test_x))
    return x, y.long(), test_x, test_y.long()


def _digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Handwritten digits of scikit-learn, 8 x 8; the last 360 are the test set."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(images).float().view(-1, 1, 8, 8) / 16
    y = torch.from_numpy(labels).long()
    return x[:-360], y[:-360], x[-360:], y[-360:]


def _from_hub(name: str) -> list[Tensor]:
    """The splits ``train`` and ``test`` of a data set on the Hugging Face hub."""
    require_extra()
    import datasets

    arrays = []
    for part in ("train", "test"):
        rows = datasets.load_dataset(name, split=part).with_format("numpy")
        arrays += [torch.from_numpy(np.stack(list(rows["image"]))), torch.from_numpy(np.asarray(rows["label"]))]
    return arrays


def _read_idx(folder: Path, name: str) -> Tensor:
    """An array in the format of MNIST: a magic number, big-endian int32 sizes, bytes."""
    file = next((f for f in (folder / f"{name}.gz", folder / name) if f.is_file()), None)
    if file is None:
        raise ValueError(
            f"Argument `data` must be 'digits', a hub name, or a folder with {name}.gz, but got {folder}."
        )
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        if content[:3] != b"\0\0\x08":
            raise ValueError("it does not begin as an array of bytes")
        dimensions = content[3]
        shape = np.frombuffer(content, ">i4", dimensions, offset=4)
        return torch.from_numpy(np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape).copy())
    except (gzip.BadGzipFile, zlib.error, EOFError, ValueError, IndexError) as error:
        raise ValueError(f"The file {str(file)!r} is damaged, or another: {error}") from error


def class_names(data: str, classes: int) -> Sequence[Hashable]:
    """Names of the classes: those of Fashion-MNIST where the name of the source says that it is that, or numbers.

    Args:
        data: The source, as for :func:`load_images`.
        classes: Number of classes.

    Example:
        >>> class_names(FASHION_MNIST, 10)[0], list(class_names("digits", 2))
        ('T-shirt', [0, 1])
    """
    return CLASSES if "fashion" in str(data).lower() and classes == len(CLASSES) else range(classes)
