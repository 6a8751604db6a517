"""pyarrow, imported when it is first used: most of what is imported with this package never reads a table."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any


def __getattr__(name: str) -> Any:
    if name.startswith("__"):  # of this module
        raise AttributeError(name)
    pyarrow = import_module("pyarrow")
    if not hasattr(pyarrow, name) and find_spec(f"pyarrow.{name}"):
        import_module(f"pyarrow.{name}")
    return getattr(pyarrow, name)
