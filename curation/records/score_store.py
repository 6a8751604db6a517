"""The last score of every sample, and how often it was seen and kept."""

from typing import ClassVar

import torch
from torch import Tensor

from curation.checks import check_integer
from curation.records.sample_store import SampleStore


class ScoreStore(SampleStore):
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

    columns: ClassVar = {
        "scores": (torch.float32, torch.nan),
        "steps": (torch.int64, -1),
        "seen": (torch.int32, 0),
        "kept": (torch.int32, 0),
    }
    scores: Tensor
    steps: Tensor
    seen: Tensor
    kept: Tensor

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
        if not ids.shape == scores.shape == kept.shape:
            shapes = ", ".join(str(list(values.shape)) for values in (ids, scores, kept))
            raise ValueError(f"Arguments `ids`, `scores` and `kept` must be [B], but got {shapes}.")
        ids = self.places(ids)
        scored = ids.where(~scores.isnan(), len(self))
        rows = self._rows
        rows["scores"].scatter_reduce_(0, scored, scores.to(rows["scores"]), "amax", include_self=False)
        rows["steps"].index_fill_(0, scored, step)
        rows["seen"].index_add_(0, ids, torch.ones_like(ids, dtype=torch.int32))
        rows["kept"].index_add_(0, ids, kept.to(torch.int32))
