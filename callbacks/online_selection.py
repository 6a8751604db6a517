"""The base of every online rule: score a candidate batch, keep k of its rows, train on those."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from curation.callbacks.seam import BatchSeam, check_training_step, warn_of_mixing
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from curation.batch import batch_size, take_rows, trim_padding
from curation.online.top import keep_count, top_rows
from curation.scoring import (
    IGNORED,
    Route,
    find_route,
    head_as_identity,
    per_sample_loss,
    per_sample_loss_from_hidden,
    side_effect_free,
)

TABLE_ROWS = 64
IN_PROGRESS_BAR = ("candidate_loss", "samples_trained")


class OnlineSelection(Callback):
    """Trains on ``k = round(keep * B)`` rows of every candidate batch of ``B`` rows.

    A rule overrides :meth:`score`, and :meth:`on_kept` where it remembers what was kept. ``k`` is fixed by the
    first batch of the fit, so that every rank and every micro-batch of an accumulation window weighs the same; a
    batch with fewer rows keeps all. Scores that are not finite rank last. Validation is never curated.

    Args:
        keep: Fraction of each candidate batch that is trained on, in (0, 1]. The effective batch shrinks by it.
        seed: Of everything random in the rule; equal on all ranks.
        trim: Drop the padding columns that no kept row uses, in batches with ``input_ids`` and ``attention_mask``.

    Raises:
        ValueError: If ``keep`` is outside (0, 1].
    """

    has_scores = True

    def __init__(self, keep: float, seed: int = 0, trim: bool = True) -> None:
        if not (isinstance(keep, (int, float)) and 0 < keep <= 1):
            raise ValueError(f"Argument `keep` must be in (0, 1], but got {keep!r}.")
        self.keep = keep
        self.seed = seed
        self.trim = trim
        self.k: int | None = None
        self.batches = 0
        self.samples_scored = 0
        self.samples_trained = 0
        self.train_seconds = 0.0
        self._seam: BatchSeam | None = None
        self._probing = False
        self._told = False
        self._clock = 0.0
        self._stats: dict[str, Tensor | float] = {}
        self._scores: Tensor | None = None
        self._route: Route | None = None
        self._lengths: Tensor | None = None
        self._candidate_loss: Tensor | None = None
        self._table: deque[list[Any]] = deque(maxlen=TABLE_ROWS)

    # ------------------------------------------------------------------ what a rule defines

    def score(self, trainer: Trainer, pl_module: LightningModule, batch: Any, sample_ids: Tensor | None) -> Tensor:
        """Scores of the candidates, ``[B]``, higher is kept; run inside :meth:`scoring` where the module is used."""
        raise NotImplementedError

    def on_kept(self, trainer: Trainer, rows: Tensor, k: int) -> None:
        """Called on every rank after each choice, with the kept rows ``[<= k]``; may hold a collective."""

    def describe(self) -> str:
        """How the scores are taken, for the log line at the start of the fit."""
        return "no scores"

    # ------------------------------------------------------------------ the seam

    def curate(self, trainer: Trainer, pl_module: LightningModule, batch: Any, sample_ids: Tensor | None) -> Any:
        """The rows of a candidate batch to train on."""
        # The tuners run the training loop with other callbacks; what they probe must leave no trace.
        self._probing = self not in trainer.callbacks  # type: ignore[attr-defined]
        size = batch_size(batch)
        k = self._rows_to_keep(trainer, size)
        if self.keep == 1:
            kept = batch
            self._count(trainer, size, 0, size)
        else:
            with trainer.profiler.profile(f"[Callback]{type(self).__name__}.score"):  # type: ignore[attr-defined]
                scores = self.score(trainer, pl_module, batch, sample_ids)
            if scores.shape != (size,):
                raise ValueError(f"`score` must give one number per row, [{size}], but gave {list(scores.shape)}.")
            rows = top_rows(scores, k)
            if not self._probing:
                self.on_kept(trainer, rows, k)
            kept = batch if k >= size else take_rows(batch, rows)
            if self.trim and k < size:
                kept = trim_padding(kept)
            self._count(trainer, size, size if self.has_scores else 0, min(k, size))
            self._record(trainer, scores, rows, sample_ids)
        if not self._told and not self._probing:
            self._told = True
            how = self.describe() if self.keep < 1 else "keeps every row, nothing is scored"
            rank_zero_info(
                f"{type(self).__name__}: {how}; candidate batch {size}, trained batch {min(k, size)} per device and "
                "step. The learning rate is unchanged, so each step averages over fewer samples."
            )
        return kept

    def outputs(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, head: nn.Linear | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits of the candidates with aligned targets, or the input of ``head`` in the place of its logits.

        Also records the length ratio, and on logging steps the loss of all candidates, which an ``EarlyStopping`` or
        a plateau schedule should watch instead of the loss of the kept rows.
        """
        if self._route is None:
            self._route = find_route(pl_module, batch)
        with self.scoring(trainer, pl_module), head_as_identity(head):
            outputs, targets = self._route.forward(batch)
        if len(outputs) != batch_size(batch):
            raise ValueError(f"The scored outputs have {len(outputs)} rows for a batch of {batch_size(batch)}.")
        self._lengths = targets.ne(IGNORED).sum(1).float() if targets.dim() == 2 else None
        if _logs_now(trainer):
            with torch.no_grad():
                loss = (
                    per_sample_loss(outputs, targets)
                    if head is None
                    else per_sample_loss_from_hidden(outputs, targets, head)
                )
            self._candidate_loss = loss.nanmean()
        return outputs, targets

    @contextmanager
    def scoring(self, trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
        """Run the module without side effects, in the precision of the fit; ``self.log`` in it is ignored."""
        with side_effect_free(pl_module), trainer.precision_plugin.forward_context():
            pl_module.log = pl_module.log_dict = lambda *_, **__: None  # type: ignore[method-assign,assignment]
            try:
                yield
            finally:
                del pl_module.log, pl_module.log_dict

    def _rows_to_keep(self, trainer: Trainer, size: int) -> int:
        if self._probing:
            return keep_count(self.keep, size)
        if self.k is None:
            k = torch.tensor(keep_count(self.keep, size), device=trainer.strategy.root_device)
            self.k = int(trainer.strategy.reduce(k.float(), reduce_op="max")) if trainer.world_size > 1 else int(k)
        return self.k

    def _count(self, trainer: Trainer, candidates: int, scored: int, trained: int) -> None:
        if self._probing:
            return
        self.batches += 1
        self.samples_scored += scored * trainer.world_size
        self.samples_trained += trained * trainer.world_size
        self._stats = {"kept_fraction": trained / candidates}
        self._scores = None

    def _record(self, trainer: Trainer, scores: Tensor, rows: Tensor, sample_ids: Tensor | None) -> None:
        if self._probing or not self.has_scores:
            return
        scores = scores.detach()
        self._scores = scores
        self._stats["score_gap"] = scores[rows].mean() - scores.mean()
        if self._lengths is not None:
            self._stats["kept_length_ratio"] = self._lengths[rows].mean() / self._lengths.mean()
        if self._candidate_loss is not None:
            self._stats["candidate_loss"] = self._candidate_loss
            self._candidate_loss = None
        if _logs_now(trainer) and trainer.is_global_zero and trainer.loggers:
            kept = torch.zeros_like(scores, dtype=torch.bool)
            kept[rows] = True
            ids = [-1] * len(scores) if sample_ids is None else sample_ids.tolist()
            for one in zip(ids, scores.tolist(), kept.tolist(), strict=True):
                self._table.append([trainer.global_step, *one])

    # ------------------------------------------------------------------ Lightning's hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Install the seam, after refusing what cannot work."""
        if stage == "fit":
            self._check(trainer, pl_module)
            self._told = False
            self._route = self.k = None
            self._table.clear()
        self._seam = BatchSeam.attach(trainer, self)

    def _check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_training_step(pl_module)
        rules = [c for c in trainer.callbacks if isinstance(c, OnlineSelection)]  # type: ignore[attr-defined]
        if len(rules) > 1:
            names = " and ".join(type(rule).__name__ for rule in rules)
            raise ValueError(f"Only one online selection can choose the rows of a batch, but got {names}.")
        if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy)):
            raise TypeError(f"{type(self).__name__} does not support {type(trainer.strategy).__name__} yet.")
        warn_of_mixing(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the seam."""
        self._detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save the table and remove the seam: Lightning calls neither ``on_fit_end`` nor ``teardown`` then."""
        self._log_table(trainer)
        self._detach()

    def _detach(self) -> None:
        if self._seam is not None:
            self._seam.detach(self)
            self._seam = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Check that the batch to train on is the one that was selected."""
        if self._seam is not None and self._seam.clients[0] is self:
            self._seam.check(batch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the statistics of the selection."""
        now = time.perf_counter()
        self.train_seconds += now - self._clock
        self._clock = now
        stats = {
            **self._stats,
            "samples_scored": float(self.samples_scored),
            "samples_trained": float(self.samples_trained),
            "train_seconds": self.train_seconds,
        }
        if _logs_now(trainer):
            for name, value in stats.items():
                in_bar = name in IN_PROGRESS_BAR
                pl_module.log(f"curation/{name}", value, prog_bar=in_bar, on_step=True, on_epoch=False, batch_size=1)
            if self._scores is not None:
                self._log_histogram(trainer, self._scores)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._clock = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock again: evaluation is not training time."""
        self._clock = time.perf_counter()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log a table of candidates with their scores and whether they were kept."""
        self._log_table(trainer)

    def _log_table(self, trainer: Trainer) -> None:
        columns = ["step", "sample_id", "score", "kept"]
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger) and self._table:
                logger.log_table("curation/samples", columns=columns, data=list(self._table))

    @staticmethod
    def _log_histogram(trainer: Trainer, scores: Tensor) -> None:
        if not trainer.is_global_zero:
            return
        values = scores[scores.isfinite()].float().cpu()
        if len(values) < len(scores):
            rank_zero_warn(f"{len(scores) - len(values)} of {len(scores)} scores are not finite; they rank last.")
        for logger in trainer.loggers if len(values) else []:
            if isinstance(logger, WandbLogger):
                import wandb

                logger.log_metrics({"curation/scores": wandb.Histogram(values.tolist())}, step=trainer.global_step)  # type: ignore[dict-item]
            elif isinstance(logger, TensorBoardLogger):
                logger.experiment.add_histogram("curation/scores", values, trainer.global_step)

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Counters of the selection; holds no collective, since not every rank may be saving."""
        return {
            "k": self.k,
            "batches": self.batches,
            "samples_scored": self.samples_scored,
            "samples_trained": self.samples_trained,
            "train_seconds": self.train_seconds,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.k = state_dict["k"]
        self.batches = state_dict["batches"]
        self.samples_scored = state_dict["samples_scored"]
        self.samples_trained = state_dict["samples_trained"]
        self.train_seconds = state_dict["train_seconds"]


def _logs_now(trainer: Trainer) -> bool:
    """Whether Lightning writes the metrics of the current batch to its loggers."""
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]
    step = trainer.fit_loop.epoch_loop._batches_that_stepped
    return bool(every) and (step + 1) % every == 0
