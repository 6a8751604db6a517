"""Utility-diversity selection (UDS, arXiv 2510.16882): the nuclear norm of a sample's logits, and novelty."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from curation.checks import check_choice, check_number, check_seed
from curation.online.nuclear_norm import (
    full_precision,
    gram_of_head,
    norm_of_hidden,
    norm_of_logits,
    project_head,
    root_of,
)
from curation.online.sketch import SketchMemory, cosine_projection, sign_projection, sketch
from curation.online.top import standardize
from curation.scoring import compact

Normalization = Literal["length", "none", "paper"]
NORMALIZATIONS = ("length", "none", "paper")
TOKEN_ROWS, VOCAB_ROWS, CAPACITY = 8, 128, 1024


class LengthTrend:
    """How the nuclear norm grows with the number of scored tokens: the ``g`` of ``u ~ n^g``.

    A sum of singular values lies between ``sqrt(n)`` and ``n`` times a typical row norm. The raw norm ranks samples
    by length, longest first, and the norm per token ranks them by length too, shortest first; ``u / n^g`` does
    neither. ``g`` depends on the model and the data, so it is the least-squares slope of ``log u`` on ``log n`` over
    the candidate sets seen so far, with a half-life of 69 sets. Each set is centred on its mean, so that a level
    that moves during training has no effect.

    Example:
        >>> trend, counts = LengthTrend(), torch.tensor([1, 4, 9])
        >>> trend.update(trend.moments_of(counts.float() ** (2 / 3), counts))
        >>> trend.remove(counts.float() ** (2 / 3), counts).round(decimals=3)
        tensor([1., 1., 1.])
    """

    PRIOR, DECAY = 2 / 3, 0.99

    def __init__(self) -> None:
        self.moments = torch.zeros(2, dtype=torch.float32)

    @staticmethod
    def moments_of(utility: Tensor, counts: Tensor) -> Tensor:
        """Sums of ``x^2`` and ``x y`` over a candidate set, with ``x = log n`` and ``y = log u`` less their means.

        Args:
            utility: Floating ``[B]``, nuclear norms; norms that are zero or not finite are left out.
            counts: int64 ``[B]``, scored tokens.

        Returns:
            fp32 ``[2]``.
        """
        valid = utility.isfinite() & utility.gt(0)
        x = counts.clamp(min=1).float().log()
        y = torch.where(valid, utility, torch.ones_like(utility)).log().float()
        x, y = ((v - (v * valid).sum() / valid.sum().clamp(min=1)) * valid for v in (x, y))
        return torch.stack([x @ x, x @ y])

    def update(self, moments: Tensor) -> None:
        """Add the moments fp32 ``[2]`` of a candidate set from :meth:`moments_of`, summed over all ranks."""
        self.moments = self.DECAY * self.moments.to(moments.device) + moments

    def remove(self, utility: Tensor, counts: Tensor) -> Tensor:
        """``u / n^g``, ``[B]``; ``g`` starts at 2/3, which weighs as much as one unit of ``x^2``."""
        self.moments = self.moments.to(utility.device)
        slope = (self.moments[1] + self.PRIOR) / (self.moments[0] + 1)
        return utility / counts.clamp(min=1).to(utility.dtype) ** slope


def utility_diversity(
    utility: Tensor, diversity: Tensor, alpha: float, normalization: Normalization = "length"
) -> Tensor:
    """Scores ``u + alpha d`` of a candidate set (arXiv 2510.16882).

    Args:
        utility: Floating ``[B]``, nuclear norms, without their trend (:class:`LengthTrend`) for ``"length"``.
        diversity: Floating ``[B]``, mean distances to the memory.
        alpha: Weight of the diversity, in [0, inf).
        normalization: ``"paper"`` adds the raw terms; otherwise both are standardised over the candidate set, so
            that one ``alpha`` means the same for every vocabulary and length.

    Returns:
        ``[B]`` in the dtype of ``utility``.

    Raises:
        ValueError: If ``alpha`` or ``normalization`` is something else.

    Example:
        >>> utility_diversity(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0]), alpha=1.0)
        tensor([-1.,  1.])
    """
    check_number("alpha", alpha, "[0, inf)")
    check_choice("normalization", normalization, NORMALIZATIONS)
    diversity = diversity.to(utility.dtype)
    if normalization == "paper":
        return utility + alpha * diversity
    return standardize(utility) + alpha * standardize(diversity)


class Measured(NamedTuple):
    """What the score of each sample of a part of the candidates is made of.

    Attributes:
        utility: ``[B]``, fp32 or fp64, nuclear norms.
        counts: int64 ``[B]``, scored positions.
        sketches: fp32 ``[B, r]``.
        labelled: bool ``[B]``, whether a position is scored.
    """

    utility: Tensor
    counts: Tensor
    sketches: Tensor
    labelled: Tensor


class UtilityDiversityScorer:
    """Scores of candidate sets, with their state: the head's products, the memory, the trend of lengths.

    Works in any training loop: :meth:`score` a candidate set, train on the best rows, :meth:`remember` them.

    Args:
        alpha: Weight of the diversity, in [0, inf).
        normalization: As in :func:`utility_diversity`; ``"paper"`` scores every position.
        seed: Seed of the random projections, in [0, 2^63); equal on all ranks.

    Raises:
        ValueError: If an argument has the wrong type or is out of its range.

    Example:
        >>> scorer = UtilityDiversityScorer()
        >>> scores = scorer.score(torch.randn(4, 6, 300), torch.ones(4, 6, dtype=torch.bool))
        >>> scorer.remember(scorer.sketches[scores.topk(1).indices], scorer.moments)
        >>> int(scorer.memory.pushed)
        1
    """

    def __init__(self, alpha: float = 1.0, normalization: Normalization = "length", seed: int = 0) -> None:
        self.alpha: float = check_number("alpha", alpha, "[0, inf)")
        check_choice("normalization", normalization, NORMALIZATIONS)
        self.normalization = normalization
        self.seed: int = check_seed(seed)
        self.memory: SketchMemory | None = None
        self.trend = LengthTrend()
        self.sketches = torch.zeros(0)
        self.moments = torch.zeros(2, dtype=torch.float32)
        self.head_gram: Tensor | None = None
        self._root_of: tuple[Tensor, Tensor] | None = None  # a product with the head, and its root, on a GPU
        self._head_is_trained = False
        self._projected_head: Tensor | None = None
        self._vocab_projection: Tensor | None = None
        self._token_projection: Tensor | None = None

    def use_head(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """From now on, outputs are the input of this head ``[V, d]`` as it is now, not logits."""
        self._head_is_trained = weight.requires_grad
        weight, bias = weight.detach(), None if bias is None else bias.detach()
        self.head_gram = gram_of_head(weight, bias, torch.float32 if weight.device.type == "mps" else torch.float64)
        self._projected_head = project_head(weight, bias, self._projection_of(weight.size(0)))

    def use_logits(self) -> None:
        """From now on, outputs are logits."""
        self.head_gram = self._projected_head = None

    def utility(self, outputs: Tensor, mask: Tensor) -> Tensor:
        """Nuclear norms ``[B]`` of outputs as in :meth:`score`."""
        return self._utility(*self._rows(outputs, mask))

    def score(self, outputs: Tensor, mask: Tensor) -> Tensor:
        """Scores of a candidate set; :attr:`sketches` and :attr:`moments` then hold what :meth:`remember` takes.

        A set whose outputs do not fit into memory at once takes :meth:`measure` of its parts, then
        :meth:`score_measured`.

        Args:
            outputs: ``[B, T, V]`` or ``[B, C]`` logits, or the head's input ``[B, T, d]`` after :meth:`use_head`.
            mask: bool ``[B, T]`` or ``[B]``, true where a position is scored.

        Returns:
            ``[B]``, fp32 or fp64; NaN for a sample whose outputs are not finite, and with ``"paper"``, which scores
            every position, for one whose mask is false everywhere.
        """
        return self.score_measured(self.measure(outputs, mask))

    def measure(self, outputs: Tensor, mask: Tensor) -> Measured:
        """What the score of each sample is made of; arguments as of :meth:`score`, of a part of the candidates."""
        labelled = mask if mask.dim() == 1 else mask.any(1)
        if outputs.dim() == 3 and outputs.size(1) == 0:  # no position at all is none that is scored
            outputs, mask = outputs.new_zeros(len(outputs), 1, outputs.size(2)), mask.new_zeros(len(mask), 1)
        rows, counts = self._rows(outputs, mask)
        sketches = self._sketch(rows, TOKEN_ROWS if outputs.dim() == 3 else 1)
        return Measured(self._utility(rows, counts), counts, sketches, labelled)

    def score_measured(self, measured: Measured) -> Tensor:
        """Scores of a candidate set, as :meth:`score`, from what :meth:`measure` gave of its parts, joined."""
        utility, counts, self.sketches, labelled = measured
        self.moments = self.trend.moments_of(utility, counts)
        if self.normalization == "length":
            utility = self.trend.remove(utility, counts)
            self.sketches = self.sketches / counts.clamp(min=1).float().sqrt()[:, None]
        if self.memory is None:
            self.memory = SketchMemory(CAPACITY, self.sketches.size(1), self.sketches.device)
        self.memory.to(self.sketches.device)
        diversity = self.memory.mean_distance(self.sketches)
        scores = utility_diversity(utility, diversity, self.alpha, self.normalization)
        return scores.masked_fill(~labelled, torch.nan) if self.normalization == "paper" else scores

    def remember(self, sketches: Tensor, moments: Tensor) -> None:
        """Remember what was kept.

        Args:
            sketches: fp32 ``[k, r]``, rows of :attr:`sketches` of all ranks; rows that are not finite are skipped.
            moments: fp32 ``[2]``, the sum of :attr:`moments` over all ranks.
        """
        assert self.memory is not None
        self.memory.push(sketches)
        self.trend.update(moments)

    def _rows(self, outputs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Scored rows ``[B, n, D]`` in front, a 1 appended where the head has a bias, and their counts ``[B]``."""
        if self.normalization == "paper":
            mask = torch.ones_like(mask)
        if outputs.dim() == 2:
            outputs, mask = outputs[:, None], mask[:, None]
        rows, counts = compact(outputs, mask)
        if self.head_gram is not None and self.head_gram.size(0) == rows.size(-1) + 1:
            ones = torch.arange(rows.size(1), device=rows.device) < counts[:, None]
            rows = torch.cat([rows, ones[..., None].to(rows.dtype)], dim=-1)
        return rows, counts

    def _utility(self, rows: Tensor, counts: Tensor) -> Tensor:
        if self.head_gram is None:
            return norm_of_logits(rows, counts)
        self.head_gram = self.head_gram.to(rows.device)
        if rows.device.type == "cpu":
            return norm_of_hidden(rows, counts, self.head_gram)
        if self._root_of is None or self._root_of[0] is not self.head_gram:
            self._root_of = self.head_gram, root_of(self.head_gram)
        return norm_of_hidden(rows, counts, self.head_gram, self._root_of[1])

    def _sketch(self, rows: Tensor, height: int) -> Tensor:
        n = rows.size(1)
        tokens = self._token_projection
        if self.normalization == "paper":
            if tokens is None or tokens.size(1) != n:
                tokens = cosine_projection(height, n, self.seed + 2)
        elif tokens is None or tokens.size(1) < n:
            tokens = sign_projection(height, max(n, 1024), self.seed + 2)
        self._token_projection = tokens = tokens.to(rows.device)
        if self.head_gram is None:
            self._vocab_projection = vocabulary = self._projection_of(rows.size(-1)).to(rows.device)
        else:
            assert self._projected_head is not None
            self._projected_head = vocabulary = self._projected_head.to(rows.device)
        with full_precision(rows.device):
            return sketch(rows, tokens, vocabulary)

    def _projection_of(self, vocabulary: int) -> Tensor:
        projection = self._vocab_projection
        if projection is None or projection.size(1) != vocabulary:
            if self.normalization == "paper":
                projection = cosine_projection(VOCAB_ROWS, vocabulary, self.seed)
            elif vocabulary <= VOCAB_ROWS:
                projection = torch.eye(vocabulary, dtype=torch.float32)
            else:
                projection = sign_projection(VOCAB_ROWS, vocabulary, self.seed)
            self._vocab_projection = projection
        return projection

    def state_dict(self) -> dict[str, Any]:
        """The memory, the trend, and the products of a head that is trained; all else follows from the arguments."""
        return {
            "seed": self.seed,
            "normalization": self.normalization,
            "memory": None if self.memory is None else self.memory.state_dict(),
            "length_moments": self.trend.moments.clone(),
            "head_gram": self.head_gram if self._head_is_trained else None,
            "projected_head": self._projected_head if self._head_is_trained else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`.

        Raises:
            ValueError: If the remembered sketches were made with another seed or normalization.
        """
        for name in ("seed", "normalization"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"Argument `{name}` must be {state[name]!r}, as for the sketches in the checkpoint, but got "
                    f"{getattr(self, name)!r}."
                )
        if state["memory"] is not None:
            rows = state["memory"]["rows"]
            self.memory = SketchMemory(rows.size(0) - 1, rows.size(1), rows.device)
            self.memory.load_state_dict(state["memory"])
        self.trend.moments = state["length_moments"]
        self.head_gram, self._projected_head = state["head_gram"], state["projected_head"]
