"""``curation recipes``: list the packaged recipes, print one, or copy one to edit."""

import argparse
import errno
import os
from pathlib import Path

from curation.files import replacing
from curation.recipes.catalogue import find_recipe, recipe_names


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
    """Print every recipe with the first line of its file."""
    width = max(map(len, recipe_names()))
    for name in recipe_names():
        print(f"{name:{width}}  {find_recipe(name).read_text().splitlines()[0].lstrip('# ')}")


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
