"""Letters and signs of two fonts of matplotlib as pictures, tagged with the words of their names."""

import unicodedata
from io import BytesIO
from typing import Any

FONTS = {"train": "DejaVuSans.ttf", "held_out": "DejaVuSerif.ttf"}
SIZE = 64
_EVERY_DAY = {"LETTER", "SIGN", "WITH", "AND"}  # words that tell next to nothing


def load_glyphs(seed: int) -> dict[str, Any]:
    """Glyphs by split: of one font to train on, of disjoint halves of another to validate and test on.

    Args:
        seed: Seed of the halves.

    Returns:
        A ``datasets.Dataset`` for each split, with the columns ``image`` (a PNG), ``text`` (the name of the character
        in Unicode) and ``tags`` (its words).
    """
    import datasets

    train, held_out = (datasets.Dataset.from_list(_rows(font)) for font in FONTS.values())
    validation, test = held_out.train_test_split(0.5, seed=seed).values()
    return {"train": train, "validation": validation, "test": test}


def _rows(font: str) -> list[dict[str, Any]]:
    """A picture, name and tags for every character of a font that is drawn alone."""
    import matplotlib
    from matplotlib.ft2font import FT2Font
    from PIL import Image, ImageDraw, ImageFont

    path = f"{matplotlib.get_data_path()}/fonts/ttf/{font}"
    pen, rows = ImageFont.truetype(path, 40), []
    for code in sorted(FT2Font(path).get_charmap()):
        words = unicodedata.name(chr(code), "").split()
        if not words or unicodedata.category(chr(code))[0] not in "LNPS":
            continue
        picture, file = Image.new("L", (SIZE, SIZE), 255), BytesIO()
        ImageDraw.Draw(picture).text((SIZE // 2, SIZE // 2), chr(code), 0, pen, anchor="mm")
        picture.save(file, "PNG")
        tags = list(dict.fromkeys(word.lower() for word in words if word not in _EVERY_DAY))
        rows.append({"image": file.getvalue(), "text": " ".join(words).lower(), "tags": tags})
    return rows
