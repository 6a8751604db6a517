"""Where emoji are read: pictures of two artists, with names and tags, from packages of npm."""

import json
from pathlib import Path
from typing import Any

EMOJI = ".venv/node_modules"
PACKAGES = "emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0 emojibase-data@17.0.0"


def load_emoji(folder: Path, seed: int) -> dict[str, Any]:
    """Emoji by split: Google's pictures to train on, Twitter's pictures of disjoint halves to validate and test on.

    Args:
        folder: A ``node_modules`` folder with the packages.
        seed: Seed of the halves.

    Returns:
        A ``datasets.Dataset`` for each split, with the columns ``image`` (a path), ``text`` and ``tags``.

    Raises:
        ImportError: If a package is missing; the message has the command that installs it.
    """
    import datasets

    names = folder / "emojibase-data/en/data.json"
    styles = {style: folder / f"emoji-datasource-{style}/img/{style}/64" for style in ("google", "twitter")}
    missing = next((path for path in (names, *styles.values()) if not path.exists()), None)
    if missing is not None:
        raise ImportError(
            f"Argument `data` must name a folder with emoji, but there is no {missing}. Run `npm install --prefix "
            f"{folder.parent} {PACKAGES}`."
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
    train, held_out = (datasets.Dataset.from_list(rows[style]) for style in styles)
    validation, test = held_out.train_test_split(0.5, seed=seed).values()
    return {"train": train, "validation": validation, "test": test}
