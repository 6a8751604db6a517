"""Selection by a small model that is trained beside the large one."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from curation.batch import batch_size, copied, take_rows
from curation.callbacks.lightning.loop import logging_step, logs_now, muted
from curation.callbacks.online.choice import Choice
from curation.callbacks.online.hard_samples import HardSampleSelection
from curation.callbacks.online.scoring_pass import ScoringPass
from curation.callbacks.online.side_training import SideTraining
from curation.checks import check_integer, check_number
from curation.online.proxy import rank_correlation
from curation.online.top import top_rows
from curation.scoring import per_sample_loss, side_effect_free

COMPARED_EVERY = 200  # batches
COMPARED_ROWS = 64  # whose logits are formed
COMPARISONS = 3  # before a warning
AGREES = 0.1  # rank correlation


class ProxySelection(HardSampleSelection):
    """Keeps the rows that are hard for a small model, the proxy, which learns on the same batches.

    Scoring with the large model costs its forward pass; a proxy of 1/25 of the operations costs 1/25 of that. It is
    scored on every candidate batch, and takes a training step on every ``update_every``-th one, after the large
    model's. With a ``reference``, the score is the loss that can be learned: that of the proxy minus that of a frozen
    small model (arXiv 2206.07137, 2312.05328). What is done with the scores are the rules of
    :class:`~curation.callbacks.HardSampleSelection`.

    The proxy's ``training_step`` and ``configure_optimizers`` are used, in its own optimizer, with the fit's
    precision and clipping; a schedule of steps counts those of the fit. ``self.log`` in it does nothing. It is no
    part of the module and is saved with the callback. The large model's random streams and buffers stay as they are.

    Every 200 batches, at a logging step, the large model scores the candidates, too:
    ``curation/proxy_rank_correlation`` says whether the proxy ranks as it does, and a warning if it does not.
    ``curation/proxy_loss`` is the proxy's training loss.

    Args:
        keep: Fraction of each candidate batch that is trained on, in (0, 1].
        proxy: The small module, for the same batches.
        reference: A frozen module, or a file with irreducible losses by sample id, as ``curation irreducible`` writes
            it; None for the loss itself.
        rule: ``"top"``, ``"rank"``, ``"proportional"``, ``"selective_backprop"``, ``"importance"`` or
            ``"drop_high"``.
        update_every: Batches for each training step of the proxy.
        start: Share of the fit, in [0, 1), before which rows are kept at random.
        start_loss: Level of the proxy's training loss (a running mean), down to which rows are kept at random; None
            for no such level.
        end: Share of the fit, in (0, 1], after which they are again, so that it ends on batches like the data.
        pressure: As in ``HardSampleSelection``, used by ``"rank"``.
        beta: As in ``HardSampleSelection``, used by ``"selective_backprop"``.
        when: ``"pays"`` trains on every candidate wherever that is measured to be faster.
        seed: Seed of the random draws and of the proxy's training steps, in [0, 2^63); equal on all ranks.
        trim: Drop the padding columns that no kept row uses.
        drop: As in ``HardSampleSelection``, used by ``"drop_high"``.
        candidate_batches: Batches of the data loader that make one candidate batch; ``keep`` is then 1 over it, or
            None.

    Attributes:
        started: Whether rows have been kept by the scores.

    Raises:
        ValueError: If an argument is out of its range; if the proxy is as large as the module, or shares parameters
            with it; if ``start`` is set and the length of the fit is not known.
        TypeError: If the proxy has no loss or optimizer of its own, or gives no per-sample outputs.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> selection = ProxySelection(keep=0.5, proxy=BoringModel())
        >>> selection.update_every, selection.score_name
        (4, 'loss')
    """

    by_row = False  # the proxy is small, and random rows are drawn for all of them

    def __init__(
        self,
        keep: float | None,
        proxy: LightningModule,
        reference: LightningModule | str | None = None,
        rule: Literal["top", "rank", "proportional", "selective_backprop", "importance", "drop_high"] = "top",
        update_every: int = 4,
        start: float = 0.0,
        start_loss: float | None = None,
        end: float = 1.0,
        pressure: float = 100.0,
        beta: float | None = None,
        when: Literal["always", "pays"] = "always",
        seed: int = 0,
        trim: bool = True,
        drop: float = 0.3,
        candidate_batches: int = 1,
    ) -> None:
        for name, module in {"proxy": proxy, "reference": reference}.items():
            if not isinstance(module, LightningModule) and (name == "proxy" or not isinstance(module, str | None)):
                raise ValueError(f"Argument `{name}` must be a LightningModule, but got {module!r}.")
        if rule == "importance" and reference is not None:
            raise ValueError(
                "Argument `reference` must be None with `rule='importance'`: its scores may be negative."
            )
        self.update_every: int = check_integer("update_every", update_every, 1)
        self.start = check_number("start", start, "[0, 1)")
        self.start_loss = check_number("start_loss", start_loss, "(-inf, inf)", optional=True)
        self.end = check_number("end", end, "(0, 1]")
        if self.end <= self.start:
            raise ValueError(f"Argument `end` must be more than `start={self.start}`, but got {end!r}.")
        self.training = SideTraining("proxy", proxy)
        self.reference = reference
        file = reference if isinstance(reference, str) else None
        super().__init__(
            keep,
            rule,
            "loss" if file is None else "reducible_loss",
            file,
            pressure,
            beta,
            when,
            seed,
            trim,
            drop,
            candidate_batches,
        )

    @property
    def proxy(self) -> LightningModule:
        """The small module."""
        return self.training.module

    def _reset(self) -> None:
        super()._reset()
        self.loss_check.done = True  # it compares with the large model's loss
        self.started = self.start == 0 and self.start_loss is None
        self._level: float | None = None
        self._proxy_loss: Tensor | None = None
        self._candidates: Any = None
        self._reference_pass = ScoringPass()
        self._model_pass: ScoringPass | None = ScoringPass()
        self._compared_at = -COMPARED_EVERY
        self._correlations: list[float] = []

    # ------------------------------------------------------------------ scores

    def scorer(self, pl_module: LightningModule) -> LightningModule:
        """The proxy."""
        return self.proxy

    @contextmanager
    def scoring(self, trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
        """Run the proxy without side effects, in its precision."""
        with muted(pl_module), side_effect_free(pl_module), self.training.precision(trainer):
            yield

    def score(self, trainer: Trainer, pl_module: LightningModule, batch: Any, sample_ids: Tensor | None) -> Tensor:
        """The proxy's loss of every candidate, or the part of it that can be learned: fp32 ``[B]``."""
        if not self.has_scores:
            return self.uniform(trainer, batch_size(batch), pl_module.device).float()
        losses = super().score(trainer, pl_module, batch, sample_ids)
        self._compare(trainer, pl_module, batch, losses)
        if isinstance(self.reference, LightningModule):
            losses = losses - self._losses(trainer, self._reference_pass, self.reference, batch)
        return losses

    def _losses(
        self, trainer: Trainer, scoring_pass: ScoringPass, module: LightningModule, batch: Any, check: bool = False
    ) -> Tensor:
        """Losses of a module that is not the proxy: fp32 ``[B]``."""
        outputs, targets, _ = scoring_pass.run(trainer, module, batch, None, super().scoring(trainer, module), check)
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            return scoring_pass.criterion.bind(per_sample_loss)(outputs, targets)

    def _compare(self, trainer: Trainer, pl_module: LightningModule, batch: Any, losses: Tensor) -> None:
        """At a small share of steps, correlate the proxy's losses with those of the large model."""
        due = self.batches - self._compared_at >= COMPARED_EVERY
        if self._probing or not due or not logs_now(trainer) or self._model_pass is None:
            return
        self._compared_at = self.batches
        rows = torch.arange(min(len(losses), COMPARED_ROWS), device=losses.device)
        known, correlation = torch.zeros(2, device=losses.device)
        with suppress(Exception):  # its losses are not known, or not in this way; those of the proxy are what counts
            parts = rows.split(len(rows) if self.candidate_batches == 1 else self.k or len(rows))
            own = torch.cat(
                [
                    self._losses(trainer, self._model_pass, pl_module, take_rows(batch, part), check=True)
                    for part in parts
                ]
            )
            correlation, known = rank_correlation(losses[rows], own), torch.ones_like(known)
        both = trainer.strategy.reduce(torch.stack([correlation, known]), reduce_op="mean").tolist()
        if both[1] < 1:  # on every process
            self._model_pass = None
            return
        self._correlations.append(both[0])
        if len(self._correlations) == COMPARISONS and np.mean(self._correlations) < AGREES:
            rank_zero_warn(
                f"The proxy does not rank rows as the model does: the rank correlation of their losses was "
                f"{', '.join(f'{value:.2f}' for value in self._correlations)}. A larger proxy, a later `start` or a "
                "smaller `update_every` may help."
            )

    def choose(self, trainer: Trainer, scores: Tensor, k: int) -> tuple[Tensor, Tensor | None]:
        """Draw rows by the rule; by the random scores before the start and after the end."""
        return super().choose(trainer, scores, k) if self.has_scores else (top_rows(scores, k), None)

    def describe(self) -> str:
        """The rule, and where the scores come from."""
        if not self.has_scores:
            return f"{self.rule} by {type(self.proxy).__name__} later, at random until then"
        minus = "" if self.reference is None else " minus that of the reference"
        return f"{super().describe()} of {type(self.proxy).__name__}{minus}"

    def rule_statistics(self, choice: Choice) -> dict[str, Tensor | float]:
        """The proxy's training loss, and the last rank correlation with the model's losses."""
        statistics = super().rule_statistics(choice)
        if self._proxy_loss is not None:
            statistics["proxy_loss"] = self._proxy_loss
        if self._correlations:
            statistics["proxy_rank_correlation"] = self._correlations[-1]
        return statistics

    # ------------------------------------------------------------------ Lightning's hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Install the seam; set the proxy and the reference up."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit" or self.keep == 1:
            return
        self.training.attach(trainer, self.seed)
        if isinstance(self.reference, LightningModule):
            for name, module in {"proxy": self.proxy, type(pl_module).__name__: pl_module}.items():
                check_separate("reference", self.reference, name, module)
            SideTraining.prepare(trainer, self.reference, self.seed)
            self.reference.eval().requires_grad_(False)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a proxy that is none; make its optimizer."""
        super().on_train_start(trainer, pl_module)
        if self.keep == 1:
            return
        check_separate("proxy", self.proxy, type(pl_module).__name__, pl_module)
        both = [list(module.parameters()) for module in (self.proxy, pl_module)]
        sizes = [sum(p.numel() for p in parameters if not is_lazy(p)) for parameters in both]
        if sizes[0] >= sizes[1] and not any(map(is_lazy, both[1])):
            raise ValueError(
                f"Argument `proxy` must be smaller than the module, but {type(self.proxy).__name__} has {sizes[0]:,} "
                f"parameters and {type(pl_module).__name__} {sizes[1]:,}."
            )
        self.training.start()
        for name, value, default in (("start", self.start, 0), ("end", self.end, 1)):
            if value != default:
                self._steps = float(trainer.estimated_stepping_batches)
            if value != default and self._steps == float("inf"):
                raise ValueError(
                    f"Argument `{name}` must be {default} in a fit whose length is not known, but got {value!r}."
                )

    def curate(self, trainer: Trainer, pl_module: LightningModule, batch: Any, sample_ids: Tensor | None) -> Any:
        """The rows of a candidate batch to train on; the proxy is to train on all of them."""
        progress = logging_step(trainer) / self._steps  # 0 where no length is needed
        if self.start_loss is None or self._level is not None:
            low = self.start_loss is None or self._level <= self.start_loss
            self.started = self.started or (progress >= self.start and low)
        self.has_scores = self.started and progress < self.end
        kept = super().curate(trainer, pl_module, batch, sample_ids)
        if self.keep < 1 and self.batches % self.update_every == 0 and not self._probing:
            self._candidates = copied(batch) if kept is batch else batch
        return kept

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Train the proxy, and what the base does."""
        candidates, self._candidates = self._candidates, None
        if candidates is not None and self._choice is not None:
            proxy_loss = self.training.step(trainer, candidates, self.batches, self.seed)
            self._proxy_loss = self._proxy_loss if proxy_loss is None else proxy_loss
            if (
                self.start_loss is not None and not self.started and proxy_loss is not None
            ):  # the host waits until then
                loss = float(proxy_loss)
                self._level = loss if self._level is None else 0.9 * self._level + 0.1 * loss
        if self._choice is not None and self.keep < 1:
            self.training.end_batch(trainer)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the seam; release the trainer."""
        super().teardown(trainer, pl_module, stage)
        self.training.detach()
        self._reference_pass.forget()
        if self._model_pass is not None:
            self._model_pass.forget()
        self._candidates = None
        if isinstance(self.reference, LightningModule):
            self.reference.trainer = None

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """As in the base, with the proxy, its optimizer and schedule; equal on all ranks."""
        started = {"started": self.started, "level": self._level, "compared_at": self._compared_at}
        return {**super().state_dict(), **started, "proxy": self.training.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        super().restore(state)
        self.started, self._level, self._compared_at = state["started"], state["level"], state["compared_at"]
        self.training.restore(state["proxy"])


def check_separate(name: str, module: nn.Module, other_name: str, other: nn.Module) -> None:
    """Refuse an argument that shares parameters with another module.

    Raises:
        ValueError: If it does.
    """
    if {id(p) for p in module.parameters()} & {id(p) for p in other.parameters()}:
        raise ValueError(
            f"Argument `{name}` must be a module of its own, but {type(module).__name__} shares parameters with "
            f"{other_name}."
        )
