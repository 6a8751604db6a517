"""Whether selection pays: is a step that scores many rows and trains on few shorter than one that trains on all?"""

from statistics import median
from typing import Any

PAIRS = 4  # of steps that are compared; the first is warming up
AGAIN_AFTER = 500  # steps
PAYS = 1.05  # less cannot be told from noise in so few steps


class BreakEven:
    """Measures steps that select beside steps that train on every candidate, and says which the next should be.

    With a forward pass of cost 1 and a backward pass of cost b, selection pays where ``1 + (1 + b) keep < 1 + b``.
    Here both sides are measured whole, so that data loading, the optimizer and the price of few rows are in them.
    Four pairs of steps are compared at first, and again after every 500 steps.

    Attributes:
        predicted_speedup: Seconds of a full step over those of a selecting one, medians of the last comparison; None
            before the first.
    """

    def __init__(self) -> None:
        self.predicted_speedup: float | None = None
        self._full: list[float] = []
        self._selecting: list[float] = []
        self._steps = 0  # since the comparison began
        self._full_seconds = 0.0  # of one full step, by the last comparison
        self._seconds_if_full = 0.0  # of the steps since the first comparison, had they been full
        self._seconds = 0.0  # of those steps

    @property
    def compares(self) -> bool:
        """Whether the next step is measured for a comparison; its clock must then wait for the device."""
        return self._steps < 2 * PAIRS

    @property
    def selects(self) -> bool:
        """Whether the next step selects."""
        if self.compares:
            return self._steps % 2 == 0
        return (self.predicted_speedup or 0.0) > PAYS

    @property
    def realised_speedup(self) -> float | None:
        """How many times faster than full steps those since the first comparison were; None before."""
        return self._seconds_if_full / self._seconds if self._seconds > 0 else None

    def add(self, seconds: float) -> bool:
        """Enter how long the step took that :attr:`selects` was asked for.

        Returns:
            Whether a comparison is complete; processes must then agree on :attr:`predicted_speedup`.
        """
        if self.predicted_speedup is not None:
            self._seconds += seconds
            self._seconds_if_full += self._full_seconds
        if self.compares:
            (self._selecting if self.selects else self._full).append(seconds)
        self._steps += 1
        if self._steps == 2 * PAIRS:
            self._full_seconds = median(self._full[1:])
            self.predicted_speedup = self._full_seconds / max(median(self._selecting[1:]), 1e-9)
            return True
        if self._steps == 2 * PAIRS + AGAIN_AFTER:
            self._steps, self._full, self._selecting = 0, [], []
        return False

    def state_dict(self) -> dict[str, Any]:
        """Numbers and lists of numbers."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        vars(self).update(state)
