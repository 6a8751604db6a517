"""The base of every online rule: score a candidate batch, keep k of its rows, train on those."""

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Real
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from curation.batch import batch_size, take_rows, trim_padding
from curation.callbacks.lightning.seam import (
    BatchSeam,
    SeamClient,
    check_one_loader,
    check_training_step,
    refuse_strategies,
    warn_of_mixing,
)
from curation.callbacks.online.choice import Choice, SelectionListener
from curation.online.break_even import BreakEven
from curation.online.top import keep_count, top_rows
from curation.replace import replace_attribute
from curation.scoring import (
    IGNORED,
    Route,
    find_route,
    head_as_identity,
    per_sample_from_hidden,
    per_sample_loss,
    side_effect_free,
)

TABLE_ROWS = 64
IN_PROGRESS_BAR = ("candidate_loss", "samples_trained")
PER_PROCESS = ("samples_scored", "samples_trained")


class OnlineSelection(SeamClient, ABC):
    """Trains on ``k = round(keep * B)`` rows of every candidate batch of ``B`` rows.

    A rule overrides :meth:`score`, :meth:`choose` where it does not keep the highest scores, and :meth:`on_kept`
    where it remembers what was seen or kept. ``k`` is fixed by the first batch of the fit, so that every rank and
    every micro-batch of an accumulation window weighs the same; a batch with fewer rows keeps all. Scores that are
    not finite rank last. Validation is never curated.

    Args:
        keep: Fraction of each candidate batch that is trained on, in (0, 1]. The effective batch shrinks by it.
        when: ``"pays"`` selects only where a step that does takes less time than one that trains on every candidate,
            measured on the first steps and every 500, so two runs need not be equal; ``"always"`` measures nothing.
        seed: Of everything random in the rule; equal on all ranks.
        trim: Drop the padding columns that no kept row uses, in batches with ``input_ids`` and ``attention_mask``.

    Raises:
        ValueError: If ``keep`` is outside (0, 1], ``when`` is something else, or ``seed`` is no integer in [0, 2^63).
    """

    has_scores = True

    def __init__(
        self, keep: float, when: Literal["always", "pays"] = "always", seed: int = 0, trim: bool = True
    ) -> None:
        if not (is_number(keep) and 0 < keep <= 1):
            raise ValueError(f"Argument `keep` must be in (0, 1], but got {keep!r}.")
        if not (hasattr(seed, "__index__") and 0 <= seed < 2**63):
            raise ValueError(f"Argument `seed` must be an integer in [0, 2^63), but got {seed!r}.")
        if when not in ("always", "pays"):
            raise ValueError(f"Argument `when` must be 'always' or 'pays', but got {when!r}.")
        self.keep = float(keep)
        self.when = when
        self.seed = int(seed)
        self.trim = trim
        self._reset()

    def _reset(self) -> None:
        self.candidates: int | None = None
        self.k: int | None = None
        self.batches = 0
        self.samples_scored = 0
        self.samples_trained = 0
        self.train_seconds = 0.0
        self._k_is_for: list[Any] = []
        self._probing = False
        self._told = self._warned = False
        self._clock = 0.0
        self._break_even = BreakEven() if self.when == "pays" and self.keep < 1 else None
        self._step_began = 0.0
        self._choice: Choice | None = None
        self._lengths: Tensor | None = None
        self._candidate_loss: Tensor | None = None
        self._not_finite: Tensor | None = None
        self._route: Route | None = None
        self._route_name = f"{type(self).__name__}.score"
        self._table: deque[list[Any]] = deque(maxlen=TABLE_ROWS)

    # ------------------------------------------------------------------ what a rule defines

    @abstractmethod
    def score(self, trainer: Trainer, pl_module: LightningModule, batch: Any, sample_ids: Tensor | None) -> Tensor:
        """Scores of the candidates: floating ``[B]``, the highest are kept.

        Take what the module says of the batch from :meth:`outputs`; call the module in another way only inside
        :meth:`scoring`, or its buffers and random streams change.

        Args:
            trainer: The trainer.
            pl_module: The module that is trained.
            batch: The candidate batch, on the device.
            sample_ids: int64 ``[B]``, where the data set is wrapped in ``SampleIds``.
        """

    def choose(self, trainer: Trainer, scores: Tensor, k: int) -> tuple[Tensor, Tensor | None]:
        """The rows to train on: int64 ``[min(k, B)]``, ascending, and where they do not weigh the same their weights.

        Args:
            trainer: The trainer.
            scores: What :meth:`score` gave, ``[B]``.
            k: Rows to keep.
        """
        return top_rows(scores, k), None

    def on_kept(self, trainer: Trainer, rows: Tensor, k: int) -> None:
        """Called on every rank once the kept rows ``[<= k]`` are trained on; may hold a collective."""

    def describe(self) -> str:
        """How the scores are taken, for the log line at the start of the fit."""
        if not self.has_scores:
            return "no scores"
        return f"scores by {self._route_name}"

    # ------------------------------------------------------------------ the seam

    def curate(self, trainer: Trainer, pl_module: LightningModule, batch: Any, sample_ids: Tensor | None) -> Any:
        """The rows of a candidate batch to train on."""
        # The tuners run the training loop with other callbacks; what they probe must leave no trace.
        self._probing = self not in trainer.callbacks  # type: ignore[attr-defined]
        size = batch_size(batch)
        k = self._rows_to_keep(trainer, size)
        choice = Choice(size, self.candidates or size, k, has_scores=self.has_scores, sample_ids=sample_ids)
        kept = batch
        if self._break_even is not None and (self._probing or not self._break_even.selects):
            choice.k = size  # the batch-size finder has to see the larger of both steps
        elif self.keep < 1:
            with trainer.profiler.profile(f"[Callback]{type(self).__name__}.score"):  # type: ignore[attr-defined]
                scores = self.score(trainer, pl_module, batch, sample_ids)
            if not (isinstance(scores, Tensor) and scores.is_floating_point() and scores.shape == (size,)):
                found = (
                    f"{scores.dtype} {list(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
                )
                raise ValueError(f"`score` must give one floating number per row, [{size}], but gave {found}.")
            choice.scores = scores.detach()
            choice.rows, choice.weights = self.choose(trainer, choice.scores, choice.k)
            choice.lengths, self._lengths = self._lengths, None
            choice.candidate_loss, self._candidate_loss = self._candidate_loss, None
            if choice.k < size:
                kept = take_rows(batch, choice.rows)
                kept = trim_padding(kept) if self.trim else kept
        self._tell(choice)
        self._choice = None if self._probing else choice
        return kept

    def _rows_to_keep(self, trainer: Trainer, size: int) -> int:
        if self._probing:
            return keep_count(self.keep, size)
        # A checkpoint may be resumed with another `keep` or batch size.
        is_for = [self.keep, getattr(trainer.train_dataloader, "batch_size", None)]
        if self.k is None or self._k_is_for != is_for:
            most = torch.tensor(float(size), device=trainer.strategy.root_device)
            self.candidates = int(trainer.strategy.reduce(most, reduce_op="max"))
            self.k = keep_count(self.keep, self.candidates)
            self._k_is_for = is_for
        return self.k

    def _tell(self, choice: Choice) -> None:
        if self._told or self._probing:
            return
        self._told = True
        how = self.describe() if self.keep < 1 else "keeps every row, nothing is scored"
        trained = min(choice.k, choice.size)
        fewer = " The learning rate is unchanged, so each step averages over fewer samples."
        sizes = f"candidate batch {choice.size}, trained batch {trained} per device and step."
        rank_zero_info(f"{type(self).__name__}: {how}; {sizes}{fewer if trained < choice.size else ''}")
        if trained == choice.size and self.keep < 1:
            rank_zero_warn(
                f"`keep={self.keep}` of a candidate batch of {choice.size} is every row: enlarge the batch to select."
            )

    def outputs(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, head: nn.Linear | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits of the candidates with aligned targets, or the input of ``head`` in the place of its logits.

        Also records the length ratio, and on logging steps the loss of all candidates.

        Returns:
            ``[B, T, V]`` with int64 ``[B, T]``, or ``[B, C]`` with ``[B]``; target -100 is not scored.

        Raises:
            TypeError: If the module gives no per-sample outputs; the message names the method to add.
        """
        if self._route is None:
            self._route = find_route(pl_module, batch)
            self._route_name = self._route.name
        with self.scoring(trainer, pl_module):
            with head_as_identity(head):
                outputs, targets = self._route(batch)
            if logs_now(trainer):
                loss = (
                    per_sample_loss(outputs, targets)
                    if head is None
                    else per_sample_from_hidden(per_sample_loss, outputs, targets, head)
                )
                self._candidate_loss = loss.nanmean()
        if len(outputs) != batch_size(batch):
            raise ValueError(f"The scored outputs have {len(outputs)} rows for a batch of {batch_size(batch)}.")
        self._lengths = targets.ne(IGNORED).sum(1).float() if targets.dim() == 2 else None
        return outputs, targets

    @contextmanager
    def scoring(self, trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
        """Run the module without side effects, in the precision of the fit; ``self.log`` in it is ignored."""
        undo = [replace_attribute(pl_module, name, lambda *_, **__: None) for name in ("log", "log_dict")]
        try:
            with side_effect_free(pl_module), trainer.precision_plugin.forward_context():
                yield
        finally:
            for one in undo:
                one()

    # ------------------------------------------------------------------ Lightning's hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Install the seam, after refusing what cannot work; an earlier fit is forgotten."""
        self.fitting = stage == "fit"
        if self.fitting:
            self._check(trainer, pl_module)
            self._reset()
        BatchSeam.attach(trainer, self)

    def _check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_training_step(pl_module)
        rules = [c for c in trainer.callbacks if isinstance(c, OnlineSelection)]  # type: ignore[attr-defined]
        if len(rules) > 1:
            names = " and ".join(type(rule).__name__ for rule in rules)
            raise ValueError(f"Only one online selection can choose the rows of a batch, but got {names}.")
        refuse_strategies(trainer, self, FSDPStrategy)
        warn_of_mixing(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the seam."""
        super().teardown(trainer, pl_module, stage)
        self._route = None  # it holds the module

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the seam and save the table: Lightning calls neither ``teardown`` nor ``on_fit_end`` then."""
        self.teardown(trainer, pl_module, "")
        self._log_table(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Check that the batch to train on is the one that was selected."""
        BatchSeam.check(trainer, batch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count and remember what was trained on; log the statistics of the selection."""
        now = time.perf_counter()
        self.train_seconds += now - self._clock
        self._clock = now
        choice, self._choice = self._choice, None
        if choice is None:
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, SelectionListener):
                callback.on_selection(trainer, pl_module, self.batches, choice)
        self.batches += 1
        self.samples_trained += min(choice.k, choice.size)
        if choice.rows is not None and choice.scores is not None:
            self.samples_scored += choice.size if self.has_scores else 0
            self.on_kept(trainer, choice.rows, choice.k)
            broken = (~choice.scores.isfinite()).sum()
            self._not_finite = broken if self._not_finite is None else self._not_finite + broken
        if logs_now(trainer):
            for name, value in self._statistics(choice).items():
                pl_module.log(
                    f"curation/{name}",
                    value,
                    prog_bar=name in IN_PROGRESS_BAR,
                    on_step=True,
                    on_epoch=False,
                    batch_size=1,
                    sync_dist=name in (*PER_PROCESS, "candidate_loss"),
                    reduce_fx="sum" if name in PER_PROCESS else "mean",
                )
            self._warn_of_broken_scores()
            if self.has_scores and choice.scores is not None and trainer.is_global_zero:
                self._log_scores(trainer, choice)
        self._compare(trainer, pl_module)

    def _compare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Enter the time of an optimizer step, whose micro-batches are all selected or all full."""
        if self._break_even is None or trainer.fit_loop._should_accumulate():
            return
        if self._break_even.compares:
            wait_for(pl_module.device)
        now = time.perf_counter()
        seconds, self._step_began = now - self._step_began, now
        if self._break_even.add(seconds):
            speedup = float(trainer.strategy.broadcast(self._break_even.predicted_speedup))  # type: ignore[arg-type]
            self._break_even.predicted_speedup = speedup
            decided = "selecting" if self._break_even.selects else "training on every candidate until it pays"
            rank_zero_info(f"{type(self).__name__}: a step that selects is {speedup:.2f} times as fast; {decided}.")

    def _statistics(self, choice: Choice) -> dict[str, Tensor | float]:
        stats: dict[str, Tensor | float] = {
            "kept_fraction": min(choice.k, choice.size) / choice.size,
            "samples_scored": float(self.samples_scored),
            "samples_trained": float(self.samples_trained),
            "train_seconds": self.train_seconds,
        }
        for name in ("predicted_speedup", "realised_speedup"):
            speedup = getattr(self._break_even, name, None)
            if speedup is not None:
                stats[name] = speedup
        if self.has_scores and choice.scores is not None and choice.rows is not None:
            scores = choice.scores.masked_fill(~choice.scores.isfinite(), torch.nan)
            stats["score_gap"] = scores[choice.rows].nanmean() - scores.nanmean()
            if choice.lengths is not None:
                stats["kept_length_ratio"] = choice.lengths[choice.rows].mean() / choice.lengths.mean()
            if choice.candidate_loss is not None:
                stats["candidate_loss"] = choice.candidate_loss
        return stats

    def _log_scores(self, trainer: Trainer, choice: Choice) -> None:
        """A histogram of the scores, and rows for the closing table."""
        loggers = [logger for logger in trainer.loggers if isinstance(logger, (WandbLogger, TensorBoardLogger))]
        if not loggers or trainer.fit_loop._should_accumulate():
            return
        assert choice.scores is not None
        assert choice.rows is not None
        scores = choice.scores.tolist()
        kept = set(choice.rows.tolist())
        ids = [-1] * len(scores) if choice.sample_ids is None else choice.sample_ids.tolist()
        step = trainer.fit_loop.epoch_loop._batches_that_stepped  # the axis of every other metric
        for row, (sample_id, score) in enumerate(zip(ids, scores, strict=True)):
            self._table.append([step, sample_id, score, row in kept])
        values = [s for s in scores if abs(s) < float("inf")]
        for logger in loggers if values else []:
            if isinstance(logger, WandbLogger):
                import wandb

                logger.log_metrics({"curation/scores": wandb.Histogram(values)}, step=step)  # type: ignore[dict-item]
            else:
                logger.experiment.add_histogram("curation/scores", torch.tensor(values), step)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse several data loaders; start the clocks."""
        check_one_loader(trainer, self)
        self._clock = self._step_began = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clocks again: evaluation is not training time."""
        self._clock = self._step_began = time.perf_counter()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log a table of candidates with their scores and whether they were kept."""
        self._warn_of_broken_scores()
        self._log_table(trainer)

    def _warn_of_broken_scores(self) -> None:
        if self._not_finite is not None and not self._warned and int(self._not_finite):
            self._warned = True
            broken = f"{int(self._not_finite)} of {self.samples_scored} scores"
            rank_zero_warn(f"{broken} so far are not finite; such rows are kept last.")

    def _log_table(self, trainer: Trainer) -> None:
        columns = ["step", "sample_id", "score", "kept"]
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger) and self._table:
                logger.log_table("curation/samples", columns=columns, data=list(self._table))

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Counters of the selection; holds no collective, since not every rank may be saving."""
        return {
            "candidates": self.candidates,
            "k": self.k,
            "k_is_for": self._k_is_for,
            "batches": self.batches,
            "samples_scored": self.samples_scored,
            "samples_trained": self.samples_trained,
            "train_seconds": self.train_seconds,
            "break_even": None if self._break_even is None else self._break_even.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict` in a fit; an evaluation of a checkpoint changes nothing."""
        if self.fitting:
            self.restore(state_dict)

    def restore(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; a rule with state of its own extends both."""
        self.candidates = state["candidates"]
        self.k = state["k"]
        self._k_is_for = state["k_is_for"]
        self.batches = state["batches"]
        self.samples_scored = state["samples_scored"]
        self.samples_trained = state["samples_trained"]
        self.train_seconds = state["train_seconds"]
        if self._break_even is not None and state["break_even"] is not None and state["k_is_for"][:1] == [self.keep]:
            self._break_even.load_state_dict(state["break_even"])


def is_number(value: Any) -> bool:
    """Whether an argument is a real number, of Python or NumPy."""
    return isinstance(value, Real)


def wait_for(device: torch.device) -> None:
    """Wait until an accelerator has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def logs_now(trainer: Trainer) -> bool:
    """Whether Lightning writes the metrics of the current batch to its loggers."""
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]
    step = trainer.fit_loop.epoch_loop._batches_that_stepped
    return bool(every) and (step + 1) % every == 0
