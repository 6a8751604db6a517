"""pyarrow, imported when it is first used: most of what is imported with this package never reads a table."""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    pyarrow = import_module("pyarrow")
    return getattr(pyarrow, name) if hasattr(pyarrow, name) else import_module(f"pyarrow.{name}")
