"""The time of training, and whether a step that selects is faster than one that trains on every candidate."""

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from curation.callbacks.lightning.loop import is_accumulating, wait_for
from curation.online.break_even import BreakEven


class StepTimer:
    """Measures training time without validation, and for ``when="pays"`` compares optimizer steps.

    Args:
        name: Name of the selection, for the log line of a comparison.
        compares: Whether steps that select are compared with steps that train on every candidate.

    Attributes:
        train_seconds: Seconds of training so far, over all fits that were resumed.
        break_even: The comparison; None where nothing is compared.
    """

    def __init__(self, name: str, compares: bool) -> None:
        self.train_seconds = 0.0
        self.break_even = BreakEven() if compares else None
        self._name = name
        self._batch_end = 0.0
        self._step_end = 0.0

    @property
    def selects(self) -> bool:
        """Whether the next step selects rows; otherwise it trains on every candidate."""
        return self.break_even is None or self.break_even.selects

    def start(self) -> None:
        """Start the clocks: at the start of training, and after an evaluation, which is no training time."""
        self._batch_end = self._step_end = time.perf_counter()

    def end_batch(self) -> None:
        """Add the time since the last batch."""
        now = time.perf_counter()
        self.train_seconds += now - self._batch_end
        self._batch_end = now

    def end_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Enter the time of an optimizer step, whose micro-batches all select or all train on every candidate.

        A collective where a comparison is complete: all ranks take the speed-up that rank 0 measured.
        """
        if self.break_even is None or is_accumulating(trainer):
            return
        if self.break_even.compares:
            wait_for(pl_module.device)
        now = time.perf_counter()
        seconds, self._step_end = now - self._step_end, now
        if self.break_even.add(seconds):
            speedup = float(trainer.strategy.broadcast(self.break_even.predicted_speedup))  # type: ignore[arg-type]
            self.break_even.predicted_speedup = speedup
            decision = "selecting" if self.break_even.selects else "training on every candidate until it pays"
            rank_zero_info(f"{self._name}: a step that selects is {speedup:.2f} times as fast; {decision}.")

    def statistics(self) -> dict[str, float]:
        """Seconds of training, and the speed-ups that are known."""
        statistics = {"train_seconds": self.train_seconds}
        for name in ("predicted_speedup", "realised_speedup"):
            speedup = getattr(self.break_even, name, None)
            if speedup is not None:
                statistics[name] = speedup
        return statistics

    def state_dict(self) -> dict[str, Any]:
        """Seconds of training, and the comparison."""
        break_even = None if self.break_even is None else self.break_even.state_dict()
        return {"train_seconds": self.train_seconds, "break_even": break_even}

    def load_state_dict(self, state: dict[str, Any], same_keep: bool) -> None:
        """Restore :meth:`state_dict`; the comparison only where ``keep`` is what it was made with."""
        self.train_seconds = state["train_seconds"]
        if self.break_even is not None and state["break_even"] is not None and same_keep:
            self.break_even.load_state_dict(state["break_even"])
