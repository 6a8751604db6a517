"""A batch size that follows a schedule, counted in samples."""

from collections.abc import Sequence
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer

from curation.batch_size import SCHEDULES, batches_within, count_steps, steps
from curation.callbacks.batch_size.accumulation import VariedBatchSize
from curation.callbacks.lightning.loop import batches_of_epochs
from curation.checks import check_choice, check_integer, check_number


class BatchSizeScheduler(VariedBatchSize):
    """Lets the rows of an optimizer step grow by a schedule, in the middle of an epoch, too.

    Batches of the data loader stay as they are; gradients are accumulated over more of them, or several are joined
    (``grow="loader"``). A new size begins at the first step where Lightning can begin one
    (:func:`~curation.batch_size.next_size`). The gradient of every step is that of one large batch, whatever the
    sizes: short last windows and short last batches are weighed by their rows, before clipping. A loss that is no
    mean over rows, such as one over the tokens of unequal rows, is the mean of the batches' own means.

    With ``pace="steps"`` ``trainer.estimated_stepping_batches`` counts the steps of the schedule, so learning-rate
    schedules by step end with the fit. As most of those steps are small ones of the first half, rates are low when
    steps are large. With ``pace="samples"``, and always with ``"seesaw"``, such schedules go by steps of the first
    size, which the estimate counts then: they end with the fit, too, and are the functions of the samples seen that
    they would be without this callback.

    A module that optimizes by hand has an attribute ``accumulation`` (None in its constructor). In ``training_step``
    it divides its loss by ``accumulation.size``, and steps and zeroes its gradients only where ``accumulation.ends``.

    Logs ``curation/batch_size``, the rows of a step over all processes, as the data loaders yield them: a selection
    trains on a part of them.

    Args:
        schedule: ``"ramp"``, in a straight line; ``"doubling"``, twice as many rows at equal distances; ``"seesaw"``
            (arXiv 2510.14717), twice as many where a cosine has halved, with the learning rate times the square root
            of the growth, beside a cosine schedule of the module; or pairs ``(samples seen, rows of a step)``, of
            which the first begins at 0.
        growth: Last size by the first; a power of two but for ``"ramp"``. Not for pairs.
        first: Rows of a step over all processes at the start; None for ``accumulate_grad_batches`` batches of every
            process. Not for pairs.
        over: Share of the fit within which the size grows, in (0, 1]; None for .5, of ``"seesaw"`` 1. Not for pairs.
        pace: What learning-rate schedules by step go by: ``"steps"`` or ``"samples"``.
        couple: How the learning rate of a step follows its rows: ``"none"``; by their square root (``"sqrt"``);
            ``"linear"``; or ``"auto"``, linear for SGD and by the square root for others. The rate of the optimizer
            is that of the largest size; schedulers and monitors see it.
        batch_size: Rows of a batch of the data loader, for loaders that have no ``batch_size``.
        grow: ``"accumulation"``, a training step for every batch of the data loader; or ``"loader"``, one for all
            batches of an optimizer step, joined on the device: fewer and larger passes, which need memory for the
            largest size. ``training_step`` is then called with the last batch's ``batch_idx``, and normalisation
            layers see all rows of the step.

    Attributes:
        rows: Rows of the current step, over all processes.
        sizes: Every size with the samples seen when it began: ``(samples, rows)``.
        steps: Optimizer steps so far.

    Raises:
        ValueError: If no accumulation gives a size; beside ``GradientAccumulationScheduler`` and ``BatchSizeFinder``;
            if the fit has no length that a schedule could stretch over.
        TypeError: Under DeepSpeed and FSDP1; with several training data loaders; if the module optimizes by hand and
            has no ``accumulation``, or calls ``toggle_optimizer``; with ``grow="loader"`` beside callbacks that need
            a training step for every batch, such as selections.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> ramp = BatchSizeScheduler("ramp", growth=4)
        >>> trainer = Trainer(callbacks=[ramp], logger=False, barebones=True)
        >>> BatchSizeScheduler([(0, 64), (50_000, 256)], couple="auto").pairs
        [(0, 64), (50000, 256)]
    """

    def __init__(
        self,
        schedule: Literal["ramp", "doubling", "seesaw"] | list[tuple[int, int]] = "ramp",
        growth: int = 4,
        first: int | None = None,
        over: float | None = None,
        pace: Literal["steps", "samples"] = "steps",
        couple: Literal["none", "auto", "sqrt", "linear"] = "none",
        batch_size: int | None = None,
        grow: Literal["accumulation", "loader"] = "accumulation",
    ) -> None:
        super().__init__(first, couple, batch_size, grow)
        self.paces_schedulers = check_choice("pace", pace, ("steps", "samples")) == "samples"
        self.pairs = None if isinstance(schedule, str) and schedule in SCHEDULES else _pairs(schedule)
        self.schedule: Any = schedule
        self.growth = check_integer("growth", growth, 2)
        self.over: float | None = check_number("over", over, "(0, 1]", optional=True)
        for name, value in (("first", first), ("over", over)):
            if self.pairs is not None and value is not None:
                raise ValueError(f"Argument `{name}` must be None beside pairs, but got {value!r}.")
        if schedule in ("doubling", "seesaw") and growth & (growth - 1):
            raise ValueError(f"Argument `growth` must be a power of two with {schedule!r}, but got {growth!r}.")
        if schedule == "seesaw":
            if couple != "none":
                raise ValueError(
                    f"Argument `couple` must be 'none' with 'seesaw', which couples, but got {couple!r}."
                )
            self.couple, self.paces_schedulers = "sqrt", True
        self._total = 0  # batches of the fit

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse to pace schedules that the module steps itself."""
        super().setup(trainer, pl_module, stage)
        if self.fitting and self.paces_schedulers and not pl_module.automatic_optimization:
            name, value = ("schedule", "seesaw") if self.schedule == "seesaw" else ("pace", "samples")
            raise ValueError(
                f"Argument `{name}` must not be {value!r} where the module optimizes by hand, and steps its own "
                "schedules of the learning rate."
            )

    def measure(self, trainer: Trainer) -> None:
        """Check the sizes, and find how long the fit is."""
        super().measure(trainer)
        if self.pairs is not None:
            for _, rows in self.pairs:
                self.micro_batches("schedule", rows, trainer)
            self._start = self.pairs[0][1] // self._unit
            if self.paces_schedulers and any(rows < self.pairs[0][1] for _, rows in self.pairs):
                raise ValueError(
                    "Argument `pace` must be 'steps' where sizes get smaller than the first, but got 'samples'."
                )
            return
        length, limit = trainer.num_training_batches, trainer.max_steps
        total = batches_of_epochs(trainer, length)
        if total == float("inf") and limit == -1:
            raise ValueError(
                "Argument `schedule` must be pairs in a fit without `max_epochs` or `max_steps`, but got "
                f"{self.schedule!r}."
            )
        if limit != -1:
            total = min(total, batches_within(self._stretched, length, limit, self.growth * self._start))
        self._total = max(1, int(total))

    def _stretched(self, total: int) -> Any:
        """The schedule in micro-batches, over a number of batches."""
        schedule, first = SCHEDULES[self.schedule], self._start
        over = (self.over or (1.0 if self.schedule == "seesaw" else 0.5)) * max(total, 1)
        return lambda trained: round(schedule(trained, first, self.growth * first, over))

    def wanted(self, trained: int) -> int:
        """Micro-batches of a step that begins after a number of batches."""
        if self.pairs is not None:
            return int(steps(self.pairs)(trained * self._unit)) // self._unit
        return self._stretched(self._total)(trained)

    def planned_steps(self, trainer: Trainer) -> int:
        """Steps of the schedule."""
        if self.paces_schedulers:
            return super().planned_steps(trainer)
        length = int(trainer.num_training_batches)
        return count_steps(self.wanted, length, length * max(trainer.max_epochs or 1, 1))

    @property
    def reference(self) -> int:
        """Micro-batches of a step for which the learning rate of the optimizer holds."""
        if self.schedule == "seesaw":
            return self._start
        return self._start * self.growth if self.pairs is None else max(rows for _, rows in self.pairs) // self._unit


def _pairs(schedule: Any) -> list[tuple[int, int]]:
    """Pairs of samples and rows.

    Raises:
        ValueError: If they are something else.
    """
    refusal = ValueError(
        "Argument `schedule` must be 'ramp', 'doubling', 'seesaw' or pairs (samples seen, rows of a step), from 0 on "
        f"and in ascending order, but got {schedule!r}."
    )
    if isinstance(schedule, str) or not isinstance(schedule, Sequence) or not schedule:
        raise refusal
    pairs = []
    for pair in schedule:
        if not isinstance(pair, Sequence) or len(pair) != 2:
            raise refusal
        try:
            pairs.append((check_integer("samples", pair[0], 0), check_integer("rows", pair[1], 1)))
        except ValueError:
            raise refusal from None
    seen = [samples for samples, _ in pairs]
    if seen[0] != 0 or seen != sorted(set(seen)):
        raise refusal
    return pairs
