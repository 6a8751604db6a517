"""The counts of experts in an accumulation window: the micro-batches between two steps of the optimizer."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curation.experts.load_balancing import expert_fractions


@dataclass
class Window:
    r"""The counts of experts in an accumulation window.

    A micro-batch is balanced by the fractions of the window so far (the buffer of arXiv 2501.11873). With ``warm``,
    an estimate stands for the micro-batches to come. With the counts ``s`` after ``a`` of ``A`` micro-batches and the
    average micro-batch ``m`` of earlier windows, each of which counts half as much as the next, every micro-batch to
    come is taken for

    .. math:: m + \frac{a m - s}{2 A}

    This lies between ``m``, which is right if micro-batches are drawn independently, and ``(A m - s) / (A - a)``,
    which is right if every window has the same micro-batches in another order.

    Attributes:
        warm: Whether earlier windows stand for the micro-batches to come.
        counts: int64 ``[L, E + 1]``: choices of each expert, and tokens last; None before the first micro-batch.
        size: Number of micro-batches so far.
        average: fp32 ``[L, E + 1]``, the average micro-batch of earlier windows; None in the first window.
        closed: Whether the optimizer has stepped, so that the next micro-batch begins another window.

    Example:
        >>> window = Window()
        >>> window.add(torch.tensor([[3, 1, 4]]), length=2)
        tensor([[0.7500, 0.2500]])
        >>> window.add(torch.tensor([[0, 4, 4]]), length=2)
        tensor([[0.3750, 0.6250]])
    """

    warm: bool = False
    counts: Tensor | None = None
    size: int = 0
    average: Tensor | None = None
    closed: bool = True

    def expected_size(self, length: int, remaining: float) -> int:
        """Number of micro-batches that the window has in the end, the next one included.

        Args:
            length: Micro-batches of a full window.
            remaining: Micro-batches of the epoch after the next one; may be infinite.
        """
        return int(min(length, (0 if self.closed else self.size) + 1 + remaining))

    def add(self, counts: Tensor, length: int) -> Tensor:
        """Enter a micro-batch.

        Args:
            counts: int64 ``[L, E + 1]``: choices of each expert, and tokens last.
            length: Number ``A`` of micro-batches that the window is expected to have.

        Returns:
            fp32 ``[L, E]``, the fractions by which the micro-batch is balanced.
        """
        if self.closed:
            if self.counts is not None:
                mean = self.counts / self.size
                self.average = mean if self.average is None else (self.average + mean) / 2
            self.counts, self.size, self.closed = None, 0, False
        self.counts = counts if self.counts is None else self.counts + counts
        self.size += 1
        remaining = length - self.size
        if not self.warm or self.average is None or remaining <= 0:
            return self.fractions()
        each = self.average + (self.size * self.average - self.counts) / (2 * length)
        return expert_fractions((self.counts + remaining * each)[:, :-1])

    def fractions(self) -> Tensor:
        """Fractions of the choices in the window so far: fp32 ``[L, E]``."""
        assert self.counts is not None
        return expert_fractions(self.counts[:, :-1])

    def tokens(self) -> Tensor:
        """Tokens in the window so far: int64 ``[L]``."""
        assert self.counts is not None
        return self.counts[:, -1]

    def state_dict(self) -> dict[str, Any]:
        """Everything but ``warm``, on the CPU."""
        tensors = {"counts": self.counts, "average": self.average}
        return {name: None if t is None else t.cpu() for name, t in tensors.items()} | {
            "size": self.size,
            "closed": self.closed,
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Take over a state from :meth:`state_dict`."""
        self.counts, self.average = (None if t is None else t.to(device) for t in (state["counts"], state["average"]))
        self.size, self.closed = state["size"], state["closed"]
