"""Break-even: whether a step that scores many rows and trains on few is shorter than a step that trains on all."""

from statistics import median
from typing import Any

from curation.checks import check_number

PAIRS = 4  # pairs of steps in a comparison; the first is a warm-up
AGAIN_AFTER = 500  # steps until the next comparison
PAYS = 1.05  # the least speedup that pays; in so few steps a smaller one is noise


class BreakEven:
    """Times steps that select and steps that train on every candidate, and decides which the next step is.

    With a forward pass of cost 1 and a backward pass of cost b, selection pays where ``1 + (1 + b) keep < 1 + b``.
    Here whole steps are measured, so that they include data loading, the optimizer and the overhead of few rows.
    Four pairs of steps are compared at first, and again after every 500 steps.

    Attributes:
        predicted_speedup: Seconds of a full step over seconds of a selecting step, medians of the last comparison;
            None before the first.

    Example:
        >>> pays = BreakEven()
        >>> while pays.compares:
        ...     _ = pays.add(1.0 if pays.selects else 3.0)
        >>> pays.predicted_speedup, pays.selects
        (3.0, True)
    """

    def __init__(self) -> None:
        self.predicted_speedup: float | None = None
        self._full: list[float] = []
        self._selecting: list[float] = []
        self._steps = 0  # since the comparison began
        self._full_seconds = 0.0  # seconds of one full step in the last comparison
        self._seconds_if_full = 0.0  # estimate for the steps since the first comparison
        self._seconds = 0.0  # measured seconds of these steps

    @property
    def compares(self) -> bool:
        """Whether the next step is part of a comparison; its timer must then wait for the device."""
        return self._steps < 2 * PAIRS

    @property
    def selects(self) -> bool:
        """Whether the next step selects."""
        if self.compares:
            return self._steps % 2 == 0
        return (self.predicted_speedup or 0.0) > PAYS

    @property
    def realised_speedup(self) -> float | None:
        """Speedup of the steps since the first comparison over full steps; None before the first comparison."""
        return self._seconds_if_full / self._seconds if self._seconds > 0 else None

    def add(self, seconds: float) -> bool:
        """Add the duration of the step that :attr:`selects` decided.

        Args:
            seconds: Duration of the step in seconds, finite and >= 0.

        Returns:
            Whether a comparison is complete; processes must then agree on :attr:`predicted_speedup`.

        Raises:
            ValueError: If ``seconds`` is negative or not finite.
        """
        check_number("seconds", seconds, "[0, inf)")
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
        """The state, of numbers and lists of numbers."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        vars(self).update(state)
