"""Writes docs/files.md: every file of the three rooms, with the first sentence of its docstring or comment.

``python docs/extensions/file_tree.py`` rewrites the page; a test compares the page with what this file generates.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "files.md"
ROOMS = ("curation", "callbacks", "recipes")
HEADER = """\
<!-- made by `make tree` -->
# Files

Every file of the three rooms, with the first sentence of its docstring. The line of a folder is that of its
`__init__.py`. How the rooms depend on each other is in [the architecture](architecture.md#rooms).

`tests/` has the folders of the three rooms again, and `tests/contract/`, one suite for every public callback. `docs/`
has a card for every method, `benchmarks/` measures costs, and `findings/` shows faults of other packages.
"""


def first_sentence(text: str) -> str:
    """The first sentence of a text, on one line."""
    text = " ".join(text.split("\n\n")[0].replace("``", "`").split())
    return re.split(r"(?<=\.)\s+(?=[A-Z`*])", text, maxsplit=1)[0]


def describe(file: Path) -> str:
    """What a module says of itself in its docstring, or a YAML file in its first comment."""
    text = file.read_text()
    if file.suffix == ".py":
        return first_sentence(ast.get_docstring(ast.parse(text)) or "")
    comment = re.match(r"(?:#.*\n)+", text)
    return first_sentence("\n".join(line.lstrip("# ") for line in comment[0].splitlines())) if comment else ""


def files(folder: Path) -> list[Path]:
    """Source files and recipes in a folder, but not its ``__init__.py``."""
    return sorted(f for f in folder.iterdir() if f.suffix in (".py", ".yaml") and f.name != "__init__.py")


def folders(folder: Path) -> list[Path]:
    """Packages in a folder; links are left out, since what they point to has a tree of its own."""
    return sorted(f for f in folder.iterdir() if (f / "__init__.py").exists() and not f.is_symlink())


def tree(folder: Path, depth: int = 0) -> list[tuple[str, str]]:
    """A name, indented, and a description, for a folder and for everything in it."""
    rows = [("  " * depth + f"{folder.name}/", describe(folder / "__init__.py"))]
    for inner in folders(folder):
        rows += tree(inner, depth + 1)
    return rows + [("  " * (depth + 1) + file.name, describe(file)) for file in files(folder)]


def page(root: Path = ROOT) -> str:
    """The text of the page."""
    sections = []
    for room in ROOMS:
        rows = tree(root / room)
        width = max(len(name) for name, _ in rows)
        lines = "\n".join(f"{name:{width}}  {text}".rstrip() for name, text in rows)
        sections.append(f"\n## {room}\n\n```text\n{lines}\n```\n")
    return HEADER + "".join(sections)


if __name__ == "__main__":
    PAGE.write_text(page())
