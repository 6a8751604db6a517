"""The calls of routers in a training step, recorded by forward hooks."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from curation.experts.router_statistics import RouterStatistics, router_statistics
from curation.experts.routers import Router, can_add_balancing_loss

CALLS = "_curation_router_calls"  # attribute of a router while it is listened to


def refuse_balancing_losses(model: nn.Module) -> list[Callable[[], None]]:
    """Refuse calls of models of transformers that switch on their own load-balancing loss.

    Returns:
        Functions that undo this.
    """

    def refuse(module: nn.Module, args: Any, named: dict[str, Any]) -> None:
        if torch.is_grad_enabled() and named.get("output_router_logits") and named.get("labels") is not None:
            raise ValueError(
                f"{type(module).__name__} adds a load-balancing loss itself: call it without `output_router_logits`, "
                "or leave GlobalBatchLoadBalancing out."
            )

    return [
        module.register_forward_pre_hook(refuse, with_kwargs=True).remove
        for module in model.modules()
        if can_add_balancing_loss(getattr(module, "config", None))
        and "labels" in inspect.signature(module.forward).parameters
    ]


class Phase(Enum):
    """What a call of a router means.

    Attributes:
        OFF: It is outside a training step, and ignored.
        FORWARD: It is recorded; its output only where gradients are enabled.
        BACKWARD: It repeats an earlier call, as activation checkpointing does, and is ignored.
        COUNTING: It is recorded with its output, although gradients are disabled.
    """

    OFF = "off"
    FORWARD = "forward"
    BACKWARD = "backward"
    COUNTING = "counting"


@dataclass
class StepRecord:
    """What the routers did in a training step.

    Attributes:
        backward_passes: Number of backward passes so far.
        differentiable: Number of recorded calls with gradients.
        without_gradient: Number of recorded calls without gradients.
    """

    backward_passes: int = 0
    differentiable: int = 0
    without_gradient: int = 0


@dataclass
class RouterCall:
    """A forward pass of a router.

    Attributes:
        router: Number of the router.
        inputs: Arguments by position and by name; None if they are not recorded.
        output: Output of the router; None for a call without gradients.
    """

    router: int
    inputs: tuple[tuple[Any, ...], dict[str, Any]] | None
    output: Any


class RouterListener:
    """Records the calls of routers that a backward pass will differentiate.

    Args:
        routers: The routers; their modules get forward hooks.
        inputs: Whether the inputs of the calls are recorded.

    Attributes:
        phase: What a call means now.
        step: What the routers did in the current training step.
    """

    def __init__(self, routers: list[Router], inputs: bool) -> None:
        self.routers = routers
        self.inputs = inputs
        self.phase = Phase.OFF
        self.step = StepRecord()
        self._ever_differentiable = False
        modules = [router.module for router in routers]
        self._undo = [m.register_forward_hook(self._record, with_kwargs=True).remove for m in modules]
        for module in modules:
            setattr(module, CALLS, [])

    def _record(self, module: nn.Module, inputs: Any, named: Any, output: Any) -> None:
        # One function for all routers and a list on the module: torch.compile makes one graph of equal layers.
        if self.phase is Phase.FORWARD or self.phase is Phase.COUNTING:
            differentiable = torch.is_grad_enabled() or self.phase is Phase.COUNTING
            recorded = (inputs, named) if self.inputs and differentiable else None
            getattr(module, CALLS).append((recorded, output if differentiable else None))

    def _take_all(self) -> list[RouterCall]:
        calls = []
        for i, router in enumerate(self.routers):
            recorded = getattr(router.module, CALLS)
            calls += [RouterCall(i, inputs, output) for inputs, output in recorded]
            recorded.clear()
        return calls

    def begin_step(self, trained: bool) -> None:
        """Forget earlier calls, and record from now on if the step is trained on."""
        self._take_all()
        self.step = StepRecord()
        self.phase = Phase.FORWARD if trained else Phase.OFF

    def begin_backward(self) -> list[RouterCall]:
        """The calls with gradients since the last backward pass; until :meth:`end_backward` calls are ignored.

        Raises:
            RuntimeError: If all calls of the step and of the fit were without gradients.
        """
        if self.phase is Phase.FORWARD:
            self.phase = Phase.BACKWARD
        recorded = self._take_all()
        calls = [call for call in recorded if call.output is not None]
        self.step.backward_passes += 1
        self.step.differentiable += len(calls)
        self.step.without_gradient += len(recorded) - len(calls)
        self._ever_differentiable |= bool(calls)
        if self.step.without_gradient and not self._ever_differentiable:
            raise RuntimeError(
                "No router fired with gradients before the first backward pass, but without: as under reentrant "
                "activation checkpointing; use `use_reentrant=False`."
            )
        return calls

    def end_backward(self) -> None:
        """Record again."""
        if self.phase is Phase.BACKWARD:
            self.phase = Phase.FORWARD

    @contextmanager
    def in_phase(self, phase: Phase) -> Iterator[None]:
        """Give calls another meaning for a while."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def take_counted(self) -> list[RouterCall]:
        """The calls in the phase ``COUNTING`` since the last time."""
        return self._take_all()

    def end_step(self, pl_module: nn.Module) -> None:
        """Ignore calls until the next step.

        Raises:
            RuntimeError: If no router fired in a step that was differentiated, or the loss was differentiated without
                Lightning.
        """
        self.phase = Phase.OFF
        rest, step = self._take_all(), self.step
        silent = step.backward_passes > 0 and step.differentiable == 0
        if silent and (step.without_gradient or not self._ever_differentiable):
            reentrant, unused = "Is its activation checkpointing reentrant?", "Does `training_step` run them?"
            why = reentrant if step.without_gradient else unused
            raise RuntimeError(f"No router of {type(pl_module).__name__} fired with gradients in this step. {why}")
        by_hand = not getattr(pl_module, "automatic_optimization", True)
        if by_hand and not step.backward_passes and any(call.output is not None for call in rest):
            raise RuntimeError(
                f"{type(pl_module).__name__} differentiates a loss that GlobalBatchLoadBalancing does not see: call "
                "`self.manual_backward(loss)` and not `loss.backward()`."
            )

    def statistics(
        self, calls: list[RouterCall], masks: list[Tensor | None], sequences: bool = False, z: bool = False
    ) -> list[RouterStatistics]:
        """The statistics of every router over its calls.

        Args:
            calls: The calls of a micro-batch.
            masks: For each router ``[B, T]`` or flat, not 0 for tokens that count; None if all do.
            sequences: Whether to compute the loss of the sequences.
            z: Whether to compute the z-loss.

        Raises:
            RuntimeError: If a router has no call.
            ValueError: If a mask does not fit.
        """
        outputs: list[list[Any]] = [[] for _ in self.routers]
        for call in calls:
            outputs[call.router].append(call.output)
        for router, of_router in zip(self.routers, outputs, strict=True):
            if not of_router:
                raise RuntimeError(
                    f"The router {router.name} did not fire with gradients where others did. If it is not meant to, "
                    "leave it out of `routers`; under reentrant activation checkpointing use `use_reentrant=False`."
                )
        return [
            router_statistics(router, each, mask, sequences, z)
            for router, each, mask in zip(self.routers, outputs, masks, strict=True)
        ]

    def remove(self) -> None:
        """Leave the routers as they were."""
        for undo in self._undo:
            undo()
        for router in self.routers:
            vars(router.module).pop(CALLS, None)
        self._undo, self.routers = [], []
