"""Utility-diversity selection (UDS, arXiv 2510.16882) as a callback."""

from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from curation.batch import batch_size
from curation.callbacks.lightning.collectives import gather_rows
from curation.callbacks.online.head_route import HeadRoute
from curation.callbacks.online.online_selection import OnlineSelection
from curation.checks import check_choice, check_number, check_text
from curation.online.utility_diversity import Measured, UtilityDiversityScorer
from curation.scoring import IGNORED, find_output_head

REFRESH_EVERY = 100  # candidate batches


class UtilityDiversitySelection(OnlineSelection):
    """Keeps the rows whose logits have a large nuclear norm and differ from those of rows that were kept lately.

    The score is ``u + alpha d``: ``u`` the nuclear norm of a sample's logits over its scored positions, ``d`` its
    mean distance to the sketches of the last 1024 kept samples. Where the output head is linear, both come from the
    head's input and the logits are never formed; this is checked once against real logits.

    Args:
        keep: Fraction of each candidate batch that is trained on, in (0, 1].
        alpha: Weight of the diversity, in [0, 1e6]; 0 leaves the nuclear norm alone.
        normalization: ``"length"`` takes the growth with the number of scored tokens out of both terms, ``"none"``
            does not; both standardise the terms over the candidate batch. ``"paper"`` is the published formula: raw
            terms, every position.
        head: ``"auto"``, ``"none"`` (form the logits), or the path of the ``torch.nn.Linear`` that makes them.
        precision: Precision of the scoring pass: ``"fit"`` for that of the fit, ``"bf16"`` for autocast to bf16,
            which kept the same rows in about half the time on a CPU with bf16 instructions.
        when: ``"pays"`` trains on every candidate wherever that is measured to be faster.
        seed: Seed of the random projections, in [0, 2^63); equal on all ranks.
        trim: Drop the padding columns that no kept row uses.
        candidate_batches: Batches of the data loader that make one candidate batch; ``keep`` is then 1 over it, or
            None.

    Raises:
        ValueError: If an argument is out of its range, or ``head`` names no linear layer that makes the logits.
        TypeError: If the module gives no per-sample outputs; the message names the method to add.

    Example:
        >>> selection = UtilityDiversitySelection(keep=0.25, alpha=2.0, head="none")
        >>> selection.scorer.alpha, selection.k  # `k` is fixed by the first batch of the fit
        (2.0, None)
    """

    guarded = False  # `outputs` is

    def __init__(
        self,
        keep: float | None = None,
        alpha: float = 1.0,
        normalization: Literal["length", "none", "paper"] = "length",
        head: str = "auto",
        precision: Literal["fit", "bf16"] = "fit",
        when: Literal["always", "pays"] = "always",
        seed: int = 0,
        trim: bool = True,
        candidate_batches: int = 1,
    ) -> None:
        self.alpha = check_number("alpha", alpha, "[0, 1e6]")
        check_choice("normalization", normalization, ("length", "none", "paper"))
        self.normalization = normalization
        self.head = check_text("head", head)
        self.precision = check_choice("precision", precision, ("fit", "bf16"))
        super().__init__(keep, when, seed, trim, candidate_batches)

    def _reset(self) -> None:
        super()._reset()
        self.scorer = UtilityDiversityScorer(self.alpha, self.normalization, self.seed)
        self.head_route = HeadRoute(self.head)
        self._refreshed: int | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the path of the head before anything is trained."""
        if self.head not in ("auto", "none"):
            find_output_head(pl_module, self.head, None)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the seam and release the module."""
        super().teardown(trainer, pl_module, stage)
        self.head_route.forget()

    def describe(self) -> str:
        """The route of the scores."""
        source = "without forming logits" if self.head_route.used else "from logits"
        return f"{super().describe()}, {source}{self.head_route.reason}"

    def score(self, trainer: Trainer, pl_module: LightningModule, batch: Any, sample_ids: Tensor | None) -> Tensor:
        """Utility plus ``alpha`` times diversity: ``[B]``, fp32 or fp64."""
        measured = []
        for part, _ in self.in_parts(batch, None):
            head = self.head_route.find(self, trainer, pl_module, part)
            if head is None:
                self.scorer.use_logits()
            else:
                self._refresh(head)
            outputs, targets = self.outputs(trainer, pl_module, part, head)
            if targets is None:
                raise TypeError(
                    f"UtilityDiversitySelection needs logits, but of `{type(pl_module).__name__}` there are losses "
                    f"only, from {self.scoring_pass.name}. Let `score_step` return `(logits, targets)`, or use "
                    "HardSampleSelection."
                )
            with torch.no_grad():
                measured.append(self.scorer.measure(outputs, targets.ne(IGNORED)))
        with torch.no_grad():
            parts = zip(*measured[: batch_size(batch)], strict=True)
            return self.scorer.score_measured(Measured(*(self.in_row_order(torch.cat(part)) for part in parts)))

    def _refresh(self, head: nn.Linear) -> None:
        """Compute the products with the head: once, or every 100 batches while it is trained."""
        trained = head.weight.requires_grad
        if self._refreshed is None or (trained and self.batches - self._refreshed >= REFRESH_EVERY):
            self.scorer.use_head(head.weight, head.bias)
            self._refreshed = self.batches

    def on_kept(self, trainer: Trainer, rows: Tensor, k: int) -> None:
        """Remember the kept sketches of every rank, in rank order."""
        moments = self.scorer.moments
        if trainer.world_size > 1:
            moments = trainer.strategy.reduce(moments, reduce_op="sum")
        self.scorer.remember(gather_rows(trainer, self.scorer.sketches[rows]), moments)

    def state_dict(self) -> dict[str, Any]:
        """Counters and the state of the scorer, the same on every rank."""
        return {
            **super().state_dict(),
            "scorer": self.scorer.state_dict(),
            "head": self.head,
            "by_head": self.head_route.used,
            "refreshed": self._refreshed,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; with another ``head`` the route of the scores is found anew."""
        super().restore(state)
        self.scorer.load_state_dict(state["scorer"])
        if state["head"] == self.head:
            self.head_route.used = state["by_head"]
            if self.scorer.head_gram is not None:  # else the head is frozen, and its products are computed again
                self._refreshed = state["refreshed"]
