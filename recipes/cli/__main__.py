"""``python -m curation.recipes.cli`` is ``curation``."""

from curation.recipes.cli import main

if __name__ == "__main__":
    main()
