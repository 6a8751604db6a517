"""Utility-diversity selection (UDS, arXiv 2510.16882): nuclear norms of logits without an SVD.

The singular values of ``L = H W^T`` are the square roots of the eigenvalues of ``H K H^T`` with ``K = W^T W``, so
the scoring pass needs the head's input ``H`` and one ``[d, d]`` matrix, and never forms the ``[T, V]`` logits.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from curation.online.sketch import SketchMemory, cosine_projection, sign_projection, sketch
from curation.online.top import standardize
from curation.scoring import compact

Normalization = Literal["length", "none", "paper"]
TOKEN_ROWS, VOCAB_ROWS, CAPACITY = 8, 128, 1024


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Products as precise as their dtype: TF32 would bias the norm of long samples by up to 6e-3."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _scored(name: str, outputs: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    if outputs.dim() != 3 or len(outputs) == 0 or not outputs.is_floating_point():
        found = f"{outputs.dtype} {list(outputs.shape)}"
        raise ValueError(f"Argument `{name}` must be floating [B, T, D] with B >= 1, but got {found}.")
    if mask is None:
        counts = torch.full((outputs.size(0),), outputs.size(1), device=outputs.device)
        return outputs, counts
    if mask.shape != outputs.shape[:2] or mask.is_floating_point():
        raise ValueError(
            f"Argument `mask` must be bool {list(outputs.shape[:2])}, but got {mask.dtype} {list(mask.shape)}."
        )
    return compact(outputs, mask.gt(0))


def _nuclear_norms(gram_of: Callable[[Tensor], Tensor], rows: Tensor, counts: Tensor, rank: int) -> Tensor:
    """Nuclear norms ``[B]`` from the Gram matrices of a few samples at a time: one of 512 tokens, several short ones.

    That bounds what is held beside the outputs, and lets the eigenproblems of short samples be small.
    """
    cell = max(1, rows.size(1)) * max(1, rows.size(1), min(rows.size(2), 1024))
    parts = zip(rows.split(max(1, 2**19 // cell)), counts.split(max(1, 2**19 // cell)), strict=True)
    with _full_precision(rows.device):
        return torch.cat(
            [_sum_of_roots(gram_of(part[:, : max(1, int(n.max()))]), n.clamp(max=rank)) for part, n in parts]
        )


def _norms_by_products(rows: Tensor, right: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Nuclear norms ``[B]`` of ``rows @ right``, a few samples at a time, where eigenvalues are slow: on GPUs."""
    size = 2**24 // max(1, rows.size(1) * rows.size(2))
    with _full_precision(rows.device):
        parts = (part.to(dtype) for part in rows.split(max(1, size)))
        return torch.cat([sum_of_singular_values(part if right is None else part @ right) for part in parts])


def sum_of_singular_values(matrices: Tensor) -> Tensor:
    """Nuclear norms by matrix products alone, with no decomposition and no host synchronisation.

    The norm of ``M`` is ``<U, M>`` with ``U`` its orthogonal polar factor, to which Newton-Schulz steps
    ``X <- r (3 X - r^2 X X^T X) / 2`` from ``M / |M|_F`` converge. Each ``r`` makes the smallest singular value grow
    as fast as it can, short of ``r^2 = 2.7``, where the largest would nearly vanish. Singular values below
    ``1e-5 |M|_F`` do not get to 1 and count for less than they are.

    Args:
        matrices: fp32 or fp64 ``[B, n, D]``.

    Returns:
        ``[B]``; NaN where a matrix is not finite.

    Example:
        >>> sum_of_singular_values(torch.diag(torch.tensor([3.0, 4.0]))[None])
        tensor([7.])
    """
    m = matrices if matrices.size(1) <= matrices.size(2) else matrices.mT
    scale = m.abs().amax((1, 2), keepdim=True).clamp(min=torch.finfo(m.dtype).tiny)  # squares stay in range
    m = m / scale
    x = m / torch.linalg.matrix_norm(m, keepdim=True).clamp(min=torch.finfo(m.dtype).tiny)
    low = 1e-5
    while low < 1 - 1e-6:
        near = max(low, 0.1)
        r = (3 / (1 + near + near**2)) ** 0.5
        x = torch.baddbmm(x, x @ x.mT, x, beta=1.5 * r, alpha=-0.5 * r**3)
        low = min(0.5 * r * v * (3 - (r * v) ** 2) for v in (low, 1.0))
    return (x * m).sum((1, 2)) * scale[:, 0, 0]


