"""Optimizer steps over a number of batches that changes in a fit, in the middle of an epoch, too."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, GradientAccumulationScheduler
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor

from curation.batch import batch_size as count_rows
from curation.batch_size import COUPLINGS, next_size
from curation.callbacks.batch_size.held_batches import HeldBatches
from curation.callbacks.experts.global_batch_load_balancing import GlobalBatchLoadBalancing
from curation.callbacks.lightning.collectives import gather_sizes
from curation.callbacks.lightning.fit_callback import FitCallback
from curation.callbacks.lightning.loop import (
    advance_schedulers,
    batches_of_epoch,
    ends_epoch,
    is_trained_on,
    trained_batches,
    training_loaders,
)
from curation.callbacks.lightning.rate_scale import RateScale
from curation.callbacks.lightning.seam import BatchSeam, check_one_loader, check_training_step, refuse_strategies
from curation.callbacks.lightning.step_plan import estimate_steps
from curation.checks import check_choice, check_integer
from curation.replace import replace_attribute


@dataclass(frozen=True)
class Accumulation:
    """What a module that optimizes by hand does with a batch.

    Attributes:
        size: Batches of this process in the step: divide the loss by it.
        ends: Whether the batch is the last of the step: step, and then zero the gradients.
    """

    size: int
    ends: bool


class VariedBatchSize(FitCallback):
    """Accumulates gradients over a number of batches that changes, and steps with the mean over all their rows.

    Lightning zeroes gradients where ``batch_idx % k == 0`` and steps where ``ready % k == 0``. So ``k`` is changed
    only at the end of a step, to a number that divides ``ready``, or at the end of an epoch. Lightning divides every
    loss by ``k``, also in the last window of an epoch, which may be shorter, and whatever the rows of the batch are:
    here the loss of a batch with other rows than usual is weighed by them, and gradients are divided by the rows that
    there were, after unscaling and before clipping. Every step then has the gradient of one large batch.

    A module that optimizes by hand has an attribute ``accumulation`` (None in its constructor), where it finds an
    :class:`Accumulation` in every ``training_step``.

    Args:
        first: Rows of a step over all processes at the start; None for what the trainer accumulates.
        couple: How the learning rate of a step follows its rows.
        batch_size: Rows of a batch of the data loader, for loaders that have no ``batch_size``.
        grow: Whether a step accumulates the gradients of its batches, or trains on all of their rows at once.
    """

    paces_schedulers = False  # whether schedules by optimizer steps go by steps of the first size

    def __init__(
        self,
        first: int | None,
        couple: Literal["none", "auto", "sqrt", "linear"],
        batch_size: int | None,
        grow: Literal["accumulation", "loader"] = "accumulation",
    ) -> None:
        self.first: int | None = check_integer("first", first, 1, optional=True)
        self.couple = check_choice("couple", couple, ("none", "auto", "sqrt", "linear"))
        self.batch_size: int | None = check_integer("batch_size", batch_size, 1, optional=True)
        self.grow = check_choice("grow", grow, ("accumulation", "loader"))
        self._undo: list[Callable[[], None]] = []
        self._held: HeldBatches | None = None
        self._reset()

    def _reset(self) -> None:
        self.size = 1
        self.batches = 0
        self.steps = 0
        self.sizes: list[tuple[int, int]] = []
        self._restored = False
        self._saved_unit: int | None = None
        self._unit = 0  # rows of a batch of the loader, over all processes
        self._given = 1  # micro-batches of a step, by the trainer
        self._start = 1  # and at the start
        self._usual = 0  # rows that a batch of this process usually trains on
        self._rows = 0  # of the current batch
        self._counted = False  # in the window
        self._window_rows = 0  # of this process, since the last step

    @property
    def rows(self) -> int:
        """Rows of an optimizer step, over all processes, as the data loader yields them."""
        return self.size * self._unit

    @property
    def seen(self) -> int:
        """Rows that the data loaders of all processes have yielded, with short batches counted as whole ones."""
        return self.batches * self._unit

    def wanted(self, trained: int) -> int:
        """Micro-batches of a step that begins after a number of batches."""
        raise NotImplementedError

    def planned_steps(self, trainer: Trainer) -> int:
        """Steps of the fit by which schedules of the learning rate are made."""
        epochs = max(trainer.max_epochs or 1, 1)
        return -(-int(trainer.num_training_batches) // self._start) * epochs

    @property
    def reference(self) -> int:
        """Micro-batches of a step for which the learning rate of the optimizer holds."""
        return self._start

    # ------------------------------------------------------------------ the fit

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier fit; refuse what cannot work."""
        super().setup(trainer, pl_module, stage)
        if not self.fitting:
            return
        refuse_strategies(trainer, self, FSDPStrategy)
        check_training_step(pl_module)
        name = type(self).__name__
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        for other in callbacks:
            both = isinstance(other, (GradientAccumulationScheduler, BatchSizeFinder, VariedBatchSize))
            if both and other is not self:
                raise ValueError(f"{name} sets the batch size, and so would {type(other).__name__}: leave one out.")
        after = callbacks[callbacks.index(self) + 1 :] if self in callbacks else []
        if any(isinstance(other, GlobalBatchLoadBalancing) for other in after):  # which corrects the gradients
            raise ValueError(f"In the list of callbacks, put {name} after GlobalBatchLoadBalancing.")
        if not pl_module.automatic_optimization and not hasattr(pl_module, "accumulation"):
            raise TypeError(
                f"{name} needs to tell {type(pl_module).__name__}, which optimizes by hand, when to step. Set "
                "`self.accumulation = None` in its constructor; in `training_step`, divide the loss by "
                "`self.accumulation.size`, and step and zero the gradients only where `self.accumulation.ends`."
            )
        self._reset()
        self._given = trainer.accumulate_grad_batches
        self._undo.append(partial(setattr, trainer, "accumulate_grad_batches", trainer.accumulate_grad_batches))
        self._undo.append(estimate_steps(trainer, lambda: self._plan(trainer)))
        if self.grow == "loader":
            self._held = HeldBatches(trainer, lambda: self._ends(trainer))
            self._undo.append(self._held.remove)
        if not pl_module.automatic_optimization:
            self._undo.append(replace_attribute(pl_module, "toggle_optimizer", self._refuse_toggling))
            self._undo.append(partial(setattr, pl_module, "accumulation", pl_module.accumulation))

    def _refuse_toggling(self, *_: Any, **__: Any) -> None:
        raise TypeError(
            f"{type(self).__name__} does not support `toggle_optimizer`: steps of several optimizers that take turns "
            "would end at different batches."
        )

    def _plan(self, trainer: Trainer) -> int:
        self.measure(trainer)
        return self.planned_steps(trainer)

    def measure(self, trainer: Trainer) -> None:
        """Find what the data loader yields, and check sizes against it.

        Raises:
            TypeError: If there are several training data loaders.
            ValueError: If the rows of a batch are not known, or no accumulation gives the rows of a step.
        """
        check_one_loader(trainer, self)
        (loader,) = training_loaders(trainer)
        rows = getattr(loader, "batch_size", None) or getattr(
            getattr(loader, "batch_sampler", None), "batch_size", None
        )
        if not (self.batch_size or rows):
            raise ValueError(
                f"Argument `batch_size` must be given for a {type(loader).__name__} that has none, but got None."
            )
        seam = BatchSeam.of(trainer)
        joined = 1 if seam is None else seam.joined()
        self._unit = (self.batch_size or int(rows or 0) * joined) * trainer.world_size
        if self.first is not None:
            self._start = self.micro_batches("first", self.first, trainer)
        else:
            self._start = self._given

    def micro_batches(self, name: str, rows: int, trainer: Trainer) -> int:
        """Micro-batches that have a number of rows.

        Raises:
            ValueError: If there are none.
        """
        if rows % self._unit:
            raise ValueError(
                f"Argument `{name}` must be a multiple of the {self._unit} rows that {trainer.world_size} "
                f"process{'es load' if trainer.world_size > 1 else ' loads'} at a time, but got {rows}."
            )
        return rows // self._unit

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with the first size, or with that of the checkpoint."""
        self.measure(trainer)
        if self._restored and self._saved_unit not in (None, self._unit):
            raise ValueError(
                f"The checkpoint counts batches of {self._saved_unit} rows of all processes, and now they have "
                f"{self._unit}: keep the batch size times the number of processes, on which {type(self).__name__} "
                "depends."
            )
        if not self._restored:
            self.batches = trained_batches(trainer)
            begun = batches_of_epoch(trainer) % trainer.num_training_batches  # in a checkpoint without this state
            self.size = next_size(1, self.wanted(self.batches), int(begun))
            self.sizes = [(self.seen, self.rows)]
        self._apply(trainer, pl_module)
        if self.couple != "none":
            scale = RateScale(trainer, self.rate_factor)
            self._undo.append(scale.remove)
        self._check_schedulers(trainer)

    def _check_schedulers(self, trainer: Trainer) -> None:
        for config in trainer.lr_scheduler_configs if self.paces_schedulers else []:
            if config.interval == "step" and config.frequency != 1:
                raise ValueError(
                    f"{type(self).__name__} needs learning-rate schedules by step to have the frequency 1, but got "
                    f"{config.frequency}."
                )

    def _apply(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if pl_module.automatic_optimization:
            trainer.accumulate_grad_batches = self.size

    def rate_factor(self, optimizer: torch.optim.Optimizer) -> float:
        """Factor of the learning rate for the current size."""
        linear = isinstance(optimizer, torch.optim.SGD)
        couple = ("linear" if linear else "sqrt") if self.couple == "auto" else self.couple
        return (self.size / self.reference) ** COUPLINGS[couple]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a window: a hook may have ended the epoch before in the middle of one."""
        super().on_train_epoch_start(trainer, pl_module)
        self._window_rows = 0
        if self._held is not None:
            self._held.forget()

    # ------------------------------------------------------------------ a step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count the rows, and tell a module that optimizes by hand what to do."""
        if not is_trained_on(trainer):
            return
        held = self._rows if self._held else 0
        self._rows, self._counted = held + count_rows(batch), False
        if not self._usual:
            self._usual = max(gather_sizes(trainer, self._rows))
        if not pl_module.automatic_optimization:
            pl_module.accumulation = Accumulation(self.size, self._ends(trainer))  # type: ignore[assignment]

    def _ends(self, trainer: Trainer) -> bool:
        return batches_of_epoch(trainer) % self.size == 0 or ends_epoch(trainer)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Weigh the loss of a batch by its rows, where they are not as many as usual."""
        if self._held:
            return
        if not self._counted:  # a module that optimizes by hand may make several passes
            self._window_rows += self._rows
            self._counted = True
        if self._rows != self._usual and loss.requires_grad:
            weight = self._rows / self._usual
            loss.register_hook(lambda gradient: gradient * weight)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Divide the gradients by the rows that there were."""
        rows = sum(gather_sizes(trainer, self._window_rows))
        whole = self.size * self._usual * trainer.world_size
        if rows not in (0, whole):
            for group in optimizer.param_groups:
                for weight in group["params"]:
                    if weight.grad is not None:
                        weight.grad.mul_(whole / rows)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """At the end of a step log its size and decide the next."""
        if not is_trained_on(trainer):
            return
        self.batches += 1
        if not self._ends(trainer):
            return
        self.steps += 1
        self._window_rows = 0
        self.log_step(trainer, pl_module)
        ready = batches_of_epoch(trainer)
        if self.paces_schedulers and pl_module.automatic_optimization:
            began = (ready - 1) // self.size * self.size // self._start
            ended = -(-ready // self._start) if ends_epoch(trainer) else ready // self._start
            advance_schedulers(trainer, ended - began - 1)
        size = next_size(self.size, self.wanted(self.batches), 0 if ends_epoch(trainer) else ready)
        if size != self.size:
            self.size = size
            self.sizes.append((self.seen, self.rows))
            self._apply(trainer, pl_module)

    def log_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the rows of a step."""
        pl_module.log("curation/batch_size", float(self.rows), on_step=True, on_epoch=False, batch_size=1)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave trainer, module and optimizers as they were."""
        while self._undo:
            self._undo.pop()()

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The size, what was trained on, and the sizes so far; equal on all ranks."""
        return {
            "size": self.size,
            "batches": self.batches,
            "steps": self.steps,
            "usual": self._usual,
            "unit": self._unit,
            "sizes": [list(change) for change in self.sizes],
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Let Lightning restore its loops with the size of the checkpoint."""
        state = checkpoint["callbacks"].get(self.state_key)
        if self.fitting and state and state["sizes"] and pl_module.automatic_optimization:
            trainer.accumulate_grad_batches = state["size"]

    def restore(self, state: dict[str, Any]) -> None:
        """Go on with the size of the checkpoint."""
        self.size, self.batches, self.steps, self._usual = (
            state[name] for name in ("size", "batches", "steps", "usual")
        )
        self.sizes = [(samples, rows) for samples, rows in state["sizes"]]
        self._saved_unit = state.get("unit")  # checkpoints of earlier versions have none
        self._restored = bool(self.sizes)  # a learning-rate finder restores what has not begun
