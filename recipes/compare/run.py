"""One run of a comparison: a fit in a folder of its own, and what it has written there."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FIT = "fit.yaml"  # Lightning's own record of the configuration is config.yaml
KILLED, ENDED = "killed by signal", "ended with status"  # last line of the log of a run that did not finish


@dataclass
class Run:
    """One fit, in a folder of its own.

    Args:
        arm: Name of the arm.
        seed: Seed of the run.
        folder: Folder of the run: ``fit.yaml``, ``run.json``, ``log.txt``, ``metrics.csv`` and the W&B run.
        config: Configuration for ``curation fit``; the last callback is the run's ``RunMeter``.
        seconds: Expected duration, for the progress bar.
    """

    arm: str
    seed: int
    folder: Path
    config: dict[str, Any]
    seconds: float = 1.0

    @property
    def result(self) -> dict[str, Any]:
        """What the run's meter has written so far: ``run.json``.

        Raises:
            ValueError: If the file is damaged.
        """
        file = self.folder / "run.json"
        if not file.is_file():
            return {"points": [], "finished": False}
        try:
            result = json.loads(file.read_text())
            if not isinstance(result["points"], list) or not isinstance(result["finished"], bool):
                raise TypeError("not what a run writes")
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(
                f"{str(file)!r} is damaged ({error}). Delete it; the same command repeats the run."
            ) from error
        return result

    def prepare(self) -> None:
        """Make the folder ready to run in: see :func:`~curation.recipes.compare.resume.prepare`."""
        from curation.recipes.compare.resume import prepare

        prepare(self)

    def execute(self, cwd: str, threads: int | None) -> None:
        """Run in a process, unless finished: see :func:`~curation.recipes.compare.processes.fit`."""
        from curation.recipes.compare.processes import fit

        fit(self, cwd, threads)

    @property
    def finished(self) -> bool:
        """Whether the fit came to its end."""
        return self.result["finished"]

    @property
    def counts_epochs(self) -> bool:
        """Whether the trainer ends the run, after a number of epochs, and not the run's meter."""
        return {"max_steps", "max_seconds"}.isdisjoint(self.config["trainer"]["callbacks"][-1]["init_args"])

    @property
    def spent(self) -> float:
        """Share of its budget that was spent at the last validation; 1 for all of it."""
        meter, points = self.config["trainer"]["callbacks"][-1]["init_args"], self.result["points"]
        if not points:
            return 0.0
        if "max_seconds" in meter:
            return points[-1]["seconds"] / meter["max_seconds"]
        if self.counts_epochs:
            return float(self.finished)
        return points[-1]["step"] / meter["max_steps"]

    @property
    def failure(self) -> str:
        """Why the run did not finish: the exception in its log, or how its process ended."""
        file = self.folder / "log.txt"
        text = file.read_text(errors="replace") if file.is_file() else ""
        lines = [line for line in text.splitlines() if line.strip()]
        if not lines:
            return "it was not run"
        if lines[-1].startswith(KILLED):
            return lines[-1]
        for i in reversed(range(len(lines))):
            if lines[i].startswith("Traceback "):
                return next((line for line in lines[i + 1 :] if not line.startswith(" ")), lines[-1])
            if lines[i].startswith("curation: "):
                return " ".join(line.strip() for line in lines[i:-1])
        return f"{lines[-1]}, without an error message"
