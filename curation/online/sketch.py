"""Random projections of a sample's logits, and the memory of the sketches that were kept."""

from typing import Any

import torch
from torch import Tensor

from curation.checks import check_integer


def sign_projection(rows: int, columns: int, seed: int) -> Tensor:
    """A random sign matrix that preserves squared norms in expectation (Achlioptas 2003).

    With explicit matrices a Fourier projection saves nothing, and independent signs need no padding to a fixed
    length: the first columns do not depend on how many follow.

    Args:
        rows: Dimensions after the projection.
        columns: Dimensions before the projection.
        seed: Seed of the signs; equal seeds give equal matrices on every device.

    Returns:
        fp32 ``[rows, columns]`` with entries ``±1/sqrt(rows)``.

    Raises:
        ValueError: If ``rows`` or ``columns`` is not an integer >= 1, or ``seed`` not one >= 0.

    Example:
        >>> sign_projection(4, 6, seed=0).abs().unique()
        tensor([0.5000])
    """
    _check_sizes(rows, columns, seed)
    return _signs(columns, rows, seed).T / rows**0.5


def cosine_projection(rows: int, columns: int, seed: int) -> Tensor:
    """One axis of the paper's sketch, ``sqrt(n/r) S Re FFT D`` as a matrix (arXiv 2510.16882).

    Args:
        rows: Dimensions r after the projection.
        columns: Dimensions n before the projection.
        seed: Seed of the signs D and the rows S.

    Returns:
        fp32 ``[rows, columns]``; rows beyond ``columns`` are zero, so that the size does not depend on it.

    Raises:
        ValueError: If ``rows`` or ``columns`` is not an integer >= 1, or ``seed`` not one >= 0.

    Example:
        >>> cosine_projection(3, 2, seed=0).shape
        torch.Size([3, 2])
    """
    _check_sizes(rows, columns, seed)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(columns, generator=generator)[:rows]
    angle = chosen[:, None] * torch.arange(columns) % columns  # exact integers, so that the cosine stays accurate
    matrix = torch.zeros(rows, columns, dtype=torch.float32)
    matrix[: len(chosen)] = torch.cos(2 * torch.pi / columns * angle.float()) * (columns / rows) ** 0.5
    return matrix * _signs(columns, 1, seed + 1)[:, 0]


def _check_sizes(rows: int, columns: int, seed: int) -> None:
    check_integer("rows", rows, 1)
    check_integer("columns", columns, 1)
    check_integer("seed", seed, 0)


def _signs(n: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (n, width), generator=generator, dtype=torch.int8).float() * 2 - 1


def sketch(outputs: Tensor, token_projection: Tensor, vocab_projection: Tensor) -> Tensor:
    """Project logits on the token axis and the vocabulary axis.

    The vocabulary projection may have been multiplied with the head's weight, so that hidden states give the same
    sketch as logits: ``P (W h) = (P W) h``.

    Args:
        outputs: Floating ``[B, T, V]`` logits, or ``[B, T, d]`` hidden states; masked positions are zero.
        token_projection: fp32 ``[r1, >= T]``.
        vocab_projection: fp32 ``[r2, V]`` or ``[r2, d]``.

    Returns:
        fp32 ``[B, r1 * r2]``.
    """
    projected = outputs.float() @ vocab_projection.T
    return (token_projection[:, : outputs.size(1)] @ projected).flatten(1)


class SketchMemory:
    """The last ``capacity`` sketches that were kept, first in, first out.

    All bookkeeping stays on the device, so that neither a push nor a look-up synchronises with the host.

    Args:
        capacity: Number of sketches in the memory.
        size: Dimensions of a sketch.
        device: Device of the memory.

    Raises:
        ValueError: If ``capacity`` or ``size`` is not an integer >= 1.

    Example:
        >>> memory = SketchMemory(capacity=2, size=1)
        >>> memory.push(torch.tensor([[0.0], [2.0]]))
        >>> memory.mean_distance(torch.tensor([[1.0]]))
        tensor([1.])
    """

    def __init__(self, capacity: int, size: int, device: torch.device | str = "cpu") -> None:
        check_integer("size", size, 1)
        self.capacity = check_integer("capacity", capacity, 1)
        # The extra row takes what must not be remembered, so that a push has a fixed shape.
        self.rows = torch.zeros(capacity + 1, size, dtype=torch.float32, device=device)
        self.pushed = torch.zeros((), dtype=torch.int64, device=device)

    def mean_distance(self, sketches: Tensor) -> Tensor:
        """Mean Euclidean distance to all sketches in the memory; zeros while it is empty.

        Args:
            sketches: fp32 ``[B, size]``.

        Returns:
            fp32 ``[B]``.
        """
        distances = torch.cdist(sketches, self.rows[:-1], compute_mode="donot_use_mm_for_euclid_dist")
        filled = torch.arange(self.capacity, device=self.rows.device) < self.pushed
        return (distances * filled).sum(1) / filled.sum().clamp(min=1)

    def push(self, sketches: Tensor) -> None:
        """Add sketches in order; sketches whose squared norm is not finite are skipped.

        Args:
            sketches: fp32 ``[n, size]``.
        """
        sketches = sketches[-self.capacity :]
        keep = sketches.square().sum(1).isfinite()
        slots = (self.pushed + keep.cumsum(0) - 1) % self.capacity
        self.rows.index_copy_(0, torch.where(keep, slots, self.capacity), sketches)
        self.rows[-1] = 0
        self.pushed += keep.sum()

    def to(self, device: torch.device) -> None:
        """Move the memory to a device."""
        self.rows, self.pushed = self.rows.to(device), self.pushed.to(device)

    def state_dict(self) -> dict[str, Any]:
        """The sketches, and the number that was ever pushed."""
        return {"rows": self.rows.clone(), "pushed": self.pushed.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.rows, self.pushed = state["rows"], state["pushed"]
