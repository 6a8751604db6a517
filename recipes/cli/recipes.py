"""``curation recipes``: list the packaged recipes, print one, or copy one to edit."""

import argparse
import errno
import os
from pathlib import Path

import yaml

from curation.files import replacing
from curation.recipes.catalogue import find_recipe, recipe_names
from curation.recipes.sources import Source, with_sources


def main(args: list[str]) -> None:
    """``curation recipes [NAME [--copy [FILE]]]``.

    Raises:
        ValueError: If the name is unknown.
        OSError: If the copy would overwrite a file, or cannot be written.
    """
    parser = argparse.ArgumentParser("curation recipes", description="List the recipes, print one, or copy one.")
    parser.add_argument("name", nargs="?", help="print this recipe")
    parser.add_argument("--copy", nargs="?", const="", metavar="FILE", help="copy it instead (default NAME.yaml)")
    options = parser.parse_args(args)
    if options.name is None and options.copy is not None:
        parser.error("--copy needs the name of a recipe")
    if options.name is None:
        list_recipes()
    elif options.copy is None:
        print(find_recipe(options.name).read_text(), end="")
    else:
        copy_recipe(options.name, Path(options.copy or f"{options.name}.yaml"))


def list_recipes() -> None:
    """Print every recipe with the first line of its file, and of its data and models which are there."""
    for name in recipe_names():
        text = find_recipe(name).read_text()
        print(f"{name}: {text.splitlines()[0].lstrip('# ')}")
        needs = list(with_sources({key: yaml.safe_load(text)[key] for key in ("data", "model")}))
        for path, _, sources in needs:
            for argument, choices in sources.items():
                print(f"    --{path}.{argument}: {', '.join(f'{s.name} ({state(s, path)})' for s in choices)}")
        if not needs:
            print("    needs no data: they are made")


def state(source: Source, path: str) -> str:
    """Whether a source is there, and how to get it."""
    if source.on_hub:
        return f"--{path}.download=true" if source.there() else "HF_HUB_OFFLINE is set"
    return "there" if source.there() else "not there"


def copy_recipe(name: str, target: Path) -> None:
    """Copy the file of a recipe.

    Args:
        name: Name of the recipe.
        target: The new file.

    Raises:
        ValueError: If the name is unknown.
        OSError: If the file exists, or cannot be written.
    """
    text = find_recipe(name).read_text()
    if target.exists():
        raise FileExistsError(f"Argument `--copy` must name a new file, but {str(target)!r} exists.")
    if not target.parent.is_dir():  # a folder that is misspelt is not made
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(target))
    with replacing(target) as new:
        new.write_text(text)
    print(f"Copied to {target}. Run `curation fit --config {target}`.")
