"""Checks of arguments: every error names the argument and the value that it got."""

import math
import re
from collections.abc import Sequence
from numbers import Integral, Real
from os import PathLike
from typing import Any


def check_number(name: str, value: Any, interval: str, optional: bool = False) -> Any:
    """Refuse what is not a real number in an interval.

    Args:
        name: Name of the argument.
        value: The argument. Real numbers of Python and NumPy are accepted; booleans are not.
        interval: The interval as it is written, such as ``"(0, 1]"`` or ``"[0, inf)"``.
        optional: Accept None, too.

    Returns:
        The value as a ``float``, or None.

    Raises:
        ValueError: If the value is something else.

    Example:
        >>> check_number("keep", 1, "(0, 1]")
        1.0
        >>> check_number("keep", 0, "(0, 1]")
        Traceback (most recent call last):
        ValueError: Argument `keep` must be in (0, 1], but got 0.
    """
    if value is None and optional:
        return None
    low, high = (float(end) for end in interval[1:-1].split(","))
    try:
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:  # an integer beyond the largest float
        number = math.nan
    above = low <= number if interval[0] == "[" else low < number
    below = number <= high if interval[-1] == "]" else number < high
    if not (above and below):
        raise ValueError(f"Argument `{name}` must be in {interval}{' or None' * optional}, but got {value!r}.")
    return number


def check_integer(name: str, value: Any, least: int, below: int | None = None, optional: bool = False) -> Any:
    """Refuse what is not an integer in ``[least, below)``.

    Args:
        name: Name of the argument.
        value: The argument. Integers of Python and NumPy are accepted; booleans and floats are not.
        least: The smallest value.
        below: The end of the range, exclusive; None for no end.
        optional: Accept None, too.

    Returns:
        The value as an ``int``, or None.

    Raises:
        ValueError: If the value is something else.

    Example:
        >>> check_integer("k", 2.0, 1)
        Traceback (most recent call last):
        ValueError: Argument `k` must be an integer >= 1, but got 2.0.
    """
    if value is None and optional:
        return None
    inside = isinstance(value, Integral) and not isinstance(value, bool)
    if not (inside and least <= value and (below is None or value < below)):
        shown = "2^63" if below == 2**63 else below
        span = f">= {least}" if below is None else f"in [{least}, {shown})"
        raise ValueError(f"Argument `{name}` must be an integer {span}{' or None' * optional}, but got {value!r}.")
    return int(value)


def check_bytes(name: str, value: Any, optional: bool = False) -> Any:
    """Refuse what is not a number of bytes: an integer >= 1, or a text such as ``"4GB"`` or ``"1.5 GiB"``.

    Returns:
        The bytes as an ``int``, or None.

    Raises:
        ValueError: If the value is something else.

    Example:
        >>> check_bytes("memory", "4GB"), check_bytes("memory", "0.5GiB"), check_bytes("memory", 1000)
        (4000000000, 536870912, 1000)
        >>> check_bytes("memory", "4 gigs")
        Traceback (most recent call last):
        ValueError: Argument `memory` must be bytes, such as '4GB', but got '4 gigs'.
    """
    if value is None and optional:
        return None
    if not isinstance(value, str):
        return check_integer(name, value, 1)
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kMGT]?)(i?)B?", value.strip())
    if found is None or float(found[1]) == 0:
        raise ValueError(f"Argument `{name}` must be bytes, such as '4GB', but got {value!r}.")
    power = " kMGT".index(found[2] or " ")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


def check_seed(seed: Any) -> int:
    """Refuse what is not an integer in ``[0, 2^63)``."""
    return check_integer("seed", seed, 0, 2**63)


def check_flag(name: str, value: Any) -> bool:
    """Refuse what is not a boolean.

    Raises:
        ValueError: If the value is something else.
    """
    if not isinstance(value, bool):
        raise ValueError(f"Argument `{name}` must be True or False, but got {value!r}.")
    return value


def check_text(name: str, value: Any, optional: bool = False) -> Any:
    """Refuse what is not a string, or None where that is allowed.

    Raises:
        ValueError: If the value is something else.
    """
    if not (isinstance(value, str) or (value is None and optional)):
        raise ValueError(f"Argument `{name}` must be a string{' or None' * optional}, but got {value!r}.")
    return value


def check_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """Refuse what is not one of the choices.

    Raises:
        ValueError: If the value is something else.

    Example:
        >>> check_choice("when", "never", ("always", "pays"))
        Traceback (most recent call last):
        ValueError: Argument `when` must be 'always' or 'pays', but got 'never'.
    """
    if not isinstance(value, str) or value not in choices:
        listed = " or ".join(filter(None, (", ".join(map(repr, choices[:-1])), repr(choices[-1]))))
        raise ValueError(f"Argument `{name}` must be {listed}, but got {value!r}.")
    return value


def is_url(path: str | PathLike[str]) -> bool:
    """Whether a path is a URL such as ``s3://bucket/run``, which ``pathlib`` takes for a folder named ``s3:``.

    Example:
        >>> is_url("s3://bucket/run"), is_url("runs/s3"), is_url("C:/runs")
        (True, False, False)
    """
    return re.match(r"\w{2,}:/", str(path)) is not None


def check_path(name: str, value: Any, optional: bool = False) -> Any:
    """Refuse what is not the path of a file or a folder: a string, a ``pathlib.Path``, or None where that is allowed.

    Returns:
        The path as a string, or None.

    Raises:
        ValueError: If the value is something else, or a URL: files are written and read on this machine only.

    Example:
        >>> check_path("path", 3)
        Traceback (most recent call last):
        ValueError: Argument `path` must be a string, but got 3.
    """
    if isinstance(value, (str, PathLike)) and is_url(value):
        raise ValueError(f"Argument `{name}` must be a path on this machine, but got the URL {str(value)!r}.")
    return check_text(name, str(value) if isinstance(value, PathLike) else value, optional)
