"""How ``compare`` resumes: what stands in the folder of a run decides whether the run is kept, repeated or refused.

* A **finished** run of the same configuration is kept.
* A run that **failed or was cut off** starts over, with the configuration of now.
* A run **in progress** (of a comparison that was killed, or started twice) holds the lock of its folder: it is waited
  for, and then it is finished or starts over.
* A run of **another configuration**, finished or in progress, is refused: the folder is that of another comparison.
  It is looked for before anything starts, again when the run has the lock of its folder, and when results are
  collected. Configurations are compared; changed code is not noticed.
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any

import yaml

from curation.files import replacing
from curation.recipes.cli.yaml_text import dump
from curation.recipes.compare.run import FIT, Run


def prepare(run: Run) -> None:
    """Write the configuration of a run into its folder, unless the run is finished or in progress there.

    Raises:
        ValueError: If the folder holds a run of another configuration that is finished or in progress, or a damaged
            file.
        OSError: If the file cannot be written.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    held = try_lock(run.folder / "lock")
    with held or nullcontext():
        if held is None or run.finished:
            check_same(run)
        _write_configuration(run)


def check_same(run: Run) -> None:
    """Refuse a folder that holds a run of another configuration.

    Raises:
        ValueError: If it does, or if the file is damaged.
    """
    previous = _read_configuration(run)
    if previous is not None and previous != run.config:
        raise ValueError(
            "Argument `--out` must be a new folder, or that of the same comparison with the same budget, but in "
            f"{str(run.folder / FIT)!r} {first_difference(previous, run.config)}."
        )


def _read_configuration(run: Run) -> Any:
    file = run.folder / FIT
    try:
        return yaml.safe_load(file.read_text()) if file.is_file() else None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(
            f"{str(file)!r} is damaged ({error}). Delete its folder; the same command repeats the run."
        ) from error


def _write_configuration(run: Run) -> None:
    if _read_configuration(run) != run.config:
        with replacing(run.folder / FIT) as new:
            new.write_text(dump(run.config))


def unfinished(runs: list[Run]) -> list[Run]:
    """The runs that are left to do."""
    return [run for run in runs if not run.finished]


@contextmanager
def begin(run: Run) -> Iterator[IO[str] | None]:
    """Hold the lock of a run's folder, after waiting for another process that holds it.

    Yields:
        The file of the lock, which a child process may inherit so that the lock lives as long as the child; None if
        the run is finished. What a failed attempt has measured is removed, and the configuration is that of the run.

    Raises:
        ValueError: If another comparison has finished the run in the meantime.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    with lock(run.folder / "lock") as held:
        if run.finished:
            check_same(run)
            yield None
            return
        _write_configuration(run)
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
