"""The ``curation`` command: Lightning's command line with named recipes, and the commands of this folder.

``curation fit --config sft_utility_diversity --trainer.max_steps=10`` runs a packaged recipe with one value changed;
``curation recipes`` lists them, shows one, or copies one to edit.
"""

import os
import sys
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import version

from curation.recipes.catalogue import with_recipe_files
from curation.recipes.cli.lightning_cli import run
from curation.recipes.cli.parser_errors import describe_refusal
from curation.recipes.sources import require_extra

COMMANDS = (
    "audit",
    "compare",
    "doctor",
    "export",
    "irreducible",
    "ledger",
    "recipes",
    "report",
    "rollouts",
    "select",
)  # each a file of this folder
FITS = ("fit", "validate", "test")  # Lightning's
WITHOUT_EXTRA = ("doctor", "recipes")


def main(args: list[str] | None = None) -> None:
    """Run a command; what a user can mend is said in one line, with exit status 1.

    Args:
        args: The arguments after ``curation`` in a shell; None for those of this process.
    """
    args = sys.argv[1:] if args is None else args
    if args == ["--version"]:
        print(f"lightning-curation {version('lightning-curation')}")
        return
    if not args:
        sys.exit(f"curation: name a command: {', '.join(FITS + COMMANDS)}. `curation COMMAND --help` says more.")
    if not args[0].startswith("-") and args[0] not in COMMANDS + FITS:
        near = get_close_matches(args[0], COMMANDS + FITS, 1)
        hint = f"the nearest is {near[0]!r}" if near else f"there are {', '.join(FITS + COMMANDS)}"
        sys.exit(f"curation: {args[0]!r} is no command; {hint}.")
    sys.path.insert(0, os.getcwd())  # a rule of the user's own is found by its class path, as with `python -m`
    try:
        if args[0] not in WITHOUT_EXTRA:
            args = with_recipe_files(args)
            require_extra()
        if args[0] in COMMANDS:
            import_module(f"curation.recipes.cli.{args[0]}").main(args[1:])
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
        sys.exit(f"curation: {describe_refusal(error, args)}")
