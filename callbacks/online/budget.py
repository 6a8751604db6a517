"""How many rows of a candidate batch are trained on."""

from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from curation.callbacks.lightning.loop import curated_loader
from curation.checks import check_number
from curation.online.top import keep_count


class Budget:
    """The number of rows ``k`` to keep, fixed by the first batch of a fit.

    It is the same on every rank and in every micro-batch of an accumulation window, so all of them weigh the same.

    Args:
        keep: Fraction of each candidate batch that is trained on, in (0, 1].

    Attributes:
        candidates: Largest number of rows over all ranks in the first batch; None before it.
        k: Rows to keep of every candidate batch; None before the first one.
    """

    def __init__(self, keep: float) -> None:
        self.keep = keep
        self.candidates: int | None = None
        self.k: int | None = None
        self._fixed_for: list[Any] = []
        self._batches = self._rows = self._kept = 0
        self._warned = False

    def rows_to_keep(self, trainer: Trainer, size: int) -> int:
        """Rows to keep of a batch of ``size`` rows; the first call is a collective.

        It is fixed anew after a resume with another ``keep`` or another batch size of the data loader.
        """
        conditions = [self.keep, getattr(curated_loader(trainer), "batch_size", None)]
        if self.k is None or self._fixed_for != conditions:
            largest = torch.tensor(float(size), device=trainer.strategy.root_device)
            self.candidates = int(trainer.strategy.reduce(largest, reduce_op="max"))
            self.k = keep_count(self.keep, self.candidates)
            self._fixed_for = conditions
        if self.keep == 1:
            return size  # also of a batch that is larger than the first
        self._watch(size)
        return self.k

    def _watch(self, size: int) -> None:
        """Warn once where batches of varying size let the kept fraction differ from ``keep``."""
        assert self.k is not None
        assert self.candidates is not None
        self._batches, self._rows, self._kept = self._batches + 1, self._rows + size, self._kept + min(self.k, size)
        off = abs(self._kept / self._rows / (self.k / self.candidates) - 1)
        if self._warned or not (size > self.candidates or (self._batches >= 20 and off > 0.25)):
            return
        self._warned = True
        rank_zero_warn(
            f"`keep={self.keep}` is that of the first batch of {self.candidates} candidates: {self.k} rows of every "
            f"batch, equal for all ranks and micro-batches. Batches vary in size: of the {self._rows} candidates so "
            f"far {self._kept / self._rows:.2f} are kept. Batches of equal size keep what `keep` says."
        )

    def state_dict(self) -> dict[str, Any]:
        """The numbers, and the ``keep`` and batch size that they are fixed for."""
        return {"candidates": self.candidates, "k": self.k, "k_is_for": self._fixed_for}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.candidates, self.k, self._fixed_for = state["candidates"], state["k"], state["k_is_for"]


def checked_keep(keep: float | None, candidate_batches: int) -> float:
    """The argument ``keep`` of a selection, which follows from ``candidate_batches`` where these are several.

    Raises:
        ValueError: If it is out of its range, or another than 1 over ``candidate_batches``.
    """
    if candidate_batches == 1:
        if keep is None:
            raise ValueError(
                "Argument `keep` must be in (0, 1], but got None; it is left out with `candidate_batches`."
            )
        return check_number("keep", keep, "(0, 1]")
    check_number("keep", keep, "(0, 1]", optional=True)
    if keep is not None and abs(keep * candidate_batches - 1) > 1e-6:
        raise ValueError(
            f"Argument `keep` must be None, or 1/{candidate_batches} with `candidate_batches={candidate_batches}`, "
            f"so that as many rows are trained on as a batch of the data loader has, but got {keep!r}."
        )
    return 1 / candidate_batches
