"""The last score of every sample, and how often it was seen and kept."""

from typing import Any

import torch
from torch import Tensor

from curation.checks import check_integer


class ScoreStore:
    """A preallocated record of every sample, indexed by its id; 20 bytes a sample.

    A score is as old as ``step - steps[id]``: it was made by the model of the step at which the sample was last a
    candidate. Nothing here synchronises with the host, and equal updates on every rank give equal records.

    Args:
        size: Number of samples; ids are in [0, size).
        device: Device of the record.

    Attributes:
        scores: fp32 ``[N]``, the last score; NaN before the first.
        steps: int64 ``[N]``, the step of the last score; -1 before the first.
        seen: int32 ``[N]``, how often the sample was a candidate.
        kept: int32 ``[N]``, how often it was trained on.

    Raises:
        ValueError: If ``size`` is no positive integer.

    Example:
        >>> store = ScoreStore(3)
        >>> store.update(torch.tensor([0, 2]), torch.tensor([1.5, 0.5]), torch.tensor([1, 0]), step=7)
        >>> store.scores, store.kept
        (tensor([1.5000,    nan, 0.5000]), tensor([1, 0, 0], dtype=torch.int32))
    """

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        check_integer("size", size, 1)
        # One row more than samples, for the rows that have no id.
        self._scores = torch.full((size + 1,), torch.nan, device=device)
        self._steps = torch.full((size + 1,), -1, device=device)
        self._seen = torch.zeros(size + 1, dtype=torch.int32, device=device)
        self._kept = torch.zeros(size + 1, dtype=torch.int32, device=device)
        self.scores, self.steps = self._scores[:-1], self._steps[:-1]
        self.seen, self.kept = self._seen[:-1], self._kept[:-1]

    def __len__(self) -> int:
        return len(self.scores)

    def update(self, ids: Tensor, scores: Tensor, kept: Tensor, step: int) -> None:
        """Add a candidate batch. If an id occurs twice the larger score is stored.

        Args:
            ids: int64 ``[B]`` in [0, N); rows with the id -1 are left out.
            scores: Floating ``[B]``; NaN for a row without a new score, whose last score then stays.
            kept: Integers ``[B]``, how often each row was trained on in this step.
            step: The step at which the scores were made.

        Raises:
            TypeError: If the ids are not int64.
            ValueError: If the arguments differ in length, an id is not in [-1, N) (checked on a CPU only), or
                ``step`` is not an integer >= 0.
        """
        check_integer("step", step, 0)
        if ids.dtype != torch.int64:
            raise TypeError(f"Argument `ids` must be int64, but got {ids.dtype}.")
        if not (ids.dim() == 1 and ids.shape == scores.shape == kept.shape):
            shapes = ", ".join(str(list(values.shape)) for values in (ids, scores, kept))
            raise ValueError(f"Arguments `ids`, `scores` and `kept` must be [B], but got {shapes}.")
        if ids.device.type == "cpu" and len(ids):  # elsewhere it would wait for the device
            wrong = ids[(ids < -1) | (ids >= len(self))].tolist()
            if wrong:
                raise ValueError(f"A sample id is {wrong[0]}, but the record is of {len(self)} samples.")
        ids = ids.where(ids >= 0, len(self))
        scored = ids.where(~scores.isnan(), len(self))
        self._scores.scatter_reduce_(0, scored, scores.to(self._scores), "amax", include_self=False)
        self._steps.index_fill_(0, scored, step)
        self._seen.index_add_(0, ids, torch.ones_like(ids, dtype=torch.int32))
        self._kept.index_add_(0, ids, kept.to(torch.int32))

    def state_dict(self) -> dict[str, Any]:
        """The record."""
        return {name: getattr(self, name) for name in ("scores", "steps", "seen", "kept")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`.

        Raises:
            ValueError: If the state has another number of samples.
        """
        if len(state["scores"]) != len(self):
            raise ValueError(f"The record in the checkpoint is of {len(state['scores'])} samples, not {len(self)}.")
        for name, value in state.items():
            getattr(self, name).copy_(value)
