"""The packaged recipes: their names, and the YAML file of each."""

from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parent


def recipe_names() -> list[str]:
    """Names of the packaged recipes, in alphabetical order."""
    return sorted(file.stem for file in FOLDER.glob("*/*.yaml"))


def find_recipe(name: str) -> Path:
    """The file of a packaged recipe.

    Args:
        name: Name of the recipe, without ``.yaml``.

    Raises:
        ValueError: If there is no such recipe; the message lists the names.

    Example:
        >>> find_recipe("fashion_mnist_noisy").parent.name
        'image_classification'
    """
    if name not in recipe_names():
        raise ValueError(f"A recipe must be one of {', '.join(recipe_names())}, or a file, but got {name!r}.")
    (file,) = FOLDER.glob(f"*/{name}.yaml")
    return file


def with_recipe_files(args: Sequence[str]) -> list[str]:
    """Arguments of a command, in which the file takes the place of a recipe's name after ``--config`` or ``-c``.

    Args:
        args: The arguments, as in a shell.

    Raises:
        ValueError: If a value is neither an existing file nor the name of a recipe.
    """
    resolved = []
    is_config = False
    for arg in args:
        option, equals, value = arg.partition("=")
        if is_config and not Path(arg).is_file():
            arg = str(find_recipe(arg))
        elif option == "--config" and equals and not Path(value).is_file():
            arg = f"{option}={find_recipe(value)}"
        is_config = arg in ("--config", "-c")
        resolved.append(arg)
    return resolved
