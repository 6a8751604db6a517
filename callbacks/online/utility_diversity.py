"""Utility-diversity selection (UDS, arXiv 2510.16882) on the seam."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from curation.callbacks.online.head_route import HeadRoute
from curation.callbacks.online.online_selection import OnlineSelection, is_number
from curation.online.utility_diversity import UtilityDiversityScorer
from curation.scoring import IGNORED, find_output_head

REFRESH_EVERY = 100


class UtilityDiversitySelection(OnlineSelection):
    """Keeps the rows whose logits are rich (nuclear norm) and unlike what was kept lately.

    The score is ``u + alpha d``: ``u`` the nuclear norm of a sample's logits over its scored positions, ``d`` its
    mean distance to the sketches of the last 1024 kept samples. Where the output head is linear, both come from the
    head's input and the logits are never formed; this is checked once against real logits.

    Args:
        keep: Fraction of each candidate batch that is trained on, in (0, 1].
        alpha: Weight of the diversity; 0 leaves the nuclear norm alone.
        normalization: ``"length"`` takes the growth with the number of scored tokens out of both terms, ``"none"``
            does not; both standardise them over the candidate set. ``"paper"`` is the published formula: raw terms,
            every position.
        head: ``"auto"``, ``"none"`` (form the logits), or the path of the ``torch.nn.Linear`` that makes them.
        precision: Of the scoring pass: ``"fit"`` is that of the fit, ``"bf16"`` autocasts it to bf16, which kept the
            same rows in about half the time on a CPU with bf16 instructions.
        when: ``"pays"`` trains on every candidate wherever that is measured to be faster.
        seed: Of the random projections; equal on all ranks.
        trim: Drop the padding columns that no kept row uses.

    Raises:
        ValueError: If an argument is out of its range, or ``head`` names no linear layer that makes the logits.
        TypeError: If the module gives no per-sample outputs; the message names the method to add.
    """

    def __init__(
        self,
        keep: float,
        alpha: float = 1.0,
        normalization: Literal["length", "none", "paper"] = "length",
        head: str = "auto",
        precision: Literal["fit", "bf16"] = "fit",
        when: Literal["always", "pays"] = "always",
        seed: int = 0,
        trim: bool = True,
    ) -> None:
        if not (is_number(alpha) and 0 <= alpha <= 1e6):
            raise ValueError(f"Argument `alpha` must be in [0, 1e6], but got {alpha!r}.")
        if normalization not in ("length", "none", "paper"):
            raise ValueError(
                f"Argument `normalization` must be 'length', 'none' or 'paper', but got {normalization!r}."
            )
        if not isinstance(head, str):
            raise ValueError(f"Argument `head` must be 'auto', 'none' or a module path, but got {head!r}.")
        if precision not in ("fit", "bf16"):
            raise ValueError(f"Argument `precision` must be 'fit' or 'bf16', but got {precision!r}.")
        self.alpha = float(alpha)
        self.normalization = normalization
        self.head = head
        self.precision = precision
        super().__init__(keep=keep, when=when, seed=seed, trim=trim)

    def _reset(self) -> None:
        super()._reset()
        self.scorer = UtilityDiversityScorer(self.alpha, self.normalization, self.seed)
        self._route_of_head = HeadRoute(self.head)
        self._refreshed: int | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the path of the head before anything is trained."""
        if self.head not in ("auto", "none"):
            find_output_head(pl_module, self.head, None)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the seam and let go of the module."""
        super().teardown(trainer, pl_module, stage)
        self._route_of_head.forget()

    def describe(self) -> str:
        """The route of the scores."""
        how = "without forming logits" if self._route_of_head.used else "from logits"
        return f"{super().describe()}, {how}{self._route_of_head.why}"

    def score(self, trainer: Trainer, pl_module: LightningModule, batch: Any, sample_ids: Tensor | None) -> Tensor:
        """Scores ``[B]``, fp32 or fp64."""
        head = self._route_of_head.find(self, trainer, pl_module, batch)
        if head is None:
            self.scorer.use_logits()
        else:
            self._refresh(head)
        outputs, targets = self.outputs(trainer, pl_module, batch, head)
        with torch.no_grad():
            return self.scorer.score(outputs, targets.ne(IGNORED))

    @contextmanager
    def scoring(self, trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
        """As in the base, in the precision asked for."""
        cast = torch.autocast(pl_module.device.type, torch.bfloat16) if self.precision == "bf16" else nullcontext()
        with super().scoring(trainer, pl_module), cast:
            yield

    def _refresh(self, head: nn.Linear) -> None:
        """Bring the products with the head up to date: once, or every 100 batches while it is trained."""
        trained = head.weight.requires_grad
        if self._refreshed is None or (trained and self.batches - self._refreshed >= REFRESH_EVERY):
            self.scorer.use_head(head.weight, head.bias)
            self._refreshed = self.batches

    def on_kept(self, trainer: Trainer, rows: Tensor, k: int) -> None:
        """Remember the kept sketches of every rank, in rank order."""
        sketches, moments = self.scorer.sketches, self.scorer.moments
        kept = sketches.new_full((k, sketches.size(1)), torch.nan)  # the memory skips NaN
        kept[: len(rows)] = sketches[rows]
        if trainer.world_size > 1:
            kept = trainer.strategy.all_gather(kept).flatten(0, 1)
            moments = trainer.strategy.reduce(moments, reduce_op="sum")
        self.scorer.remember(kept, moments)

    def state_dict(self) -> dict[str, Any]:
        """Counters and the state of the scorer, the same on every rank."""
        return {
            **super().state_dict(),
            "scorer": self.scorer.state_dict(),
            "head": self.head,
            "by_head": self._route_of_head.used,
            "refreshed": self._refreshed,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; another ``head`` is tried anew."""
        super().restore(state)
        self.scorer.load_state_dict(state["scorer"])
        if state["head"] == self.head:
            self._route_of_head.used = state["by_head"]
            if self.scorer.head_gram is not None:  # else the head is frozen, and its products are made again
                self._refreshed = state["refreshed"]
