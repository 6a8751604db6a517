"""How ``compare`` resumes: what stands in the folder of a run decides whether the run is kept, repeated or refused.

* A **finished** run of the same configuration is kept.
* A run that **failed or was cut off** starts over, with the configuration of now.
* A run **in progress** (of a comparison that was killed, or started twice) holds the lock of its folder: it is waited
  for, and then it is finished or starts over.
* A finished run of **another configuration** is refused before anything starts: the folder is that of another
  comparison. Configurations are compared; changed code is not noticed.
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import yaml

from curation.files import replacing
from curation.recipes.compare.run import FIT, Run


def prepare(run: Run) -> None:
    """Write the configuration of a run into its folder, unless the run is finished there.

    Raises:
        ValueError: If the folder holds a finished run of another configuration.
        OSError: If the file cannot be written.
    """
    file = run.folder / FIT
    previous = yaml.safe_load(file.read_text()) if file.is_file() else None
    if previous == run.config:
        return
    if previous is not None and run.finished:
        raise ValueError(
            "Argument `--out` must be a new folder, or that of the same comparison with the same budget, but in "
            f"{str(file)!r} {first_difference(previous, run.config)}."
        )
    with replacing(file) as new:
        new.write_text(yaml.safe_dump(run.config, sort_keys=False))


def unfinished(runs: list[Run]) -> list[Run]:
    """The runs that are left to do."""
    return [run for run in runs if not run.finished]


@contextmanager
def begin(run: Run) -> Iterator[IO[str] | None]:
    """Hold the lock of a run's folder, after waiting for another process that holds it.

    Yields:
        The file of the lock, which a child process may inherit so that the lock lives as long as the child; None if
        the run is finished. What a failed attempt has measured is removed.
    """
    with lock(run.folder / "lock") as held:
        if run.finished:
            yield None
            return
        forget(run)
        yield held


def forget(run: Run) -> None:
    """Remove what a run has measured, so that it starts over."""
    (run.folder / "run.json").unlink(missing_ok=True)


@contextmanager
def lock(file: Path) -> Iterator[IO[str]]:
    """Hold an exclusive lock on a file, after waiting for whoever holds it; yields the open file."""
    with file.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield held


def try_lock(file: Path) -> IO[str] | None:
    """The open file, which holds an exclusive lock until it is closed; None if another process has the lock."""
    held = file.open("w")
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        held.close()
        return None
    return held


def first_difference(there: Any, here: Any) -> str:
    """The first entry in which two configurations differ.

    Args:
        there: The configuration in the folder.
        here: The configuration of now.

    Example:
        >>> first_difference({"model": {"lr": 1}}, {"model": {"lr": 2}})
        'model: lr: 1 there, 2 here'
    """
    if type(there) is type(here) is list and len(there) == len(here):
        there, here = dict(enumerate(there)), dict(enumerate(here))
    if isinstance(there, dict) and isinstance(here, dict):
        for key in [*here, *there]:
            if there.get(key) != here.get(key):
                inner = first_difference(there.get(key), here.get(key))
                return inner if isinstance(key, int) else f"{key}: {inner}"
    return f"{there!r} there, {here!r} here"
