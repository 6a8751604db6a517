"""Where text in several domains is found: manual pages of the machine, or what installed packages come with."""

import glob
import os
from pathlib import Path

from curation.recipes.sources import Source, resolve

PACKAGES = {  # what Python and packages of the [recipes] extra bring along
    "prose": "package:torch/../*.dist-info/METADATA",  # the read-me files of all packages
    "python": "package:argparse/*.py",  # the folder of the standard library
    "tables": "package:encodings/*.py",
    "cpp": "package:torch/include/torch",
    "fonts": "package:matplotlib/mpl-data/fonts/afm/*.afm",
}
MANUAL_PAGES = {
    "english": "/usr/share/man/man[2-8]",
    "german": "/usr/share/man/de",
    "french": "/usr/share/man/fr",
    "spanish": "/usr/share/man/es",
    "japanese": "/usr/share/man/ja",
    "documentation": "/usr/share/doc/python3.*/html/_sources",
    "python": PACKAGES["python"],
    "cpp": PACKAGES["cpp"],
}
NAMED = {"manual_pages": MANUAL_PAGES, "packages": PACKAGES}


def places(source: str) -> list[Path]:
    """The files and folders that a source names; none where it does not exist.

    Args:
        source: A folder, a glob or ``package:NAME/PATH``, as in
            :class:`~curation.recipes.mixture_of_experts.Domains`.
    """
    if source.startswith("package:"):
        package, _, path = source.partition("/")
        try:
            source = os.path.join(glob.escape(resolve(package)), path)
        except ImportError:
            return []
    return list(map(Path, glob.glob(os.path.expanduser(source), recursive=True)))


DOMAINS = (
    Source(
        "manual_pages",
        "manual pages in five languages, the documentation of Python, its library, and headers of torch",
        lambda: all(map(places, MANUAL_PAGES.values())),
    ),
    Source("packages", "read-me files, the library of Python, and files of torch and matplotlib"),
)
