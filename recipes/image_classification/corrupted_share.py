"""How much of what is trained on has a wrong label."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from curation.callbacks.lightning.fit_callback import FitCallback
from curation.callbacks.lightning.loop import logs_now
from curation.callbacks.online.choice import Choice, SelectionListener


class CorruptedShare(FitCallback, SelectionListener):
    """Logs the share of wrong labels so far, ``curation/kept_corrupted`` and ``curation/all_corrupted``.

    The first is the share among the kept samples, the second that among all candidates. The data module says which
    labels are wrong, in its attribute ``corrupted``, bool ``[N]`` by sample id.

    Example:
        >>> CorruptedShare().state_dict()
        {'sums': None}
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # fp64 [4]: wrong and all labels of the kept samples, and of the candidates
        self._corrupted: Tensor | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier fit."""
        super().setup(trainer, pl_module, stage)
        if self.fitting:
            self._sums = self._corrupted = None

    def on_selection(self, trainer: Trainer, pl_module: LightningModule, step: int, choice: Choice) -> None:
        """Count."""
        assert choice.sample_ids is not None
        if self._corrupted is None:
            corrupted = trainer.datamodule.corrupted  # type: ignore[attr-defined]
            self._corrupted = corrupted.to(choice.sample_ids.device)
        candidates = self._corrupted[choice.sample_ids].double()
        kept = candidates if choice.rows is None else candidates[choice.rows]
        counts = [count for wrong in (kept, candidates) for count in (wrong.sum(), wrong.new_tensor(len(wrong)))]
        sums = torch.stack(counts)
        self._sums = sums if self._sums is None else self._sums + sums
        if logs_now(trainer):
            for name, (wrong, size) in zip(("kept", "all"), self._sums.view(2, 2), strict=True):
                pl_module.log(f"curation/{name}_corrupted", wrong / size, on_step=True, on_epoch=False, batch_size=1)

    def state_dict(self) -> dict[str, Any]:
        """The counts of this rank."""
        return {"sums": self._sums}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on counting."""
        self._sums = state["sums"]
