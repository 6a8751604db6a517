"""Where tagged pictures are read: emoji, glyphs, a folder, or the Hugging Face hub; and how one is decoded."""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curation.recipes.image_text.emoji import EMOJI, load_emoji
from curation.recipes.image_text.glyphs import load_glyphs
from curation.recipes.sources import Source, require_extra

PICTURES = (
    Source(EMOJI, "emoji of two artists, in packages of npm", lambda: Path(EMOJI, "emojibase-data").is_dir()),
    Source("glyphs", "letters and signs of two fonts of matplotlib"),
)
HELD_OUT = {"val": "validation", "test": "test"}
_COLUMNS = ("image", "text", "tags")


def load_tagged_pictures(data: str, seed: int = 0) -> dict[str, Any]:
    """Tagged pictures by split: ``train``, ``validation`` and ``test``.

    Args:
        data: A ``node_modules`` folder, ``"glyphs"``, a folder of pictures or a hub name, as in
            :class:`~curation.recipes.image_text.TaggedPictures`.
        seed: Seed of what is held out.

    Returns:
        A ``datasets.Dataset`` for each split, with the columns ``image`` (not decoded), ``text`` and ``tags``.

    Raises:
        ValueError: If there are too few pictures, or a column is missing.
        ImportError: If a package is missing.
    """
    require_extra()
    import datasets

    folder = Path(data)
    if data == "glyphs":
        parts = load_glyphs(seed)
    elif folder.name == "node_modules":
        parts = load_emoji(folder, seed)
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
    for name in HELD_OUT.values():
        if name not in parts:
            parts["train"], parts[name] = parts["train"].train_test_split(0.1, seed=seed).values()
    return parts


def decode(file: str | BytesIO, size: int) -> Tensor:
    """A picture, on white where it is transparent, its longer side cropped.

    Args:
        file: Path or content of the file.
        size: Height and width.

    Returns:
        uint8 ``[3, size, size]``.
    """
    from PIL import Image, ImageOps

    with Image.open(file) as opened:
        picture = opened.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture)
    return torch.from_numpy(np.array(ImageOps.fit(white.convert("RGB"), (size, size)))).movedim(2, 0)
