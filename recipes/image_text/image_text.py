"""Pictures with texts and tags: a dual encoder, trained contrastively, measured on frequent and rare tags."""

import json
import math
import re
import zlib
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from curation.batch import SampleIds
from curation.contrastive import contrastive_loss, micro_batched, similarity
from curation.recipes.sources import require_extra, sampled
from curation.samplers.concept_index import ConceptIndex

EMOJI = ".venv/node_modules"
_PACKAGES = "emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0 emojibase-data@17.0.0"
_COLUMNS = ("image", "text", "tags")
_HELD_OUT = {"val": "validation", "test": "test"}
_WORDS = 32  # of a text; the rest is cut off


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
        dimension: Of the embeddings.
        words: Entries of the table of words.
        lr: Learning rate of AdamW.
        weight_decay: Of AdamW.
        micro_batch: Samples whose activations are in memory at a time (:func:`curation.contrastive.micro_batched`);
            None for all.

    Raises:
        ValueError: If ``lr`` is not positive, or ``micro_batch`` below 1.
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
        if not lr > 0:
            raise ValueError(f"Argument `lr` must be > 0, but got {lr!r}.")
        if micro_batch is not None and micro_batch < 1:
            raise ValueError(f"Argument `micro_batch` must be >= 1 or None, but got {micro_batch!r}.")
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
        """Embeddings ``[B, D]`` of texts int64 ``[B, T]``, as of :func:`tokenize`."""
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
        """Embed."""
        image, text = self.images(batch["image"]), self.texts(batch["tokens"])
        self._seen.append([image, text, batch["tokens"], batch["row"]])

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log what the embeddings of the whole set are worth."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """As in validation, on the test set."""
        self._log_metrics("test")

    def _log_metrics(self, stage: str) -> None:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        *parts, gathered = (self._gathered(torch.cat(x)) for x in zip(*self._seen, strict=True))
        self._seen = []
        # Ranks must have equally many, so some rows are there twice.
        rows, first = (torch.from_numpy(x) for x in np.unique(gathered.cpu().numpy(), return_index=True))
        image, text, tokens = (x[first.to(x.device)] for x in parts)
        same, pairs = same_rows(tokens), similarity(image, text)
        tags = data.tags[stage][rows]
        there = tags.any(0)
        names = self.texts(data.names[there].to(image.device))
        precision = tag_precision(similarity(image, names).cpu(), tags[:, there])
        values = {
            "loss": contrastive_loss(image, text, self.log_scale.exp(), same),
            "retrieval": (recall(pairs, same) + recall(pairs.T, same.T)) / 2,
            **{name: precision[concepts[there]].mean() for name, concepts in data.groups.items()},
        }
        for name, value in values.items():
            self.log(f"{stage}_{name}", value.to(image.device), prog_bar=name == "tags", sync_dist=True)

    def configure_optimizers(self) -> Any:
        """AdamW."""
        lr, weight_decay = self.hparams["lr"], self.hparams["weight_decay"]
        return torch.optim.AdamW(self.parameters(), lr=lr, weight_decay=weight_decay, fused=True)


class TaggedPictures(LightningDataModule):
    """Pictures with a text and tags; a picture is decoded when it is asked for, not before.

    Args:
        data: A ``node_modules`` folder with the emoji of two artists: trains on Google's pictures of every emoji and
            of its skin tones, validates and tests on Twitter's pictures of disjoint halves of the emoji. Or a folder
            in the form of Hugging Face's ``imagefolder``, its ``metadata.jsonl`` with the columns ``file_name``,
            ``text`` and ``tags`` (a list). Or a hub name, with ``image``, ``text`` and ``tags``. A tenth of the
            training pictures is held out for each of ``validation`` and ``test`` that is not there.
        batch_size: Pictures per training batch and process.
        sampler: Of the training batches, made from ``concepts`` and the batch size, such as
            :class:`~curation.samplers.concept_aware.ConceptAwareSampler`; None reshuffles every epoch.
        num_workers: Of the data loaders.
        seed: Of the split.
        image_size: Height and width; pictures of another shape are cropped in the middle.

    Attributes:
        concepts: The tags of the training pictures, in order of the sample ids.
        names: int64 ``[V, T]``, the names of the concepts as texts.
        tags: bool ``[N, V]`` for ``"val"`` and ``"test"``, without tags that no training picture has.
        groups: bool ``[V]`` each: ``"tags"``, all concepts; ``"tags_head"``, the tenth with most training pictures;
            ``"tags_tail"``, the half with fewest; ties by their place in ``concepts``.

    Raises:
        ValueError: If a number is out of its range, or ``data`` is not there, lacks a column or has too few pictures.
        ImportError: If a package is missing in the ``node_modules`` folder; the message has the command.
    """

    def __init__(
        self,
        data: str = EMOJI,
        batch_size: int = 64,
        sampler: Callable[[Any, int], Sampler] | None = None,
        num_workers: int = 0,
        seed: int = 0,
        image_size: int = 64,
    ) -> None:
        super().__init__()
        for name, value, least in (("batch_size", batch_size, 1), ("seed", seed, 0), ("image_size", image_size, 1)):
            if value < least:
                raise ValueError(f"Argument `{name}` must be >= {least}, but got {value!r}.")
        self.data = data
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
        parts = load(self.data, self.seed)
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
        self.tags = {stage: self._multi_hot(parts[name]) for stage, name in _HELD_OUT.items()}
        train, self.val, self.test = (
            Pictures(parts[name], self.image_size) for name in ("train", *_HELD_OUT.values())
        )
        self.train = SampleIds(train)

    def _multi_hot(self, rows: Any) -> Tensor:
        index = ConceptIndex.from_column(rows, "tags")
        place = {name: i for i, name in enumerate(self.concepts.names)}
        concept = np.array([place.get(name, -1) for name in index.names], np.int64)[index.ids]
        picture = np.repeat(np.arange(len(index)), index.sizes)
        tags = torch.zeros(len(index), len(place), dtype=torch.bool)
        tags[picture[concept >= 0], concept[concept >= 0]] = True
        return tags

    def train_dataloader(self) -> DataLoader:
        """Batches as the sampler draws them; a last one with fewer pictures is left out."""
        assert self.train is not None
        how = sampled(self, self.concepts, self.sampler)
        return DataLoader(self.train, self.batch_size, num_workers=self.num_workers, drop_last=True, **how)

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


def decode(file: str | BytesIO, size: int) -> Tensor:
    """A picture as uint8 ``[3, size, size]``, on white where it is transparent, its longer side cropped."""
    from PIL import Image, ImageOps

    with Image.open(file) as opened:
        picture = opened.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture)
    return torch.from_numpy(np.array(ImageOps.fit(white.convert("RGB"), (size, size)))).movedim(2, 0)


def augment(images: Tensor) -> Tensor:
    """Zoom, turn and move each picture a little and change its colours; ``[B, 3, H, W]`` in [-1, 1], white stays."""
    zoom, turn, x, y = ((2 * torch.rand(4, len(images), device=images.device) - 1) * 0.15).unbind()
    matrix = torch.stack([1 + zoom, -turn, x, turn, 1 + zoom, y], 1).view(-1, 2, 3)
    ink = (images - 1) * (0.5 + torch.rand_like(images[:, :, :1, :1]))
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(ink, grid, align_corners=False) + 1


def tokenize(text: str) -> Tensor:
    """Hashes of the first 32 words, then 0: int64 ``[32]``."""
    words = [zlib.crc32(word.lower().encode()) | 1 for word in re.findall(r"\w+", text)[:_WORDS]]
    return torch.tensor(words + [0] * (_WORDS - len(words)), dtype=torch.int64)


def same_rows(tokens: Tensor) -> Tensor:
    """Whether two texts are equal: bool ``[B, B]`` of int64 ``[B, T]``."""
    text = tokens.unique(dim=0, return_inverse=True)[1]
    return text[:, None] == text


def recall(similarities: Tensor, right: Tensor) -> Tensor:
    """Share of the rows whose most similar column is right, recall at 1; both ``[N, M]``."""
    return right.gather(1, similarities.argmax(1, keepdim=True)).float().mean()


def tag_precision(similarities: Tensor, tags: Tensor) -> Tensor:
    """For each concept the share of its pictures that rank it among their first ``|C_i|``: fp32 ``[V]``.

    Of the similarities of pictures and concepts and of bool ``C``, who has which; both ``[N, V]``.
    """
    place = similarities.argsort(1, descending=True).argsort(1)
    return (tags & (place < tags.sum(1, keepdim=True))).sum(0) / tags.sum(0)


def load(data: str, seed: int = 0) -> dict[str, Any]:
    """The splits ``train``, ``validation`` and ``test``: each a ``Dataset`` with ``image``, ``text`` and ``tags``.

    Args:
        data: As in :class:`TaggedPictures`.
        seed: Of what is held out.

    Raises:
        ValueError: If there are too few pictures, or a column is missing.
        ImportError: If a package is missing.
    """
    require_extra()
    import datasets

    folder = Path(data)
    if folder.name == "node_modules":
        parts = _emoji(folder, seed)
    elif folder.is_dir():
        try:
            parts = dict(datasets.load_dataset("imagefolder", data_dir=data))
        except FileNotFoundError as error:
            raise ValueError(f"Argument `data` must name a folder with pictures, but {data!r} has none.") from error
    elif folder.is_absolute() or data.startswith("."):
        raise ValueError(f"Argument `data` must be a folder or a hub name, but there is no {data!r}.")
    else:
        parts = dict(datasets.load_dataset(data))
    if len(parts.get("train", ())) < 3:
        raise ValueError(f"Argument `data` must have 3 pictures to train on, but {data!r} has fewer.")
    for name, rows in parts.items():
        missing = ", ".join(column for column in _COLUMNS if column not in rows.column_names)
        if missing:
            raise ValueError(f"Argument `data` must have the column {missing}, but `{name}` of {data!r} has not.")
        parts[name] = rows.select_columns(list(_COLUMNS)).cast_column("image", datasets.Image(decode=False))
    for name in _HELD_OUT.values():
        if name not in parts:
            parts["train"], parts[name] = parts["train"].train_test_split(0.1, seed=seed).values()
    return parts


def _emoji(folder: Path, seed: int) -> dict[str, Any]:
    import datasets

    names = folder / "emojibase-data/en/data.json"
    styles = {style: folder / f"emoji-datasource-{style}/img/{style}/64" for style in ("google", "twitter")}
    missing = next((path for path in (names, *styles.values()) if not path.exists()), None)
    if missing is not None:
        raise ImportError(
            f"Argument `data` must name a folder with emoji, but there is no {missing}. Run `npm install --prefix "
            f"{folder.parent} {_PACKAGES}`."
        )
    # Whether a code has its variation selectors (FE0F) differs from package to package.
    files = {s: {f.stem.replace("-fe0f", ""): str(f) for f in path.glob("*.png")} for s, path in styles.items()}
    rows: dict[str, list[dict[str, Any]]] = {style: [] for style in styles}
    for emoji in json.loads(names.read_text()):
        tags = emoji.get("tags")
        for variant in (emoji, *emoji.get("skins", [])) if tags else ():
            code = variant["hexcode"].lower().replace("-fe0f", "")
            text = f"{variant['label']}: {', '.join(tags)}"
            for style in styles if variant is emoji else ("google",):
                if code in files[style]:
                    rows[style].append({"image": files[style][code], "text": text, "tags": tags})
    train, others = (datasets.Dataset.from_list(rows[style]) for style in styles)
    validation, test = others.train_test_split(0.5, seed=seed).values()
    return {"train": train, "validation": validation, "test": test}
