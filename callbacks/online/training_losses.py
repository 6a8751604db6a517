"""The losses of the rows of a training step, from the forward pass that it runs anyway."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from curation.scoring import (
    Criterion,
    Route,
    check_outputs,
    find_criterion,
    find_route,
    losses_alone,
    per_sample_loss,
    row_outcomes,
)


class WatchedLogits:
    """A value of the first logits that a training step makes for all rows of its batch, and of their targets.

    The hook stays until :meth:`stop`, since a module that is compiled as a whole is compiled again when hooks change.

    Args:
        compiled: Whether it works in such a module, where the value becomes a part of the graph.
    """

    def __init__(self, compiled: bool = False) -> None:
        self._compiled = compiled
        self._batch: Any = None
        self._rows = 0
        self._value: Any = None
        self._hook: RemovableHandle | None = None

    def watch(self, route: Route | None, batch: Any, rows: int, compute: Callable[[Tensor, Tensor], Any]) -> None:
        """Compute a value of the logits of the next training step.

        Args:
            route: The route to the logits; nothing is computed without one that has a source.
            batch: The batch that is trained on.
            rows: Number of its rows.
            compute: Function of detached logits ``[B, C]`` or ``[B, T, V]`` and targets int64 ``[B]`` or ``[B, T]``;
                that of the first call stays.
        """
        if route is None or route.source is None or route.align is None:
            return
        self._batch, self._rows, self._value, align = batch, rows, None, route.align

        def take(source: nn.Module, inputs: Any, output: Any) -> None:
            if torch.compiler.is_compiling() and not self._compiled:
                return
            if self._batch is None or self._value is not None or not torch.is_grad_enabled():
                return
            try:
                logits, targets = check_outputs(align(output, self._batch))
            except (TypeError, IndexError, KeyError):  # this call of the model makes no logits for the batch
                return
            if len(logits) == self._rows and logits.requires_grad:
                with torch.no_grad():
                    self._value = compute(logits.detach(), targets)

        if self._hook is None:
            self._hook = route.source.register_forward_hook(take)

    def take(self) -> Any:
        """The value; None if the step makes its logits in another way."""
        value, self._value, self._batch = self._value, None, None
        return value

    def stop(self) -> None:
        """Remove the hook, and forget the value."""
        self.take()
        if self._hook is not None:
            self._hook.remove()
        self._hook = None


class TrainingLosses:
    """The loss of every row of the batch that is trained on; nothing is forwarded for it.

    A module with an attribute ``sample_losses`` (None before training) leaves them there in ``training_step``,
    floating ``[B]``. Of any other module they are the cross-entropies of the logits that its step makes, with the
    settings of its only ``CrossEntropyLoss`` or ``NLLLoss``.

    Args:
        module: The module that is trained.
        batch: Its first batch, without sample ids.

    Attributes:
        name: What the losses are, for the log line at the start of the fit.
        route: The route to the logits; None where the module leaves its losses.
        criterion: Settings of the module's cross-entropy.

    Raises:
        TypeError: If the logits of the module's steps are not known.
    """

    def __init__(self, module: LightningModule, batch: Any) -> None:
        self._module = module
        self._given = hasattr(module, "sample_losses")
        self.route: Route | None = None
        self._logits = WatchedLogits(compiled=True)
        self.criterion = Criterion()
        self.name = f"`{type(module).__name__}.sample_losses`"
        if not self._given:
            try:
                self.route = find_route(module, batch, score_step=False)
            except TypeError as error:
                raise TypeError(f"{error.args[0].split('. Add')[0]}. {self._remedy()}") from error
            self.criterion = find_criterion(module)
            self.name = f"{self.route.name}{self.criterion.describe()}"

    def _remedy(self) -> str:
        return (
            f"Give {type(self._module).__name__} an attribute `sample_losses` (None), and let `training_step` set it "
            "to the losses of its rows, [B], before it reduces them."
        )

    def watch(self, batch: Any, rows: int) -> None:
        """Take the losses of the next training step, on a batch with some number of rows."""
        if self.route is None:
            self._module.sample_losses = None  # type: ignore[assignment]
        else:
            self._logits.watch(self.route, batch, rows, self._losses)

    def _losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        return self.criterion.bind(per_sample_loss)(logits, self.criterion.mask(targets))

    def take(self, rows: int) -> Tensor | None:
        """Losses fp32 ``[B]`` of the training step, NaN for rows without a scored position; None if there are none.

        Raises:
            TypeError: If the module left something else than one loss for each row.
        """
        if self.route is not None:
            return self._logits.take()
        losses: Any = self._module.sample_losses
        self._module.sample_losses = None  # type: ignore[assignment]
        if losses is None:
            return None
        if not (isinstance(losses, Tensor) and losses.is_floating_point() and losses.shape == (rows,)):
            got = f"{losses.dtype} {list(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
            raise TypeError(
                f"`{type(self._module).__name__}.sample_losses` must be floating [{rows}], one loss for each row, "
                f"but is {got}."
            )
        return losses.detach().float()

    def take_of_step(self, rows: int, outputs: Any) -> Tensor | None:
        """As :meth:`take`, given what ``training_step`` returned; None where it skipped its batch.

        Raises:
            TypeError: If the step has left no losses, and did not skip its batch.
        """
        losses = self.take(rows)
        skipped = step_loss(outputs) is None and self._module.automatic_optimization
        if losses is None and not skipped:
            raise TypeError(
                f"`{type(self._module).__name__}.training_step` shows no losses of its rows. {self._remedy()}"
            )
        return losses

    def stop(self) -> None:
        """Remove the hook, and the losses of a step that has failed."""
        self._logits.stop()
        if self._given:
            self._module.sample_losses = None  # type: ignore[assignment]


class TrainingOutcomes(TrainingLosses):
    """As :class:`TrainingLosses`, with margins, probabilities and classes: the columns of ``row_outcomes``.

    Of a module with ``sample_losses`` only the losses are known.
    """

    def _losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        loss: Any = self.criterion.bind(per_sample_loss)
        return row_outcomes(logits, self.criterion.mask(targets), None if loss is per_sample_loss else loss)

    def take(self, rows: int) -> Tensor | None:
        """Outcomes fp32 ``[B, 8]`` of the training step; None if there are none."""
        values = super().take(rows)
        return losses_alone(values) if values is not None and values.dim() == 1 else values


def step_loss(outputs: Any) -> Any:
    """The loss in what ``training_step`` returned; None where there is none."""
    return outputs.get("loss") if isinstance(outputs, Mapping) else outputs
