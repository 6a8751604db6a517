"""Utility-diversity selection (UDS, arXiv 2510.16882) on the seam."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from curation.callbacks.online_selection import OnlineSelection, is_number
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from curation.batch import take_rows
from curation.online.utility_diversity import UtilityDiversityScorer
from curation.scoring import IGNORED, find_output_head

REFRESH_EVERY = 100
HEAD_TOLERANCE = 0.02  # bf16 logits differ by 1e-3, a soft cap or a logit scale by far more


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
        super().__init__(keep=keep, seed=seed, trim=trim)

    def _reset(self) -> None:
        super()._reset()
        self.scorer = UtilityDiversityScorer(self.alpha, self.normalization, self.seed)
        self._by_head: bool | None = None
        self._why = ""
        self._head: nn.Linear | None = None
        self._refreshed: int | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the path of the head before anything is trained."""
        if self.head not in ("auto", "none"):
            find_output_head(pl_module, self.head, None)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the seam and let go of the module."""
        super().teardown(trainer, pl_module, stage)
        self._head = None

    def describe(self) -> str:
        """The route of the scores."""
        return f"{super().describe()}, {'without forming logits' if self._by_head else 'from logits'}{self._why}"

    def score(self, trainer: Trainer, pl_module: LightningModule, batch: Any, sample_ids: Tensor | None) -> Tensor:
        """Scores ``[B]``, fp32 or fp64."""
        if self._head is None and self._by_head is not False:
            self._head = find_output_head(pl_module, self.head, batch)
            self._by_head = False if self._head is None else self._by_head
        if self._head is not None and self._by_head is None:
            self._by_head = self._try_head(trainer, pl_module, batch, self._head)
        head = self._head if self._by_head else None
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

    def _try_head(self, trainer: Trainer, pl_module: LightningModule, batch: Any, head: nn.Linear) -> bool | None:
        """Whether the head's input gives the norm of real logits, on the longest sample; None where that has none."""
        try:
            _, targets = self.outputs(trainer, pl_module, batch, head)
            longest = take_rows(batch, targets.reshape(len(targets), -1).ne(IGNORED).sum(1).argmax()[None])
            hidden, targets = self.outputs(trainer, pl_module, longest, head)
            logits, _ = self.outputs(trainer, pl_module, longest)
            with torch.no_grad():
                self._refresh(head)
                got = self.scorer.utility(hidden, targets.ne(IGNORED))
                self.scorer.use_logits()
                expected = self.scorer.utility(logits, targets.ne(IGNORED))
        except (RuntimeError, IndexError) as error:  # the module does something to its logits that needs their size
            reason = str(error).splitlines()[0]
            if self.head != "auto":
                raise ValueError(
                    f"Argument `head` must name the layer whose output are the logits, or be 'none', but with "
                    f"{self.head!r} the module fails: {reason}"
                ) from error
            self._why = f" (the head cannot be left out: {reason})"
            return False
        finally:
            self._refreshed = None
        known = expected.isfinite() & expected.gt(0)
        off = torch.where(known, (got / expected - 1).abs().nan_to_num(nan=torch.inf), 0.0)
        off, any_known = (
            trainer.strategy.reduce(torch.stack([off, known]).float(), reduce_op="max").flatten().tolist()
        )
        if not any_known:
            return None
        if off >= HEAD_TOLERANCE:
            self._why = f" (the head's input gives norms {off:.0%} off)"
        return off < HEAD_TOLERANCE

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
            "by_head": self._by_head,
            "refreshed": self._refreshed,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; another ``head`` is tried anew."""
        super().restore(state)
        self.scorer.load_state_dict(state["scorer"])
        if state["head"] == self.head:
            self._by_head = state["by_head"]
            if self.scorer.head_gram is not None:  # else the head is frozen, and its products are made again
                self._refreshed = state["refreshed"]
