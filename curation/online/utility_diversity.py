"""Utility-diversity selection (UDS, arXiv 2510.16882): nuclear norms of logits without an SVD.

The singular values of ``L = H W^T`` are the square roots of the eigenvalues of ``H K H^T`` with ``K = W^T W``, so
the scoring pass needs the head's input ``H`` and one ``[d, d]`` matrix, and never forms the ``[T, V]`` logits.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from curation.online.top import standardize

Normalization = Literal["length", "none", "paper"]


def compact(outputs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move the scored positions of each sample to the front and cut to the longest; the rest is zero.

    Padding and prompts then cost nothing and change nothing. Costs one host synchronisation.

    Args:
        outputs: ``[B, T, D]``.
        mask: bool ``[B, T]``, true where a position is scored.

    Returns:
        ``[B, n, D]`` and the numbers of scored positions, int64 ``[B]``; ``n`` is their maximum, at least 1.
    """
    counts = mask.sum(1)
    n = max(1, int(counts.max()))
    order = mask.int().argsort(dim=1, descending=True, stable=True)[:, :n]
    front = outputs.gather(1, order[..., None].expand(-1, -1, outputs.size(-1)))
    return front.masked_fill(~mask.gather(1, order)[..., None], 0), counts


def _scored(outputs: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    if outputs.dim() != 3:
        raise ValueError(f"Argument `logits` or `hidden` must be [B, T, D], but got {list(outputs.shape)}.")
    if mask is None:
        counts = torch.full((outputs.size(0),), outputs.size(1), device=outputs.device)
        return outputs, counts
    if mask.shape != outputs.shape[:2]:
        raise ValueError(f"Argument `mask` must be {list(outputs.shape[:2])}, but got {list(mask.shape)}.")
    return compact(outputs, mask.bool())


def _by_parts(norm: Callable[[Tensor, Tensor], Tensor], rows: Tensor, counts: Tensor) -> Tensor:
    """Apply ``norm`` to a few samples at a time: one of 512 tokens, several short ones.

    That bounds what is held beside the outputs, and lets the eigenproblems of short samples be small.
    """
    size = max(1, 2**19 // (rows.size(1) * max(rows.size(1), min(rows.size(2), 1024))))
    parts = []
    for part, count in zip(rows.split(size), counts.split(size), strict=True):
        if part.device.type == "cpu":  # elsewhere the width would cost a synchronisation
            part = part[:, : max(1, int(count.max()))]
        parts.append(norm(part, count))
    return torch.cat(parts)


def _sum_of_roots(gram: Tensor, rank: Tensor) -> Tensor:
    """Sum of the square roots of the ``rank`` largest eigenvalues of each matrix; NaN where it is not finite.

    The other eigenvalues are zero in exact arithmetic, but the root of a rounding error is far larger than the error.
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
        ValueError: If the shapes do not fit.

    Source: arXiv 2510.16882, the utility term. Cost: ``T^2 V`` multiplications and one ``[T, T]`` eigenproblem.

    Example:
        >>> nuclear_norm(torch.diag(torch.tensor([3.0, 4.0]))[None])
        tensor([7.])
    """
    return nuclear_norm_of_rows(*_scored(logits, mask))


def nuclear_norm_of_rows(rows: Tensor, counts: Tensor) -> Tensor:
    """:func:`nuclear_norm` of what :func:`compact` returns."""
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32

    def norm(part: Tensor, count: Tensor) -> Tensor:
        part = part.to(dtype)
        _, n, v = part.shape
        gram = part @ part.mT if n <= v else part.mT @ part
        if gram.device.type == "cpu":  # as fast there, and null eigenvalues are 1e-16 instead of 1e-7
            gram = gram.double()
        return _sum_of_roots(gram, count.clamp(max=v)).to(dtype)

    return _by_parts(norm, rows, counts)


def nuclear_norm_from_hidden(hidden: Tensor, head_gram: Tensor, mask: Tensor | None = None) -> Tensor:
    """Nuclear norm of ``hidden @ weight.T`` for each sample, without forming it.

    Args:
        hidden: ``[B, T, d]``, the input of the output head, any floating dtype.
        head_gram: ``[d, d]``, ``weight.T @ weight`` from :func:`gram_of_head`; its dtype is the precision used.
        mask: bool ``[B, T]``, true where a position is scored; all by default.

    Returns:
        ``[B]`` in the dtype of ``head_gram``; NaN where the hidden states are not finite.

    Raises:
        ValueError: If the shapes do not fit.

    Source: arXiv 2510.16882, the utility term. Cost: ``T d^2`` multiplications and one eigenproblem of size
    ``min(T, d)``.

    Example:
        >>> hidden, weight = torch.randn(2, 5, 4), torch.randn(9, 4)
        >>> fast = nuclear_norm_from_hidden(hidden, weight.T @ weight)
        >>> torch.allclose(fast, nuclear_norm(hidden @ weight.T), rtol=1e-3)
        True
    """
    return nuclear_norm_of_hidden_rows(*_scored(hidden, mask), head_gram)


def nuclear_norm_of_hidden_rows(rows: Tensor, counts: Tensor, head_gram: Tensor) -> Tensor:
    """:func:`nuclear_norm_from_hidden` of what :func:`compact` returns."""
    d = rows.size(-1)
    if head_gram.shape != (d, d):
        raise ValueError(f"Argument `head_gram` must be {[d, d]}, but got {list(head_gram.shape)}.")
    factor = _cholesky(head_gram) if rows.size(1) > d else None

    def norm(part: Tensor, count: Tensor) -> Tensor:
        part = part.to(head_gram.dtype)
        if part.size(1) <= d or factor is None:
            gram = part @ head_gram @ part.mT
        else:  # the smaller eigenproblem: for K = R R^T, H K H^T and R^T H^T H R share their non-zero eigenvalues
            narrow = part @ factor
            gram = narrow.mT @ narrow
        return _sum_of_roots(gram, count.clamp(max=d))

    return _by_parts(norm, rows, counts)


def _cholesky(gram: Tensor) -> Tensor:
    """``R`` with ``R R^T = gram``, taken in fp64, with a jitter that gives a gram of low rank a factor too."""
    exact = gram if gram.device.type == "mps" else gram.double()
    jitter = torch.finfo(exact.dtype).eps * 8 * exact.diagonal().mean()
    return torch.linalg.cholesky_ex(exact + jitter * torch.eye(len(exact), device=exact.device)).L.to(gram.dtype)


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
    for start in range(0, weight.size(0), 8192):
        part = weight[start : start + 8192]
        if bias is not None:
            part = torch.cat([part, bias[start : start + 8192, None]], dim=1)
        part = part.to(dtype)
        gram.addmm_(part.T, part)
    return gram


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
        self.moments = torch.zeros(2)

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
        x = counts.clamp(min=1).log()
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
