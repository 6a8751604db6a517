"""Utility-diversity selection (UDS, arXiv 2510.16882) on the seam."""

from typing import Any, Literal

import torch
from curation.callbacks.online_selection import OnlineSelection
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from curation.batch import take_rows
from curation.online.sketch import SketchMemory, cosine_projection, sign_projection, sketch
from curation.online.utility_diversity import (
    LengthTrend,
    compact,
    gram_of_head,
    nuclear_norm_of_hidden_rows,
    nuclear_norm_of_rows,
    utility_diversity,
)
from curation.scoring import IGNORED, find_output_head

TOKEN_ROWS, VOCAB_ROWS, CAPACITY = 8, 128, 1024
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
        seed: Of the random projections; equal on all ranks.
        trim: Drop the padding columns that no kept row uses.

    Raises:
        ValueError: If an argument is out of its range, or ``head`` names no linear layer.
        TypeError: If the module gives no per-sample outputs; the message names the method to add.
    """

    def __init__(
        self,
        keep: float,
        alpha: float = 1.0,
        normalization: Literal["length", "none", "paper"] = "length",
        head: str = "auto",
        seed: int = 0,
        trim: bool = True,
    ) -> None:
        super().__init__(keep=keep, seed=seed, trim=trim)
        if not (isinstance(alpha, (int, float)) and 0 <= alpha < float("inf")):
            raise ValueError(f"Argument `alpha` must be a finite number >= 0, but got {alpha!r}.")
        if normalization not in ("length", "none", "paper"):
            raise ValueError(
                f"Argument `normalization` must be 'length', 'none' or 'paper', but got {normalization!r}."
            )
        self.alpha = alpha
        self.normalization = normalization
        self.head = head
        self._head: nn.Linear | None = None
        self._prepared = False
        self._head_agrees: bool | None = None
        self._gram: Tensor | None = None
        self._vocab_projection: Tensor | None = None
        self._token_projection: Tensor | None = None
        self._refreshed: int | None = None
        self._memory: SketchMemory | None = None
        self._trend = LengthTrend()
        self._moments: Tensor | None = None
        self._sketches: Tensor | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Install the seam; forget what an earlier fit remembered."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._prepared = False
            self._head = self._head_agrees = None
            self._gram = self._vocab_projection = self._token_projection = None
            self._refreshed = self._memory = self._moments = self._sketches = None
            self._trend = LengthTrend()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the path of the head before anything is trained."""
        if self.head not in ("auto", "none"):
            find_output_head(pl_module, self.head, None)

    def describe(self) -> str:
        """The route of the scores."""
        assert self._route is not None
        way = "without forming logits" if self._head is not None else "from logits"
        return f"scores by {self._route.name}, {way}"

    def score(self, trainer: Trainer, pl_module: LightningModule, batch: Any, sample_ids: Tensor | None) -> Tensor:
        """Scores ``[B]``, fp32 or fp64."""
        if not self._prepared:
            self._prepare(trainer, pl_module, batch)
        self._refresh()
        outputs, targets = self.outputs(trainer, pl_module, batch, self._head)
        with torch.no_grad():
            rows, counts = self._rows(outputs, targets)
            utility = self._utility(rows, counts)
            self._sketches = self._sketch(rows, tokens=outputs.dim() == 3)
            if self._memory is None:
                self._memory = SketchMemory(CAPACITY, self._sketches.size(1), self._sketches.device)
            self._memory.to(self._sketches.device)
            if self.normalization == "length":
                self._moments = self._trend.moments_of(utility, counts)
                utility = self._trend.remove(utility, counts)
                self._sketches = self._sketches / counts.clamp(min=1).sqrt()[:, None]
            diversity = self._memory.mean_distance(self._sketches)
            return utility_diversity(utility, diversity, self.alpha, self.normalization)

    def on_kept(self, trainer: Trainer, rows: Tensor, k: int) -> None:
        """Remember the kept sketches of every rank, in rank order."""
        assert self._sketches is not None
        assert self._memory is not None
        kept = self._sketches.new_full((k, self._sketches.size(1)), torch.nan)  # the memory skips NaN
        kept[: len(rows)] = self._sketches[rows]
        if trainer.world_size > 1:
            kept = trainer.strategy.all_gather(kept).flatten(0, 1)
        self._memory.push(kept)
        if self._moments is not None:
            total = (
                self._moments if trainer.world_size == 1 else trainer.strategy.reduce(self._moments, reduce_op="sum")
            )
            self._trend.update(total)
        self._moments = self._sketches = None

    def _prepare(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """Find the head, and compare the two routes on the longest sample."""
        self._head = head = find_output_head(pl_module, self.head, batch)
        self._prepared = True
        if head is None or self._head_agrees:  # a resumed run keeps the route it was on
            return
        if self._head_agrees is False:
            self._head = None
            return
        self._refresh()
        _, targets = self.outputs(trainer, pl_module, batch, head)
        lengths = targets.reshape(len(targets), -1).ne(IGNORED).sum(1)
        longest = take_rows(batch, lengths.argmax()[None])
        logits, one = self.outputs(trainer, pl_module, longest)
        with torch.no_grad():
            expected = nuclear_norm_of_rows(*self._rows(logits, one))
            hidden_one, _ = self.outputs(trainer, pl_module, longest, head)
            error = (self._utility(*self._rows(hidden_one, one)) / expected - 1).abs().max()
            if trainer.world_size > 1:
                error = trainer.strategy.reduce(error.float(), reduce_op="max")
            self._head_agrees = bool(error < HEAD_TOLERANCE)
            if not self._head_agrees:
                self._head = self._gram = self._vocab_projection = self._refreshed = None

    def _refresh(self) -> None:
        """Bring the products with the head up to date: once, or every 100 batches while it is trained."""
        head = self._head
        due = self._refreshed is None or (
            head is not None and head.weight.requires_grad and self.batches - self._refreshed >= REFRESH_EVERY
        )
        if head is None or not due:
            return
        with torch.no_grad():
            weight, bias = head.weight.detach(), head.bias
            dtype = torch.float64 if weight.device.type == "cpu" else torch.float32
            self._gram = gram_of_head(weight, bias, dtype)
            projection = self._projection_of(weight.size(0), weight.device)
            self._vocab_projection = projection @ weight.float()
            if bias is not None:
                self._vocab_projection = torch.cat(
                    [self._vocab_projection, (projection @ bias.float())[:, None]], dim=1
                )
        if not self._probing:
            self._refreshed = self.batches

    def _projection_of(self, vocabulary: int, device: torch.device) -> Tensor:
        if self.normalization == "paper":
            return cosine_projection(VOCAB_ROWS, vocabulary, self.seed).to(device)
        if vocabulary <= VOCAB_ROWS:
            return torch.eye(vocabulary, device=device)
        return sign_projection(VOCAB_ROWS, vocabulary, self.seed).to(device)

    def _rows(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Scored rows ``[B, n, D]`` in front, a 1 appended where the head has a bias, and their counts ``[B]``."""
        mask = targets.ne(IGNORED)
        if self.normalization == "paper":
            mask = torch.ones_like(mask)
        if outputs.dim() == 2:
            outputs, mask = outputs[:, None], mask[:, None]
        rows, counts = compact(outputs, mask)
        if self._gram is not None and self._gram.size(0) == rows.size(-1) + 1:
            ones = torch.arange(rows.size(1), device=rows.device) < counts[:, None]
            rows = torch.cat([rows, ones[..., None].to(rows.dtype)], dim=-1)
        return rows, counts

    def _utility(self, rows: Tensor, counts: Tensor) -> Tensor:
        if self._head is None:
            return nuclear_norm_of_rows(rows, counts)
        assert self._gram is not None
        self._gram = self._gram.to(rows.device)
        return nuclear_norm_of_hidden_rows(rows, counts, self._gram)

    def _sketch(self, rows: Tensor, tokens: bool) -> Tensor:
        if self._vocab_projection is None:
            self._vocab_projection = self._projection_of(rows.size(-1), rows.device)
        self._vocab_projection = self._vocab_projection.to(rows.device)
        n, height = rows.size(1), TOKEN_ROWS if tokens else 1
        known = self._token_projection
        if self.normalization == "paper":
            if known is None or known.size(1) != n:
                known = cosine_projection(height, n, self.seed + 2)
        elif known is None or known.size(1) < n:
            known = sign_projection(height, max(n, 1024), self.seed + 2)
        self._token_projection = known = known.to(rows.device)
        return sketch(rows, known, self._vocab_projection)

    def state_dict(self) -> dict[str, Any]:
        """The memory, and the products with a head that is trained; equal on every rank."""
        state = super().state_dict()
        state["head_agrees"] = self._head_agrees
        state["length_moments"] = self._trend.moments.clone()
        if self._memory is not None:
            state["memory"] = self._memory.state_dict()
        if self._head is not None and self._head.weight.requires_grad:
            state["head"] = {
                "gram": self._gram,
                "vocab_projection": self._vocab_projection,
                "refreshed": self._refreshed,
            }
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        super().load_state_dict(state_dict)
        self._head_agrees = state_dict["head_agrees"]
        self._trend.moments = state_dict["length_moments"]
        if "memory" in state_dict:
            rows = state_dict["memory"]["rows"]
            self._memory = SketchMemory(rows.size(0) - 1, rows.size(1), rows.device)
            self._memory.load_state_dict(state_dict["memory"])
        if "head" in state_dict:
            self._gram = state_dict["head"]["gram"]
            self._vocab_projection = state_dict["head"]["vocab_projection"]
            self._refreshed = state_dict["head"]["refreshed"]
