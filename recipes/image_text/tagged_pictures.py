"""The data module of pictures with texts and tags, which are decoded when they are asked for."""

import re
import zlib
from collections.abc import Callable
from io import BytesIO
from typing import Any, ClassVar

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from curation.batch import SampleIds
from curation.checks import check_integer, check_path, check_seed
from curation.recipes.image_text.picture_files import HELD_OUT, PICTURES, decode, load_tagged_pictures
from curation.recipes.sources import AUTO, found, sampled
from curation.samplers.concept_index import ConceptIndex

_WORDS = 32  # words of a text; the rest is cut off


class TaggedPictures(LightningDataModule):
    """Pictures with a text and tags; a picture is decoded when it is asked for, not before.

    Args:
        data: A ``node_modules`` folder with the emoji of two artists: trains on Google's pictures of every emoji and
            of its skin tones, validates and tests on Twitter's pictures of disjoint halves of the emoji. Or a folder
            in the form of Hugging Face's ``imagefolder``, its ``metadata.jsonl`` with the columns ``file_name``,
            ``text`` and ``tags`` (a list). Or a hub name, with ``image``, ``text`` and ``tags``. A tenth of the
            training pictures is held out for each of ``validation`` and ``test`` that is not there. Or ``"glyphs"``:
            letters and signs of two fonts of matplotlib, with the words of their names as tags. ``"auto"`` is the
            emoji of ``.venv/node_modules`` where they are installed, or else ``"glyphs"``.
        batch_size: Pictures per training batch and process.
        sampler: Makes the sampler of the training batches from ``concepts`` and the batch size, such as
            :class:`~curation.samplers.concept_aware.ConceptAwareSampler`; None reshuffles every epoch.
        num_workers: Worker processes of each data loader.
        seed: Seed of the split.
        image_size: Height and width; pictures of another shape are cropped in the middle.

    Attributes:
        concepts: Index of the tags of the training pictures, by sample id.
        names: Names of the concepts as texts, int64 ``[V, T]``.
        tags: Concepts of each picture, bool ``[N, V]``, for ``"val"`` and ``"test"``; without tags that no training
            picture has.
        groups: Concepts of a metric, bool ``[V]`` each: ``"tags"``, all; ``"tags_head"``, the tenth with most
            training pictures; ``"tags_tail"``, the half with fewest; ties by their order in ``concepts``.

    Raises:
        ValueError: If a number is out of its range, or ``data`` is not there, lacks a column or has too few pictures.
        ImportError: If a package is missing in the ``node_modules`` folder; the message has the command.
    """

    auto_sources: ClassVar = {"data": PICTURES}

    def __init__(
        self,
        data: str = AUTO,
        batch_size: int = 64,
        sampler: Callable[[Any, int], Sampler] | None = None,
        num_workers: int = 0,
        seed: int = 0,
        image_size: int = 64,
    ) -> None:
        super().__init__()
        self.data = found(self.auto_sources, {"data": check_path("data", data)})["data"]
        check_integer("batch_size", batch_size, 1)
        check_integer("num_workers", num_workers, 0)
        check_seed(seed)
        check_integer("image_size", image_size, 1)
        self.batch_size = batch_size
        self.sampler = sampler
        self.num_workers = num_workers
        self.seed = seed
        self.image_size = image_size
        self.train: SampleIds | None = None

    def setup(self, stage: str) -> None:
        """Read texts and tags, once; no picture."""
        if self.train is not None:
            return
        parts = load_tagged_pictures(self.data, self.seed)
        processes = self.trainer.world_size if self.trainer is not None else 1
        most = len(parts["train"]) // processes
        if self.batch_size > most:
            raise ValueError(
                f"Argument `batch_size` must be at most {most}, the training pictures of a process, but got "
                f"{self.batch_size!r}."
            )
        self.concepts = ConceptIndex.from_column(parts["train"], "tags")
        self.names = torch.stack([tokenize(str(name)) for name in self.concepts.names])
        rank = torch.from_numpy(-self.concepts.frequencies).argsort(stable=True).argsort() / len(self.names)
        self.groups = {"tags": rank < 1, "tags_head": rank < 0.1, "tags_tail": rank >= 0.5}
        self.tags = {stage: self._multi_hot(parts[name]) for stage, name in HELD_OUT.items()}
        train, self.val, self.test = (
            Pictures(parts[name], self.image_size) for name in ("train", *HELD_OUT.values())
        )
        self.train = SampleIds(train)

    def _multi_hot(self, rows: Any) -> Tensor:
        """The training concepts of each picture: bool ``[N, V]``."""
        index = ConceptIndex.from_column(rows, "tags")
        columns = {name: i for i, name in enumerate(self.concepts.names)}
        concept = np.array([columns.get(name, -1) for name in index.names], np.int64)[index.ids]
        picture = np.repeat(np.arange(len(index)), index.sizes)
        tags = torch.zeros(len(index), len(columns), dtype=torch.bool)
        tags[picture[concept >= 0], concept[concept >= 0]] = True
        return tags

    def train_dataloader(self) -> DataLoader:
        """Batches as the sampler draws them; a last one with fewer pictures is left out."""
        assert self.train is not None
        order = sampled(self, self.concepts, self.sampler)
        return DataLoader(self.train, self.batch_size, num_workers=self.num_workers, drop_last=True, **order)

    def val_dataloader(self) -> DataLoader:
        """The validation pictures, in order."""
        return DataLoader(self.val, 256, num_workers=self.num_workers)

    def test_dataloader(self) -> DataLoader:
        """The test pictures, in order."""
        return DataLoader(self.test, 256, num_workers=self.num_workers)


class Pictures(Dataset):
    """Samples ``{"image": uint8 [3, H, W], "tokens": int64 [T], "row": int}``.

    Args:
        rows: A ``datasets.Dataset`` with the columns ``image``, not decoded, and ``text``.
        size: Height and width.
    """

    def __init__(self, rows: Any, size: int) -> None:
        self.files = rows.select_columns(["image"])
        self.tokens = torch.stack([tokenize(text) for text in rows["text"]])
        self.size = size

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Any]:
        file = self.files[int(index)]["image"]
        image = decode(file["path"] if file["bytes"] is None else BytesIO(file["bytes"]), self.size)
        return {"image": image, "tokens": self.tokens[index], "row": int(index)}


def tokenize(text: str) -> Tensor:
    """Hashes of the first 32 words of a text, in lower case; 0 fills up: int64 ``[32]``.

    Example:
        >>> bool((tokenize("Waving hand") == tokenize("waving HAND!")).all())
        True
    """
    words = [zlib.crc32(word.lower().encode()) | 1 for word in re.findall(r"\w+", text)[:_WORDS]]
    return torch.tensor(words + [0] * (_WORDS - len(words)), dtype=torch.int64)
