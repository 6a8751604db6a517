"""Files that are written as a whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from uuid import uuid4

from curation.checks import check_path


@contextmanager
def replacing(path: str | PathLike[str]) -> Iterator[Path]:
    """Write a new file that replaces ``path`` when the block ends, and is removed if the block raises.

    After a crash or on a full disk ``path`` is the old file or the new one, never a part. A killed process may leave
    the new file, whose name begins with a dot. Folders are made as needed. If ``path`` is a link, the file that it
    points to is replaced.

    Args:
        path: The file to replace.

    Yields:
        Path of the new file, in the same folder and with the same suffix.

    Raises:
        OSError: If the file cannot be written; the error names ``path``.
        ValueError: If ``path`` is a URL.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with replacing(folder / "a.txt") as new:
        ...     _ = new.write_text("whole")
        >>> [file.name for file in folder.iterdir()]
        ['a.txt']
    """
    target = Path(check_path("path", path)).resolve()
    new = target.with_name(f".{target.stem}.{uuid4().hex[:8]}{target.suffix}")  # nodes may share the disk
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield new
        with new.open("rb+") as file:
            os.fsync(file.fileno())
        new.replace(target)
    except OSError as error:
        new.unlink(missing_ok=True)
        if error.filename not in (None, str(new)):  # another file, which the block reads
            raise
        if error.errno is None:
            raise OSError(f"{error}: {str(path)!r}") from error
        raise OSError(error.errno, error.strerror, str(path)) from error
    except BaseException:
        new.unlink(missing_ok=True)
        raise
