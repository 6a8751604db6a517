"""Errors of the parser in a line or two: the file and the line, the option, and the nearest name that there is."""

import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from pydoc import locate
from typing import Any

import yaml

_UNKNOWN = re.compile(
    r"(?:Group '(?P<group>[^']+)' )?does not accept option '(?P<name>[^']+)'"
    r"|Option '(?P<other>[^']+)' is not accepted"
)
_PLACE = re.compile(
    r"^( *)(?:- )?(?:Parser key \"(?P<key>[^\"]+)\"|Problem with given class_path '(?P<cls>[^']+)')", re.M
)


def first_cause(error: BaseException) -> BaseException:
    """The error of a constructor, which the parser wraps in the errors of everything that it tried."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return error


def describe(message: str, error: BaseException | None, args: Sequence[str], options: Iterable[str]) -> str:
    """What a user has to know of an error of the parser.

    Args:
        message: What the parser says: the error, within those of everything that was tried.
        error: The exception, if there is one.
        args: The arguments of the command, where the option may stand, and which name the files where it may stand.
        options: The dotted names of all options.

    Returns:
        One line: where, which option, and what is wrong with it.
    """
    cause = message if error is None else str(first_cause(error))
    if damaged := _syntax_error(args):
        return damaged
    if cause.startswith("unrecognized arguments: "):
        name = cause.removeprefix("unrecognized arguments: ").split("=")[0].split()[0].lstrip("-")
        return _unknown(name, None, args, options)
    keys, class_path, is_class = _place(message, cause)
    if unknown := _UNKNOWN.search(cause):
        names = [*keys, unknown["group"], unknown["name"] or unknown["other"]]
        return _unknown(".".join(filter(None, names)), class_path, args, options)
    option, text = ".".join(keys), " ".join(cause.split())
    if not keys:
        return text
    of = f" of {class_path}" if class_path and class_path not in text else ""
    return f"{_where(option + '.class_path' * is_class, class_path, args)}`{option}`{of}: {text}"


def describe_refusal(error: BaseException, args: Sequence[str]) -> str:
    """What a constructor refuses, with file and line where a single option of that name can be meant.

    Args:
        error: The exception, within those of everything that was tried.
        args: The arguments of the command.
    """
    cause = str(first_cause(error))
    named = re.match(r"Argument `(\w+)`", cause)
    options = {path for file in _files(args) for path, *_ in _options(yaml.compose(file.read_text()))}
    meant = [o for o in options if named and o.rpartition(".")[2] == named[1] and not o.startswith("arms.")]
    given = any(option.rpartition(".")[2] == named[1] for option in _given(args)) if named else True
    return f"{_where(meant[0], None, args) if len(meant) == 1 and not given else ''}{cause}"


def _unknown(name: str, class_path: str | None, args: Sequence[str], options: Iterable[str]) -> str:
    """The sentence of an option that there is not."""
    if class_path is None:
        name, near = _nearest(name, set(options))
    else:
        classes = getattr(locate(class_path), "__mro__", (object,))[:-1]
        known = {name for c in classes if "__init__" in vars(c) for name in inspect.signature(c.__init__).parameters}
        owner, _, last = name.rpartition(".")
        near = [f"{owner}.{match}" for match in get_close_matches(last, known - {"self", "args", "kwargs"}, 1, 0.5)]
    of = f" of {class_path}" if class_path else ""
    hint = f"; the nearest is `{near[0]}`" if near else ""
    return f"{_where(name, class_path, args)}`{name}` is no option{of}{hint}."


def _nearest(name: str, options: set[str]) -> tuple[str, list[str]]:
    """The first part of a dotted name that is unknown, and the nearest of the names that there are instead."""
    parts = name.split(".")
    known = {".".join(option.split(".")[:depth]) for option in options for depth in range(1, option.count(".") + 2)}
    depth = next((d for d in range(1, len(parts) + 1) if ".".join(parts[:d]) not in known), len(parts))
    unknown = ".".join(parts[:depth])
    return unknown, get_close_matches(unknown, [k for k in known if k.count(".") == depth - 1], 1)


def _place(message: str, cause: str) -> tuple[list[str], str | None, bool]:
    """The keys that lead to a cause in a message of the parser, the class, and whether that itself is wrong."""
    end = message.find(cause.splitlines()[0]) if cause else -1
    places: list[tuple[int, re.Match[str]]] = []
    for place in _PLACE.finditer(message, 0, end if end >= 0 else len(message)):
        places = [(indent, p) for indent, p in places if indent < len(place[1])] + [(len(place[1]), place)]
    keys = [place["key"] for _, place in places if place["key"]]
    classes = [place["cls"] for _, place in places if place["cls"]]
    return keys, classes[-1] if classes else None, bool(places and places[-1][1]["cls"])


def _files(args: Sequence[str]) -> list[Path]:
    """The YAML files that the arguments name, the last first, since its values hold."""
    words = [word for arg in args for word in arg.split("=", 1)]
    files = [Path(after) for word, after in pairwise(words) if word in ("--config", "-c")]
    return [file for file in reversed(files) if file.suffix in (".yaml", ".yml") and file.is_file()]


def _syntax_error(args: Sequence[str]) -> str | None:
    """What is wrong with the first file that is no YAML."""
    for file in _files(args):
        try:
            yaml.compose(file.read_text())
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark
            place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
            return f"{file}{place}: {error.problem or error}" + (f", {error.context}" if error.context else "")
    return None


def _given(args: Sequence[str]) -> list[str]:
    """The dotted names of the options of a command line, without ``init_args``."""
    names = [arg.split("=")[0] for arg in args if arg.startswith("--")]
    return [re.sub(r"\.init_args\b|\+$", "", name).lstrip("-") for name in names]


def _where(option: str, class_path: str | None, args: Sequence[str]) -> str:
    """File and line of an option; nothing where it stands on the command line, or nowhere."""
    if not {option, option.removesuffix(".class_path")}.isdisjoint(_given(args)):
        return ""
    for file in _files(args):
        lines = [(line, cls) for path, line, cls in _options(yaml.compose(file.read_text())) if path == option]
        if lines:
            line, _ = min(lines, key=lambda found: found[1] != class_path)
            return f"{file}, line {line}: "
    return ""


def _options(node: Any, path: str = "", cls: str | None = None) -> Iterator[tuple[str, int, str | None]]:
    """The dotted names of the options of a file, without ``init_args``, with their lines and their classes."""
    if isinstance(node, yaml.SequenceNode):
        for entry in node.value:
            yield from _options(entry, path)
    if not isinstance(node, yaml.MappingNode):
        return
    given = {key.value: value for key, value in node.value}
    cls = given["class_path"].value if "class_path" in given else cls
    for key, value in node.value:
        inner = path if key.value in ("init_args", "dict_kwargs") else f"{path}.{key.value}".lstrip(".")
        yield inner, key.start_mark.line + 1, cls
        yield from _options(value, inner, cls)
