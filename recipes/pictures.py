"""Matplotlib figures as files: the same figure gives the same bytes, and a file is written as a whole."""

import io
from os import PathLike
from pathlib import Path
from typing import Any

from curation.files import replacing


def picture(figure: Any, kind: str) -> bytes:
    """The bytes of a figure, which depend on its content alone: no date, no version, no random ids.

    Args:
        figure: A ``matplotlib.figure.Figure``.
        kind: ``"png"`` or ``"svg"``.
    """
    from matplotlib import rc_context

    file = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "curation"}):
        figure.savefig(file, format=kind, dpi=120, metadata=metadata)
    return file.getvalue()


def save_picture(figure: Any, path: str | PathLike[str]) -> None:
    """Write :func:`picture` of a figure to a file, in the format of the file's suffix.

    Args:
        figure: A ``matplotlib.figure.Figure``.
        path: A ``.png`` or ``.svg`` file; without a suffix, PNG.

    Raises:
        OSError: If the file cannot be written.
    """
    content = picture(figure, Path(path).suffix.lstrip(".").lower() or "png")
    with replacing(path) as new:
        new.write_bytes(content)
