"""Texts that every machine has: the sources of Python's standard library, and what they say of themselves."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from curation.recipes.sources import resolve


def _modules() -> Iterator[tuple[str, str]]:
    """Name and source of every module of the standard library that is a file, by name."""
    for file in sorted(Path(resolve("package:argparse")).glob("*.py")):
        yield file.stem, file.read_text(encoding="utf-8", errors="replace")


def questions() -> Iterator[tuple[str, str]]:
    """Questions about functions, methods and classes, and the first paragraph of their docstrings as answers."""
    for module, source in _modules():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and (text := ast.get_docstring(node)):
                answer = " ".join(text.split("\n\n")[0].split())
                if answer and not node.name.startswith("_"):
                    yield f"What is {node.name} of {module}?", answer


def paragraphs(modules: int, size: int) -> dict[str, list[str]]:
    """Different paragraphs of the sources, by module.

    Args:
        modules: Number of modules; those with most paragraphs are taken.
        size: Number of paragraphs of each, or as many as it has.
    """
    found = {}
    for module, source in _modules():
        parts = (" ".join(part.split()) for part in re.split(r"\n\s*\n", source))
        found[module] = list(dict.fromkeys(part for part in parts if len(part) >= 40))
    most = sorted(sorted(found, key=lambda module: -len(found[module]))[:modules])
    return {module: found[module][:size] for module in most}
