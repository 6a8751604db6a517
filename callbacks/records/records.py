"""What a selection leaves behind: the record of every sample, and the audit trail of every choice."""

from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from curation.callbacks.lightning.fit_callback import FitCallback
from curation.callbacks.online.choice import Choice, SelectionListener
from curation.callbacks.online.online_selection import OnlineSelection, logs_now
from curation.records.ledger import LedgerWriter
from curation.records.score_store import ScoreStore


def _entries(owner: Callback, choice: Choice) -> tuple[Tensor, Tensor, Tensor]:
    """Ids int64, scores fp32 and how often each row is trained on int64, ``[B]`` each, on one device."""
    if choice.sample_ids is None:
        raise TypeError(
            f"{type(owner).__name__} needs sample ids: wrap the training data set in `curation.batch.SampleIds`."
        )
    ids = choice.sample_ids
    unscored = torch.full(ids.shape, torch.nan, device=ids.device)
    if choice.scores is None or choice.rows is None:
        return ids, unscored, torch.ones_like(ids)
    scores = choice.scores.detach().float() if choice.has_scores else unscored
    ids = ids.to(scores.device, non_blocking=True)
    kept = torch.zeros_like(ids).index_add_(0, choice.rows, torch.ones_like(choice.rows))
    return ids, scores, kept


def _check(owner: Callback, trainer: Trainer) -> None:
    if not any(isinstance(c, OnlineSelection) for c in trainer.callbacks):  # type: ignore[attr-defined]
        raise ValueError(f"{type(owner).__name__} records an online selection, but the trainer has none.")


class SampleRecord(FitCallback, SelectionListener):
    """Remembers the last score of every sample, and how often it was seen and kept.

    The record is the same on every rank: each step's candidates are gathered in rank order. It is as old as the
    sample's last candidacy (see :class:`~curation.records.score_store.ScoreStore`), is saved with checkpoints, and
    logs ``curation/never_kept_fraction``, and to W&B a closing histogram ``curation/times_kept``. Needs sample ids.

    Args:
        size: Number of samples, more than the largest id; None for the length of the training data set. Checked with
            the first batch.

    Attributes:
        store: The record, once the first batch was trained on.

    Raises:
        TypeError: If the samples have no ids.
        ValueError: If the trainer has no online selection, or ``size`` is not positive, or too small.
    """

    def __init__(self, size: int | None = None) -> None:
        if size is not None and size < 1:
            raise ValueError(f"Argument `size` must be > 0 or None, but got {size!r}.")
        self.size = size
        self.store: ScoreStore | None = None
        self._state: dict[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier fit."""
        self.fitting = stage == "fit"
        if self.fitting:
            _check(self, trainer)
            self.store = self._state = None

    def on_selection(self, trainer: Trainer, pl_module: LightningModule, step: int, choice: Choice) -> None:
        """Enter the candidates of every rank."""
        ids, scores, kept = _entries(self, choice)
        if trainer.world_size > 1:
            # One collective of integers, since a float would round an id; ranks may have fewer rows than the most.
            rows = torch.stack([ids, scores.view(torch.int32).long(), kept])[:, : choice.most]
            rows = torch.nn.functional.pad(rows, (0, choice.most - rows.size(1)), value=-1)
            rows = trainer.strategy.all_gather(rows).transpose(0, 1).flatten(1)
            ids, kept = rows[0], rows[2]
            scores = rows[1].int().view(torch.float32)
        if self.store is None:
            size = self.size or len(trainer.train_dataloader.dataset)  # type: ignore[union-attr]
            if int(ids.max()) >= size:  # of the first batch only: it waits for the device
                raise ValueError(
                    f"Argument `size` must be more than every sample id, but {int(ids.max())} >= {size}."
                )
            self.store = ScoreStore(size, ids.device)
            if self._state is not None:
                self.store.load_state_dict(self._state)
        self.store.update(ids, scores, kept, step)
        if logs_now(trainer):
            never = self.store.kept.eq(0).float().mean()
            pl_module.log("curation/never_kept_fraction", never, on_step=True, on_epoch=False, batch_size=1)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log how often samples were kept."""
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger) and self.store is not None and trainer.is_global_zero:
                import wandb

                times_kept = wandb.Histogram(self.store.kept.tolist())
                logger.log_metrics({"curation/times_kept": times_kept})  # type: ignore[dict-item]

    def state_dict(self) -> dict[str, Any]:
        """The record, the same on every rank."""
        return {"store": self._state if self.store is None else self.store.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict` in a fit."""
        if self.fitting:
            self._state = state_dict["store"]


class SelectionLedger(Callback, SelectionListener):
    """Writes every candidate of every step to Parquet: step, sample id, score, kept, weight.

    Read it with :class:`curation.records.ledger.Ledger` or any Parquet reader. Each rank writes its own files; a
    checkpoint writes what is gathered, so a resumed run leaves the rows of an uninterrupted one. Needs sample ids.

    Args:
        path: Folder of the ledger: a new one, or that of the run that is resumed.

    Raises:
        TypeError: If the samples have no ids.
        ValueError: If the folder holds the ledger of another run, or the trainer has no online selection.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._writer: LedgerWriter | None = None
        self._resumed: dict[str, Any] | None = None
        self._run = ""
        self._steps = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Open the ledger."""
        self._writer = None
        if stage == "fit":
            _check(self, trainer)
            self._writer = LedgerWriter(self.path, trainer.global_rank)
            self._resumed, self._run, self._steps = None, "", 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to write into the ledger of another run; forget what a killed run wrote after its checkpoint."""
        assert self._writer is not None
        mark = Path(self.path) / "run"
        found = mark.read_text() if mark.is_file() else None
        if (found is not None) if self._resumed is None else (found != self._resumed["run"]):
            raise ValueError(
                f"Argument `path` must be a new folder, or that of the run that is resumed, but got {self.path!r}."
            )
        trainer.strategy.barrier()  # every rank has looked
        self._run = found or trainer.strategy.broadcast(uuid4().hex)
        try:
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.write_text(self._run)
        except OSError as error:
            raise ValueError(f"Argument `path` must be a folder that can be written: {error}") from error
        if self._resumed is not None:
            self._writer.truncate(self._resumed["steps"])
            if trainer.is_global_zero:  # ranks that there are no more
                for folder in Path(self.path).glob("rank=*"):
                    rank = int(folder.name.removeprefix("rank="))
                    if rank >= trainer.world_size:
                        LedgerWriter(self.path, rank).truncate(self._resumed["steps"])
        self._writer.begin()

    def on_selection(self, trainer: Trainer, pl_module: LightningModule, step: int, choice: Choice) -> None:
        """Enter the candidates of this rank."""
        ids, scores, kept = _entries(self, choice)
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
        """Close the ledger: nothing is lost."""
        try:
            self.on_train_end(trainer, pl_module)
        except OSError as error:  # not in the place of what went wrong
            rank_zero_warn(f"The ledger could not be closed: {error}")

    def state_dict(self) -> dict[str, Any]:
        """The number of steps, after writing their rows."""
        if self._writer is not None:
            self._writer.flush()
        return {"run": self._run, "steps": self._steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._resumed = state_dict if state_dict["run"] else None  # else nothing was begun: a tuner came first
        self._run, self._steps = state_dict["run"], state_dict["steps"]