def _gram(rows: Tensor) -> Tensor:
    """``rows @ rows.mT`` in blocks up to the diagonal; above it is zero, which saves a third of the time."""
    n = rows.size(1)
    gram = rows.new_zeros(len(rows), n, n)
    for start in range(0, n, 128):
        stop = min(n, start + 128)
        gram[:, start:stop, :stop] = rows[:, start:stop] @ rows[:, :stop].mT
    return gram


def _sum_of_roots(gram: Tensor, rank: Tensor) -> Tensor:
    """Sum of the square roots of the ``rank`` largest eigenvalues of each matrix; NaN where it is not finite.

    Only the lower triangle counts. The other eigenvalues are zero in exact arithmetic, but the root of a rounding
    error is far larger than the error.
    """
    n = gram.size(-1)
    finite = gram.diagonal(dim1=-2, dim2=-1).sum(-1).isfinite()
    eigenvalues = torch.linalg.eigvalsh(torch.nan_to_num(gram, nan=0.0, posinf=0.0, neginf=0.0))
    top = torch.arange(n, device=gram.device) >= n - rank[:, None].clamp(max=n)
    return (eigenvalues.clamp(min=0).sqrt() * top).sum(1).masked_fill(~finite, torch.nan)


def nuclear_norm(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Nuclear norm of each sample's logits, through the smaller Gram matrix.

    Args:
        logits: ``[B, T, V]``, any floating dtype; products are taken in fp32 (fp64 for fp64 input).
        mask: bool ``[B, T]``, true where a position is scored; all by default.

    Returns:
        ``[B]``, fp32 or fp64: the sum of the singular values of the scored rows; NaN where they are not finite.
        For T = 1 it is the Euclidean norm.

    Raises:
        ValueError: If the shapes or dtypes do not fit.

    Source: arXiv 2510.16882, the utility term. Cost: ``T^2 V`` multiplications and one ``[T, T]`` eigenproblem.

    Example:
        >>> nuclear_norm(torch.diag(torch.tensor([3.0, 4.0]))[None])
        tensor([7.])
    """
    return _norm_of_logits(*_scored("logits", logits, mask))


def _norm_of_logits(rows: Tensor, counts: Tensor) -> Tensor:
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    if rows.device.type != "cpu":
        return _norms_by_products(rows, None, dtype)

    def gram_of(part: Tensor) -> Tensor:
        part = part.to(dtype)
        part = part if part.size(1) <= part.size(2) else part.mT
        return _gram(part).double()  # as fast, and null eigenvalues are 1e-16 instead of 1e-7

    return _nuclear_norms(gram_of, rows, counts, rank=rows.size(2)).to(dtype)


def nuclear_norm_from_hidden(hidden: Tensor, head_gram: Tensor, mask: Tensor | None = None) -> Tensor:
    """Nuclear norm of ``hidden @ weight.T`` for each sample, without forming it.

    Args:
        hidden: ``[B, T, d]``, the input of the output head, any floating dtype.
        head_gram: fp32 or fp64 ``[d, d]``, ``weight.T @ weight`` from :func:`gram_of_head`; on a CPU its dtype is
            the precision used.
        mask: bool ``[B, T]``, true where a position is scored; all by default.

    Returns:
        ``[B]`` in the dtype of ``head_gram``; NaN where the hidden states are not finite.

    Raises:
        ValueError: If the shapes or dtypes do not fit.

    Source: arXiv 2510.16882, the utility term. Cost: ``T d^2`` multiplications and one eigenproblem of size
    ``min(T, d)``.

    Example:
        >>> hidden, weight = torch.randn(2, 5, 4), torch.randn(9, 4)
        >>> fast = nuclear_norm_from_hidden(hidden, weight.T @ weight)
        >>> torch.allclose(fast, nuclear_norm(hidden @ weight.T), rtol=1e-3)
        True
    """
    d = hidden.size(-1)
    if head_gram.shape != (d, d) or head_gram.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"Argument `head_gram` must be fp32 or fp64 {[d, d]}, but got {head_gram.dtype} {list(head_gram.shape)}."
        )
    return _norm_of_hidden(*_scored("hidden", hidden, mask), head_gram)


def _norm_of_hidden(rows: Tensor, counts: Tensor, head_gram: Tensor, root: Tensor | None = None) -> Tensor:
    if rows.device.type != "cpu":
        root = _root(head_gram) if root is None else root
        return _norms_by_products(rows, root, torch.float32).to(head_gram.dtype)
    d = rows.size(-1)

    def gram_of(part: Tensor) -> Tensor:
        part = part.to(head_gram.dtype)
        if part.size(1) > d:  # with H = Q R, the smaller R K R^T has the same eigenvalues but for zeros
            part = torch.linalg.qr(part, mode="r").R
        return part @ head_gram @ part.mT

    return _nuclear_norms(gram_of, rows, counts, rank=d)


def _root(gram: Tensor) -> Tensor:
    """fp32 ``L`` with ``L L^T`` the Gram matrix, less eigenvalues below 0 by rounding; NaN if it is not finite."""
    finite = gram.isfinite().all()
    there = gram if gram.device.type != "mps" else gram.cpu()  # which has neither fp64 nor eigenvalues
    values, vectors = torch.linalg.eigh(torch.nan_to_num(there.double(), nan=0.0, posinf=0.0, neginf=0.0))
    root = (vectors * values.clamp(min=0).sqrt()).float().to(gram.device)
    return torch.where(finite, root, torch.nan)


def _vocabulary_slices(weight: Tensor, bias: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    for start in range(0, weight.size(0), 8192):
        cut = slice(start, start + 8192)
        yield cut, weight[cut] if bias is None else torch.cat([weight[cut], bias[cut, None]], dim=1)


def gram_of_head(weight: Tensor, bias: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """``weight.T @ weight`` of an output head, accumulated over slices of the vocabulary.

    Args:
        weight: ``[V, d]``.
        bias: ``[V]``; the result is then ``[d + 1, d + 1]``, for hidden states with a 1 appended.
        dtype: Of the products and the result.

    Returns:
        ``[d, d]`` or ``[d + 1, d + 1]``.
    """
    size = weight.size(1) + (bias is not None)
    gram = torch.zeros(size, size, dtype=dtype, device=weight.device)
    with _full_precision(weight.device):
        for _, part in _vocabulary_slices(weight, bias):
            gram.addmm_(part.T.to(dtype), part.to(dtype))
    return gram


def project_head(weight: Tensor, bias: Tensor | None, projection: Tensor) -> Tensor:
    """A projection of the vocabulary, folded into an output head over slices of the vocabulary.

    Args:
        weight: ``[V, d]``.
        bias: ``[V]``, or None.
        projection: fp32 ``[r, V]``, on any device.

    Returns:
        fp32 ``[r, d]``, or ``[r, d + 1]`` with a bias: applied to the head's input it gives projected logits.
    """
    size = weight.size(1) + (bias is not None)
    projected = torch.zeros(projection.size(0), size, dtype=torch.float32, device=weight.device)
    with _full_precision(weight.device):
        for cut, part in _vocabulary_slices(weight, bias):
            projected.addmm_(projection[:, cut].to(weight.device), part.float())
    return projected


class LengthTrend:
    """How the nuclear norm grows with the number of scored tokens: the ``g`` of ``u ~ n^g``.

    A sum of singular values lies between ``sqrt(n)`` and ``n`` times a typical row norm. The raw norm ranks samples
    by length, longest first, and the norm per token ranks them by length too, shortest first; ``u / n^g`` does
    neither. ``g`` depends on the model and the data, so it is the least-squares slope of ``log u`` on ``log n`` over
    the candidate sets seen so far, with a half-life of 69 of them. Each set is centred on its own mean, so that a
    level that moves during training does not enter.
    """

    PRIOR, DECAY = 2 / 3, 0.99

    def __init__(self) -> None:
        self.moments = torch.zeros(2, dtype=torch.float32)

    @staticmethod
    def moments_of(utility: Tensor, counts: Tensor) -> Tensor:
        """What a candidate set adds: the sums of ``x^2`` and ``x y``, for ``log n`` and ``log u`` less their means.

        Args:
            utility: ``[B]``, nuclear norms; those that are zero or not finite are left out.
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
        """Add the sum over all ranks of what :meth:`moments_of` gave."""
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
        utility: ``[B]``, nuclear norms, without their trend (:class:`LengthTrend`) for ``"length"``.
        diversity: ``[B]``, mean distances to the memory.
        alpha: Weight of the diversity.
        normalization: ``"paper"`` adds the raw terms; otherwise both are standardised over the candidate set, so
            that one ``alpha`` means the same for every vocabulary and length.

    Returns:
        ``[B]`` in the dtype of ``utility``.
    """
    diversity = diversity.to(utility.dtype)
    if normalization == "paper":
        return utility + alpha * diversity
    return standardize(utility) + alpha * standardize(diversity)


class UtilityDiversityScorer:
    """Scores of candidate sets, and what they depend on: the head's products, the memory, the trend of lengths.

    Works in any training loop: :meth:`score` a candidate set, train on the best rows, :meth:`remember` them.

    Args:
        alpha: Weight of the diversity.
        normalization: As in :func:`utility_diversity`; ``"paper"`` scores every position.
        seed: Of the random projections.

    Example:
        >>> scorer = UtilityDiversityScorer()
        >>> scores = scorer.score(torch.randn(4, 6, 300), torch.ones(4, 6, dtype=torch.bool))
        >>> scorer.remember(scorer.sketches[scores.topk(1).indices], scorer.moments)
        >>> int(scorer.memory.pushed)
        1
    """

    def __init__(self, alpha: float = 1.0, normalization: Normalization = "length", seed: int = 0) -> None:
        self.alpha = alpha
        self.normalization = normalization
        self.seed = seed
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

        Args:
            outputs: ``[B, T, V]`` or ``[B, C]`` logits, or the head's input ``[B, T, d]`` after :meth:`use_head`.
            mask: bool ``[B, T]`` or ``[B]``, true where a position is scored.

        Returns:
            ``[B]``, fp32 or fp64; NaN for a sample whose outputs are not finite.
        """
        rows, counts = self._rows(outputs, mask)
        utility = self._utility(rows, counts)
        self.sketches = self._sketch(rows, TOKEN_ROWS if outputs.dim() == 3 else 1)
        self.moments = self.trend.moments_of(utility, counts)
        if self.normalization == "length":
            utility = self.trend.remove(utility, counts)
            self.sketches = self.sketches / counts.clamp(min=1).float().sqrt()[:, None]
        if self.memory is None:
            self.memory = SketchMemory(CAPACITY, self.sketches.size(1), self.sketches.device)
        self.memory.to(self.sketches.device)
        diversity = self.memory.mean_distance(self.sketches)
        return utility_diversity(utility, diversity, self.alpha, self.normalization)

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
            return _norm_of_logits(rows, counts)
        self.head_gram = self.head_gram.to(rows.device)
        if rows.device.type == "cpu":
            return _norm_of_hidden(rows, counts, self.head_gram)
        if self._root_of is None or self._root_of[0] is not self.head_gram:
            self._root_of = self.head_gram, _root(self.head_gram)
        return _norm_of_hidden(rows, counts, self.head_gram, self._root_of[1])

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
        with _full_precision(rows.device):
            return sketch(rows, tokens, vocabulary)

    def _projection_of(self, vocabulary: int) -> Tensor:
        known = self._vocab_projection
        if known is None or known.size(1) != vocabulary:
            if self.normalization == "paper":
                known = cosine_projection(VOCAB_ROWS, vocabulary, self.seed)
            elif vocabulary <= VOCAB_ROWS:
                known = torch.eye(vocabulary, dtype=torch.float32)
            else:
                known = sign_projection(VOCAB_ROWS, vocabulary, self.seed)
            self._vocab_projection = known
        return known

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
