"""Docstrings as Markdown: roles become links where the reference has their target, formulas become MathML."""

import re
from textwrap import dedent
from typing import Any

import griffe
from latex2mathml.converter import convert

ROLE = re.compile(r":(?:meth|class|func|mod|attr):`(~?)([^`]+)`")
EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)
MATH = re.compile(r"^\.\. math:: (.*(?:\n[ ]+.*)*)", re.MULTILINE)


class MarkdownDocstrings(griffe.Extension):
    """Rewrites every docstring of a package once it is loaded."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Visit the package and everything in it."""
        rewrite(pkg)


def rewrite(found: griffe.Object) -> None:
    """Rewrite the docstring of an object and of its members."""
    if found.docstring:
        text = MATH.sub(lambda m: convert(" ".join(dedent(m[1]).split()), display="block"), found.docstring.value)
        text = EXAMPLE.sub("Examples:", text)  # a section for griffe; the singular is a note
        found.docstring.value = ROLE.sub(lambda m: link(found, short=bool(m[1]), name=m[2]), text)
    for member in found.members.values():
        if not member.is_alias:
            rewrite(member)


def link(found: griffe.Object, short: bool, name: str) -> str:
    """A link to what a name means where it stands; plain code where the reference does not have it."""
    scope: Any = found
    target = name
    while scope is not None:
        if name in scope.members:
            target = f"{scope.path}.{name}"
            break
        scope = scope.parent
    shown = name.rpartition(".")[2] if short else name
    return f'<autoref optional identifier="{target}"><code>{shown}</code></autoref>'
