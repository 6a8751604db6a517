"""Files that are written as a whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from uuid import uuid4


@contextmanager
def replacing(path: str | PathLike[str]) -> Iterator[Path]:
    """A new file that takes the place of ``path`` when the block ends, and is removed if the block raises.

    A reader, a crash or a full disk leaves the old file or the new one, never a part. Folders are made as
    needed, and a link stays a link to the new content.

    Args:
        path: The file to replace.

    Yields:
        Where to write: a file in the same folder with the same suffix.

    Raises:
        OSError: If the file cannot be written; the error names ``path``.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with replacing(folder / "a.txt") as new:
        ...     _ = new.write_text("whole")
        >>> [file.name for file in folder.iterdir()]
        ['a.txt']
    """
    target = Path(path).resolve()
    new = target.with_name(f".{target.stem}.{uuid4().hex[:8]}{target.suffix}")  # nodes may share the disk
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield new
        with new.open("rb") as file:
            os.fsync(file.fileno())
        new.replace(target)
    except OSError as error:
        new.unlink(missing_ok=True)
        if error.filename in (None, str(new)):  # a full disk names no file
            raise type(error)(error.errno, error.strerror, str(path)) from error
        raise
    except BaseException:
        new.unlink(missing_ok=True)
        raise
