"""``python -m curation.recipes.cli`` is ``curation``."""

from curation.recipes.cli import main

main()
