"""The ``curation`` command: a file for each command, which parses arguments, calls functions and prints."""

from curation.recipes.cli.commands import main
from curation.recipes.cli.lightning_cli import run

__all__ = ["main", "run"]
