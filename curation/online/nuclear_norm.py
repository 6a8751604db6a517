"""Nuclear norms of logits without an SVD, and without the logits.

The singular values of ``L = H W^T`` are the square roots of the eigenvalues of ``H K H^T`` with ``K = W^T W``, so
the scoring pass needs the head's input ``H`` and one ``[d, d]`` matrix, and never forms the ``[T, V]`` logits.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from curation.scoring import compact


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Products as precise as their dtype: TF32 would bias the norm of long samples by up to 6e-3."""
    with _products("highest"), torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def _products(precision: str) -> Iterator[None]:
    """Products of fp32 matrices in a precision of ``torch.set_float32_matmul_precision``."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _scored(name: str, outputs: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    if outputs.dim() != 3 or len(outputs) == 0 or not outputs.is_floating_point():
        kind = f"{outputs.dtype} {list(outputs.shape)}"
        raise ValueError(f"Argument `{name}` must be floating [B, T, D] with B >= 1, but got {kind}.")
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
    with full_precision(rows.device):
        return torch.cat(
            [_sum_of_roots(gram_of(part[:, : max(1, int(n.max()))]), n.clamp(max=rank)) for part, n in parts]
        )


def _norms_by_products(rows: Tensor, right: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Nuclear norms ``[B]`` of ``rows @ right``, a few samples at a time, where eigenvalues are slow: on GPUs."""
    size = 2**24 // max(1, rows.size(1) * rows.size(2))
    with full_precision(rows.device):
        parts = (part.to(dtype) for part in rows.split(max(1, size)))
        return torch.cat([sum_of_singular_values(part if right is None else part @ right) for part in parts])


def sum_of_singular_values(matrices: Tensor) -> Tensor:
    """Nuclear norms by matrix products alone, with no decomposition and no host synchronisation.

    The norm of ``M`` is ``<U, M>`` with ``U`` its orthogonal polar factor, to which Newton-Schulz steps
    ``X <- r (3 X - r^2 X X^T X) / 2`` from ``M / |M|_F`` converge. Each ``r`` makes the smallest singular value grow
    as fast as it can, short of ``r^2 = 2.7``, where the largest would nearly vanish. Singular values below
    ``1e-5 |M|_F`` do not get to 1 and count for less than they are. A step mends what the one before has rounded, and
    ``<U, M>`` is flat in the rotations of ``U``: so all steps but the last two may use TF32, with errors of 2e-6.

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
    scales = _step_scales()
    for step, r in enumerate(scales):
        with _products("high" if step < len(scales) - 2 else "highest"):
            x = torch.baddbmm(x, x @ x.mT, x, beta=1.5 * r, alpha=-0.5 * r**3)
    return (x * m).sum((1, 2)) * scale[:, 0, 0]


@cache
def _step_scales(low: float = 1e-5) -> list[float]:
    """The ``r`` of the Newton-Schulz steps after which singular values from ``low`` to 1 have become 1."""
    scales = []
    while low < 1 - 1e-6:
        bound = max(low, 0.1)
        r = (3 / (1 + bound + bound**2)) ** 0.5
        low = min(0.5 * r * v * (3 - (r * v) ** 2) for v in (low, 1.0))
        scales.append(r)
    return scales


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
    return norm_of_logits(*_scored("logits", logits, mask))


def norm_of_logits(rows: Tensor, counts: Tensor) -> Tensor:
    """Nuclear norms ``[B]`` of logits whose scored rows come first, as from :func:`~curation.scoring.losses.compact`.

    Args:
        rows: Floating ``[B, n, V]``; rows that are not scored are 0.
        counts: int64 ``[B]``, numbers of scored rows.
    """
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
    return norm_of_hidden(*_scored("hidden", hidden, mask), head_gram)


def norm_of_hidden(rows: Tensor, counts: Tensor, head_gram: Tensor, root: Tensor | None = None) -> Tensor:
    """Nuclear norms ``[B]`` of the logits of hidden states whose scored rows come first.

    Args:
        rows: Floating ``[B, n, d]``, the head's input; rows that are not scored are 0.
        counts: int64 ``[B]``, numbers of scored rows.
        head_gram: fp32 or fp64 ``[d, d]`` from :func:`gram_of_head`.
        root: fp32 ``[d, d]``, the :func:`root_of` ``head_gram``, which is used on GPUs; None to compute it.
    """
    if rows.device.type != "cpu":
        root = root_of(head_gram) if root is None else root
        return _norms_by_products(rows, root, torch.float32).to(head_gram.dtype)
    d = rows.size(-1)

    def gram_of(part: Tensor) -> Tensor:
        part = part.to(head_gram.dtype)
        if part.size(1) > d:  # with H = Q R, the smaller R K R^T has the same eigenvalues but for zeros
            part = torch.linalg.qr(part, mode="r").R
        return part @ head_gram @ part.mT

    return _nuclear_norms(gram_of, rows, counts, rank=d)


def root_of(gram: Tensor) -> Tensor:
    """fp32 ``L`` with ``L L^T`` the Gram matrix, less eigenvalues below 0 by rounding; NaN if it is not finite."""
    finite = gram.isfinite().all()
    local = gram if gram.device.type != "mps" else gram.cpu()  # MPS has neither fp64 nor eigenvalues
    values, vectors = torch.linalg.eigh(torch.nan_to_num(local.double(), nan=0.0, posinf=0.0, neginf=0.0))
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
        dtype: Dtype of the products and the result.

    Returns:
        ``[d, d]`` or ``[d + 1, d + 1]``.
    """
    size = weight.size(1) + (bias is not None)
    gram = torch.zeros(size, size, dtype=dtype, device=weight.device)
    with full_precision(weight.device):
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
    with full_precision(weight.device):
        for cut, part in _vocabulary_slices(weight, bias):
            projected.addmm_(projection[:, cut].to(weight.device), part.float())
    return projected
