"""``curation report FILE.json ...``: the page and the pictures of a comparison, made anew from its JSON."""

import argparse
from pathlib import Path

from curation.recipes.compare.report import read, show, write


def main(args: list[str]) -> None:
    """``curation report FILE.json ...``.

    Raises:
        ValueError: If a file is not the report of a comparison.
        OSError: If a file cannot be read or written.
    """
    parser = argparse.ArgumentParser(
        "curation report", description="Make .html, .png and .svg of a comparison anew from its .json."
    )
    parser.add_argument("files", nargs="+", type=Path, help="report.json of comparisons")
    for file in parser.parse_args(args).files:
        content = read(file)
        write(content, file.with_suffix(""))
        show(content, file.with_suffix(""))
