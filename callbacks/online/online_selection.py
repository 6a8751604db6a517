"""The base of every online rule: score a candidate batch, keep k of its rows, train on those."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from curation.batch import (
    Columns,
    batch_size,
    copied,
    is_masked_text,
    leaves,
    refuse_samples,
    take_rows,
    trim_padding,
)
from curation.callbacks.lightning.collectives import Totals
from curation.callbacks.lightning.loop import curated_loader, curated_name, muted
from curation.callbacks.lightning.seam import (
    BatchSeam,
    SeamClient,
    check_one_loader,
    check_training_step,
    refuse_strategies,
    warn_of_mixing,
)
from curation.callbacks.online.budget import Budget, checked_keep
from curation.callbacks.online.choice import Choice, SelectionListener
from curation.callbacks.online.loss_check import LossCheck
from curation.callbacks.online.scoring_pass import Scoring, ScoringPass
from curation.callbacks.online.statistics import SelectionStatistics
from curation.callbacks.online.step_timer import StepTimer
from curation.checks import check_choice, check_flag, check_integer, check_seed
from curation.online.top import keep_count, top_rows
from curation.scoring import side_effect_free


class OnlineSelection(SeamClient, ABC):
    """Trains on ``k = round(keep * B)`` rows of every candidate batch of ``B`` rows.

    A rule overrides :meth:`score`; :meth:`choose` where it does not keep the highest scores; and :meth:`on_kept`,
    :meth:`state_dict` and :meth:`restore` where it remembers what was seen or kept. ``k`` is fixed by the first batch
    of the fit, so that every rank and every micro-batch of an accumulation window weighs the same; a batch with fewer
    rows keeps all. Scores that are not finite rank last. Validation is never curated.

    Args:
        keep: Fraction of each candidate batch that is trained on, in (0, 1]. The effective batch shrinks by it.
        when: ``"pays"`` selects only where a step that does takes less time than one that trains on every candidate,
            measured on the first steps and every 500, so two runs need not be equal; ``"always"`` measures nothing.
        seed: Seed of everything random in the rule, in [0, 2^63); equal on all ranks.
        trim: Drop the padding columns that no kept row uses, in batches with ``input_ids`` and ``attention_mask``.
        candidate_batches: Batches of the data loader that make one candidate batch, of which as many rows are trained
            on as one has; ``keep`` is then 1 over it, or None. An epoch has that many fewer steps.

    Attributes:
        has_scores: Whether the rule's scores describe the samples; False where they are random numbers or ranks.
        guarded: Whether :meth:`score` gets a copy of the batch and runs without side effects: in evaluation mode,
            without gradients and logs. A rule that needs gradients sets it to False and calls the module in
            :meth:`scoring`.
        by_row: Whether the score of a row does not depend on the other rows; with ``candidate_batches``,
            :meth:`score` then gets as many rows at once as are trained on.
        batches: Candidate batches that were trained on.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> class HighestLabel(OnlineSelection):
        ...     def score(self, trainer, pl_module, batch, sample_ids):
        ...         return batch[1].float()
        >>> selection = HighestLabel(keep=0.5)
        >>> batch = torch.zeros(4, 8), torch.tensor([1, 3, 0, 2])
        >>> rows, weights = selection.choose(None, selection.score(None, None, batch, None), 2)
        >>> rows
        tensor([1, 3])
    """

    has_scores = True
    guarded = True
    by_row = False
    precision: str = "fit"  # of the scoring pass

    def __init__(
        self,
        keep: float | None = None,
        when: Literal["always", "pays"] = "always",
        seed: int = 0,
        trim: bool = True,
        candidate_batches: int = 1,
    ) -> None:
        self.candidate_batches = check_integer("candidate_batches", candidate_batches, 1)
        self.keep = checked_keep(keep, candidate_batches)
        self.when = check_choice("when", when, ("always", "pays"))
        if when == "pays" and candidate_batches > 1:
            raise ValueError(
                "Argument `when` must be 'always' with `candidate_batches`: the candidates are more rows than a step "
                "can train on."
            )
        self.seed = check_seed(seed)
        self.trim = check_flag("trim", trim)
        self._reset()

    def _reset(self) -> None:
        """Forget an earlier fit."""
        self.batches = 0
        self.budget = Budget(self.keep)
        self.timer = StepTimer(type(self).__name__, compares=self.when == "pays" and self.keep < 1)
        self.statistics = SelectionStatistics(self._further_statistics)
        self.scoring_pass = ScoringPass()
        self.scored = Scoring()
        self.loss_check = LossCheck()
        self._columns = Columns()
        self._places: Tensor | None = None  # of the candidates in the parts; None for one part
        self._choice: Choice | None = None
        self._probing = False
        self._described = False

    @property
    def candidates(self) -> int | None:
        """Largest number of candidates over all ranks in the first batch; None before it."""
        return self.budget.candidates

    @property
    def k(self) -> int | None:
        """Rows that are kept of every candidate batch; None before the first one."""
        return self.budget.k

    @property
    def samples_scored(self) -> int:
        """Rows of all ranks that were scored."""
        return int(self.statistics.counts.values[0])

    @property
    def samples_trained(self) -> int:
        """Rows of all ranks that were trained on."""
        return int(self.statistics.counts.values[1])

    @property
    def train_seconds(self) -> float:
        """Seconds of training, without validation."""
        return self.timer.train_seconds

    @property
    def weighs(self) -> bool:
        """Whether rows get weights, which reach the loss of one data loader alone."""
        return False

    # ------------------------------------------------------------------ what a rule defines

    @abstractmethod
    def score(self, trainer: Trainer, pl_module: LightningModule, batch: Any, sample_ids: Tensor | None) -> Tensor:
        """Scores of the candidates: floating ``[B]``, the highest are kept.

        The module may be called as in a training step: this runs without side effects, unless :attr:`guarded` is
        False. :meth:`outputs` gives logits and targets of most modules. Random numbers come from a generator of the
        rule's own, made of :attr:`seed` and :attr:`batches`.

        Args:
            trainer: The trainer.
            pl_module: The module that is trained.
            batch: The candidate batch, on the device.
            sample_ids: int64 ``[B]``, where the data set is wrapped in ``SampleIds``.
        """

    def choose(self, trainer: Trainer, scores: Tensor, k: int) -> tuple[Tensor, Tensor | None]:
        """The rows to train on: int64 ``[min(k, B)]``, ascending, and their weights where these are not equal.

        Args:
            trainer: The trainer.
            scores: Result of :meth:`score`, ``[B]``.
            k: Rows to keep.
        """
        return top_rows(scores, k), None

    def on_kept(self, trainer: Trainer, rows: Tensor, k: int) -> None:
        """Called on every rank once the kept rows ``[<= k]`` are trained on; may hold a collective."""

    def describe(self) -> str:
        """How the scores are computed, for the log line at the start of the fit."""
        if not self.has_scores:
            return "no scores"
        return f"scores by {self.scoring_pass.name or f'{type(self).__name__}.score'}"

    def rule_statistics(self, choice: Choice) -> dict[str, Tensor | float]:
        """Statistics of the rule itself, logged as ``curation/<name>`` on logging steps."""
        return {}

    # ------------------------------------------------------------------ the seam

    def curate(self, trainer: Trainer, pl_module: LightningModule, batch: Any, sample_ids: Tensor | None) -> Any:
        """The rows of a candidate batch to train on."""
        # The tuners run the training loop with other callbacks; their steps must leave no trace.
        self._probing = self not in trainer.callbacks  # type: ignore[attr-defined]
        size = self._size(trainer, batch)
        self._columns.observe(batch)
        k = keep_count(self.keep, size) if self._probing else self.budget.rows_to_keep(trainer, size)
        choice = Choice(size, k, has_scores=self.has_scores, sample_ids=sample_ids)
        kept = batch
        if self.timer.break_even is not None and (self._probing or not self.timer.selects):
            choice.k = size  # the batch-size finder has to see the larger of both steps
        elif self.keep < 1:
            rows = self._select(trainer, pl_module, batch, choice)
            if choice.k < size:
                kept = take_rows(batch, rows, self._columns)
                kept = trim_padding(kept) if self.trim else kept
            if not (self.loss_check.done or self._probing):
                self.loss_check.watch(
                    self.scoring_pass.route, self.scoring_pass.criterion, copy.copy(kept), choice.trained
                )
        if not (self._described or self._probing):
            self._described = True
            self._log_description(choice)
        self._choice = None if self._probing else choice
        return kept

    def _size(self, trainer: Trainer, batch: Any) -> int:
        try:
            size = batch_size(batch)
            expected = getattr(curated_loader(trainer), "batch_size", None)
            refuse_samples(batch, size, None if expected is None else expected * self.candidate_batches)
        except TypeError as error:
            raise TypeError(
                f"{type(self).__name__} keeps rows of tensors. {error} Let `collate_fn` make tensors [B, ...] of the "
                "samples."
            ) from error
        return size

    def _select(self, trainer: Trainer, pl_module: LightningModule, batch: Any, choice: Choice) -> Tensor:
        """The rows to keep of a batch; they and their scores are entered into ``choice``."""
        self.scored = Scoring()
        with trainer.profiler.profile(f"[Callback]{type(self).__name__}.score"):  # type: ignore[attr-defined]
            if self.by_row:
                parts = [
                    self._checked_score(trainer, pl_module, *part) for part in self.in_parts(batch, choice.sample_ids)
                ]
                scores = self.in_row_order(torch.cat(parts[: choice.size]))
            else:
                scores = self._checked_score(trainer, pl_module, batch, choice.sample_ids)
        choice.scores = self.scored.scores = scores.detach()
        choice.lengths = self.scored.lengths
        choice.candidate_loss = None if self.scored.losses is None else self.scored.losses.nanmean()
        rows, choice.weights = self.choose(trainer, choice.scores, choice.k)
        choice.rows = rows
        return rows

    def _checked_score(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, sample_ids: Tensor | None
    ) -> Tensor:
        """What the rule's :meth:`score` gives for a batch, or a part of it."""
        if self.guarded:
            with self._guard(trainer, pl_module):
                scores = self.score(trainer, pl_module, copied(batch), sample_ids)
        else:
            scores = self.score(trainer, pl_module, batch, sample_ids)
        size = batch_size(batch)
        if not (isinstance(scores, Tensor) and scores.is_floating_point() and scores.shape == (size,)):
            got = f"{scores.dtype} {list(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(f"`score` must give one floating number per row, [{size}], but gave {got}.")
        return scores

    def in_parts(self, batch: Any, sample_ids: Tensor | None) -> Iterator[tuple[Any, Tensor | None]]:
        """The candidates, with ``candidate_batches`` in as many parts, about as large as what is trained on.

        There are as many on every process, since the processes of a sharded model wait for each other: where there
        are fewer rows, parts beyond them repeat the first, and their scores are to be left out. Rows of text are in
        order of their lengths, so that little of a part is padding: :meth:`in_row_order` puts what is computed of the
        parts into the order of the candidates. What :meth:`outputs` enters into :attr:`scored` of each part is joined
        at the end.

        Args:
            batch: The candidate batch.
            sample_ids: int64 ``[B]``, or None.
        """
        if self.candidate_batches == 1:
            yield batch, sample_ids
            return
        size, scored = batch_size(batch), []
        device = next(leaf.device for _, leaf in leaves(batch) if isinstance(leaf, Tensor) and leaf.dim())
        order = torch.arange(size, device=device)
        if self.trim and is_masked_text(batch):
            order = batch["attention_mask"].ne(0).sum(1).argsort(descending=True, stable=True)
        self._places = order.argsort()
        for rows in order.tensor_split(self.candidate_batches):
            rows = rows if len(rows) else rows.new_zeros(1)
            self.scored = Scoring()
            part = take_rows(batch, rows, self._columns)
            yield trim_padding(part) if self.trim else part, None if sample_ids is None else sample_ids[rows]
            scored.append(self.scored)
        self.scored = Scoring.joined(scored[:size], self._places)

    def in_row_order(self, values: Tensor) -> Tensor:
        """Values ``[B, ...]`` of the rows of the parts, one part after another, in the order of the candidates."""
        return values if self._places is None else values[self._places]

    def _log_description(self, choice: Choice) -> None:
        description = self.describe() if self.keep < 1 else "keeps every row, nothing is scored"
        fewer = " The learning rate is unchanged, so each step averages over fewer samples."
        sizes = f"candidate batch {choice.size}, trained batch {choice.trained} per device and step."
        rank_zero_info(
            f"{type(self).__name__}: {description}; {sizes}{fewer if choice.trained < choice.size else ''}"
        )
        # Not where only this batch is short, as the last of an epoch is, at which a fit may be resumed.
        if choice.trained == choice.size >= (self.candidates or 0) and self.keep < 1:
            rank_zero_warn(
                f"`keep={self.keep}` of a candidate batch of {choice.size} is every row: enlarge the batch, or draw "
                "from several with `candidate_batches`."
            )
        elif choice.size >= (self.candidates or 0) and choice.trained / choice.size > 1.25 * self.keep:
            rank_zero_warn(
                f"`keep={self.keep}` of a candidate batch of {choice.size} is {choice.trained}, a share of "
                f"{choice.trained / choice.size:.2f}: enlarge the batch, or take several with `candidate_batches`."
            )

    def outputs(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, head: nn.Linear | None = None
    ) -> tuple[Tensor, Any]:
        """Logits of the candidates with aligned targets, or the input of ``head`` in place of its logits.

        Where ``score_step`` returns losses, ``[B]``, these with None; ``per_sample_loss`` takes either pair. Also
        enters the lengths into :attr:`scored`, and on logging steps the mean loss of all candidates.

        Returns:
            ``[B, T, V]`` with int64 ``[B, T]``, or ``[B, C]`` with ``[B]``; target -100 is not scored.

        Raises:
            TypeError: If the module gives no per-sample outputs; the message names the method to add.
        """
        context = self.scoring(trainer, pl_module)
        outputs, targets, self.scored = self.scoring_pass.run(trainer, pl_module, batch, head, context)
        return outputs, targets

    def uniform(self, trainer: Trainer, size: int, device: torch.device) -> Tensor:
        """Random numbers in [0, 1), fp64 ``[size]``, of the seed, the batches so far and the rank only."""
        draw = np.random.default_rng((self.seed, self.batches, trainer.global_rank)).random(size)
        return torch.from_numpy(draw).to(device, non_blocking=True)

    @contextmanager
    def _guard(self, trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
        """As :meth:`scoring`, but a rule that draws from the global streams does not draw the same at each step."""
        guard = side_effect_free(pl_module, random_streams=False)
        with muted(pl_module), guard, trainer.precision_plugin.forward_context():
            yield

    @contextmanager
    def scoring(self, trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
        """Run the module without side effects, in the precision of the scores; ``self.log`` in it is ignored."""
        with muted(pl_module), side_effect_free(pl_module), self.in_precision(trainer, pl_module):
            yield

    @contextmanager
    def in_precision(self, trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
        """Compute in the precision of the fit, or with autocast to bf16."""
        cast = torch.autocast(pl_module.device.type, torch.bfloat16) if self.precision == "bf16" else nullcontext()
        with trainer.precision_plugin.forward_context(), cast:
            yield

    # ------------------------------------------------------------------ Lightning's hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Install the seam, after refusing what cannot work; an earlier fit is forgotten."""
        if stage == "fit":
            self._check(trainer, pl_module)
            self._reset()
        super().setup(trainer, pl_module, stage)

    def _check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_training_step(pl_module)
        rules = [c for c in trainer.callbacks if isinstance(c, OnlineSelection)]  # type: ignore[attr-defined]
        if len(rules) > 1:
            names = " and ".join(type(rule).__name__ for rule in rules)
            raise ValueError(f"Only one online selection can choose the rows of a batch, but got {names}.")
        refuse_strategies(trainer, self, FSDPStrategy)
        warn_of_mixing(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the seam and release the module."""
        super().teardown(trainer, pl_module, stage)
        self.loss_check.stop()
        self.scoring_pass.forget()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the seam and save the table: Lightning calls neither ``teardown`` nor ``on_fit_end`` then."""
        super().on_exception(trainer, pl_module, exception)
        self.statistics.log_table(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse several data loaders of which none is named; start the clocks."""
        check_one_loader(trainer, self, named=not self.weighs)
        if curated_name(trainer) is not None:
            self.loss_check.done = True  # the loss has parts of other data loaders
        self.timer.start()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Check that the batch to train on is the one that was selected."""
        BatchSeam.check(trainer, batch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Give the choice to the listeners, the rule and the statistics."""
        self.timer.end_batch()
        choice, self._choice = self._choice, None
        if choice is None:
            return
        weighted = choice.weights is not None and hasattr(pl_module, "sample_weights")
        if not (self.loss_check.done or weighted):
            loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
            loss = loss * trainer.accumulate_grad_batches if isinstance(loss, Tensor) else None
            self.loss_check.compare(pl_module, loss, f"`{self.scoring_pass.name}`")
        listeners = [c for c in trainer.callbacks if isinstance(c, SelectionListener)]  # type: ignore[attr-defined]
        for listener in (*listeners, self.statistics):
            listener.on_selection(trainer, pl_module, self.batches, choice)
        self.batches += 1
        if choice.rows is not None and choice.scores is not None:
            self.on_kept(trainer, choice.rows, choice.k)
        self.timer.end_step(trainer, pl_module)

    def _further_statistics(self, choice: Choice) -> dict[str, Tensor | float]:
        return {**self.timer.statistics(), **self.rule_statistics(choice)}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clocks again: evaluation is not training time."""
        self.timer.start()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log a table of candidates with their scores and whether they were kept."""
        self.statistics.warn_of_broken_scores()
        self.statistics.log_table(trainer)

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Counters of the selection; holds no collective, since not every rank may be saving."""
        return {
            **self.budget.state_dict(),
            "batches": self.batches,
            "samples_scored": self.samples_scored,
            "samples_trained": self.samples_trained,
            **self.timer.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; a rule with a state of its own extends both."""
        self.budget.load_state_dict(state)
        self.batches = state["batches"]
        self.statistics.counts = Totals(state["samples_scored"], state["samples_trained"])
        self.timer.load_state_dict(state, same_keep=state["k_is_for"][:1] == [self.keep])
