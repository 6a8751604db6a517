"""The ``curation`` command: Lightning's command line with named recipes.

``curation fit --config sft_utility_diversity --trainer.max_steps=10`` runs a packaged recipe with one value changed;
``curation recipes`` lists them, shows one, or copies one to edit.
"""

import argparse
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from curation.recipes.sources import require_extra

FOLDER = Path(__file__).parent.parent


def recipe_names() -> list[str]:
    """Names of the packaged recipes."""
    return sorted(file.stem for file in FOLDER.glob("*/*.yaml"))


def find_recipe(name: str) -> Path:
    """The file of a packaged recipe.

    Raises:
        ValueError: If there is no such recipe; the message lists those there are.
    """
    if name not in recipe_names():
        raise ValueError(f"A recipe must be one of {', '.join(recipe_names())}, or a file, but got {name!r}.")
    (file,) = FOLDER.glob(f"*/{name}.yaml")
    return file


def with_recipe_files(args: list[str]) -> list[str]:
    """The arguments, with the file in the place of a recipe's name after ``--config`` or ``-c``.

    Raises:
        ValueError: If the value is neither an existing file nor a recipe's name.
    """
    found = []
    is_config = False
    for arg in args:
        option, equals, value = arg.partition("=")
        if is_config and not Path(arg).is_file():
            arg = str(find_recipe(arg))
        elif option == "--config" and equals and not Path(value).is_file():
            arg = f"{option}={find_recipe(value)}"
        is_config = arg in ("--config", "-c")
        found.append(arg)
    return found


def run(args: list[str], execute: bool = True, instantiate: bool = True) -> Any:
    """Lightning's command line.

    Args:
        args: As after ``curation`` in a shell; without the subcommand where ``execute`` is False.
        execute: Run the subcommand. Otherwise only make the trainer, the module and the data module.
        instantiate: Make them. Otherwise only read the configuration.

    Returns:
        The ``LightningCLI``, with ``trainer``, ``model``, ``datamodule`` and ``config``.

    Raises:
        ImportError: If the ``[recipes]`` extra is missing.
        ValueError: If a recipe's name is unknown.
    """
    require_extra()
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

    class SaveConfig(SaveConfigCallback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            if trainer.loggers:  # else it would go into the current folder, where the user's own may be
                super().setup(trainer, pl_module, stage)

    class CLI(LightningCLI):
        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            return {name: skip for name, skip in LightningCLI.subcommands().items() if name != "predict"}

        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.add_argument("--arms", type=dict | None, help="for `curation compare` only")

        def instantiate_classes(self) -> None:
            if instantiate:
                super().instantiate_classes()

        def _instantiate_trainer(self, config: dict[str, Any], callbacks: Any) -> Any:
            interval = config.get("val_check_interval")  # which Lightning 2.5 reads as a float, and then refuses
            if isinstance(interval, float) and interval > 1:
                config["val_check_interval"] = int(interval)
            return super()._instantiate_trainer(config, callbacks)

        def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
            # Lightning's own method warns of `args` beside sys.argv, even where they are the same.
            self.config = parser.parse_args(args)

    return CLI(
        args=with_recipe_files(args),
        run=execute,
        save_config_callback=SaveConfig,
        save_config_kwargs={"overwrite": True},
        auto_configure_optimizers=False,
        parser_kwargs={
            "prog": "curation",
            "description": "See also `curation recipes|compare|report|ledger|irreducible|select --help`.",
        },
    )


def recipes(args: list[str]) -> None:
    """``curation recipes [NAME [--copy [FILE]]]``.

    Raises:
        ValueError: If the name is unknown.
        OSError: If the copy would overwrite a file, or cannot be written.
    """
    parser = argparse.ArgumentParser("curation recipes", description="List the recipes, print one, or copy one.")
    parser.add_argument("name", nargs="?", help="print this recipe")
    parser.add_argument("--copy", nargs="?", const="", metavar="FILE", help="copy it instead (default NAME.yaml)")
    options = parser.parse_args(args)
    if options.name is None:
        if options.copy is not None:
            parser.error("--copy needs the name of a recipe")
        width = max(map(len, recipe_names()))
        for name in recipe_names():
            print(f"{name:{width}}  {find_recipe(name).read_text().splitlines()[0].lstrip('# ')}")
        return
    text = find_recipe(options.name).read_text()
    if options.copy is None:
        print(text, end="")
        return
    target = Path(options.copy or f"{options.name}.yaml")
    if target.exists():
        raise FileExistsError(f"Argument `--copy` must name a new file, but {str(target)!r} exists.")
    target.write_text(text)
    print(f"Copied to {target}. Run `curation fit --config {target}`.")


def first_cause(error: BaseException) -> BaseException:
    """What a constructor said, which the parser wraps in all that it tried."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return error


def main(args: list[str] | None = None) -> None:
    """The console command."""
    args = sys.argv[1:] if args is None else args
    sys.path.insert(0, os.getcwd())  # a rule of the user's own is found by its class path, as with `python -m`
    try:
        if args[:1] == ["recipes"]:
            recipes(args[1:])
            return
        args = with_recipe_files(args)
        require_extra()
        if args[:1] in (["compare"], ["irreducible"], ["ledger"], ["report"], ["select"]):
            room = "compare" if args[0] in ("compare", "report") else "cli"
            import_module(f"curation.recipes.{room}.{args[0]}").main(args[1:])
            return
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"curation: {error}")
    except KeyboardInterrupt:
        sys.exit("curation: interrupted; the same command goes on where it was")
    try:
        run(args)
    except ValueError as error:
        if not str(error).startswith("Does not validate"):
            raise
        sys.exit(f"curation: {first_cause(error)}")


if __name__ == "__main__":
    main()
