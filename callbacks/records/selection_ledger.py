"""The audit trail of a selection: every candidate of every step, in Parquet."""

from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from lightning.pytorch import LightningModule, Trainer

from curation.callbacks.lightning.collectives import agree
from curation.callbacks.lightning.fit_callback import FitCallback
from curation.callbacks.lightning.loggers import not_essential
from curation.callbacks.online.choice import Choice, SelectionListener
from curation.callbacks.records.entries import candidate_entries, check_selection
from curation.checks import check_path
from curation.files import replacing
from curation.records.ledger import LedgerWriter


class SelectionLedger(FitCallback, SelectionListener):
    """Writes every candidate of every step to Parquet: step, sample id, score, kept, weight.

    :class:`curation.records.ledger.Ledger` reads it, and so does any Parquet reader. Each rank writes its own files.
    A checkpoint writes the rows that are in memory, so a resumed run leaves the rows of an uninterrupted run. Needs
    sample ids.

    Args:
        path: Folder of the ledger: a new folder, or that of the run that is resumed.

    Raises:
        TypeError: If the samples have no ids.
        ValueError: If the folder holds the ledger of another run or cannot be written, or the trainer has no online
            selection.

    Example:
        >>> from curation.callbacks import UniformSelection
        >>> ledger = SelectionLedger("runs/ledger")
        >>> callbacks = [UniformSelection(keep=0.5), ledger]  # Trainer(callbacks=callbacks).fit(module, loader)
        >>> ledger.path  # after the fit: curation.records.Ledger("runs/ledger").counts()
        'runs/ledger'
    """

    def __init__(self, path: str | Path) -> None:
        self.path: str = check_path("path", path)
        self._writer: LedgerWriter | None = None
        self._resumed: dict[str, Any] | None = None
        self._run = ""
        self._steps = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Open the ledger."""
        super().setup(trainer, pl_module, stage)
        self._writer = None
        if self.fitting:
            check_selection(self, trainer)
            self._writer = LedgerWriter(self.path, trainer.global_rank)
            self._resumed, self._run, self._steps = None, "", 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse the ledger of another run; drop the rows that a killed run wrote after its checkpoint."""
        run = agree(trainer, self._existing_run)  # no rank writes before all have looked
        self._run = run or trainer.strategy.broadcast(uuid4().hex)
        agree(trainer, self._mark_run)
        assert self._writer is not None
        if self._resumed is not None:
            self._writer.truncate(self._resumed["steps"])
            if trainer.is_global_zero:  # and the files of ranks that this run does not have
                for folder in Path(self.path).glob("rank=*"):
                    rank = int(folder.name.removeprefix("rank="))
                    if rank >= trainer.world_size:
                        LedgerWriter(self.path, rank).truncate(self._resumed["steps"])
        self._writer.begin()

    def _existing_run(self) -> str | None:
        """The name of the run whose ledger is in the folder."""
        mark = Path(self.path) / "run"
        run = mark.read_text() if mark.is_file() else None
        if run != (self._resumed["run"] if self._resumed is not None else None):
            raise ValueError(
                f"Argument `path` must be a new folder, or that of the run that is resumed, but {self.path!r} has "
                "the ledger of another: remove it, or name another folder."
            )
        return run

    def _mark_run(self) -> None:
        try:
            with replacing(Path(self.path) / "run") as mark:
                mark.write_text(self._run)
        except OSError as error:
            raise ValueError(f"Argument `path` must be a folder that can be written: {error}") from error

    def on_selection(self, trainer: Trainer, pl_module: LightningModule, step: int, choice: Choice) -> None:
        """Enter the candidates of this rank."""
        ids, scores, kept = candidate_entries(self, choice)
        weights = kept.float()
        if choice.weights is not None and choice.rows is not None:
            weights = torch.zeros_like(scores).index_add_(0, choice.rows, choice.weights)
        assert self._writer is not None
        self._writer.append(step, ids, scores, kept, weights)
        self._steps = step + 1

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the ledger."""
        if self._writer is not None:
            self._writer.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the ledger: no row is lost."""
        with not_essential("The rest of the ledger"):  # the error that ended the fit is the one to raise
            self.on_train_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The number of steps, after their rows are written."""
        if self._writer is not None:
            self._writer.flush()
        return {"run": self._run, "steps": self._steps}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on with the ledger of the run that was saved."""
        self._resumed = state if state["run"] else None  # no run: a tuner saved the checkpoint before the fit began
        self._run, self._steps = state["run"], state["steps"]
