"""How a micro-batch is balanced over tokens that it does not hold: one estimator for each scope and buffer."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor
from torch.utils._pytree import tree_map_only

from curation import rng
from curation.callbacks.experts.router_listener import RouterCall
from curation.callbacks.lightning.collectives import sum_over_processes
from curation.callbacks.lightning.look_ahead import StepsAhead
from curation.experts.load_balancing import expert_fractions, load_balancing_loss
from curation.experts.router_statistics import RouterStatistics
from curation.experts.routers import Router
from curation.experts.window import Window


@dataclass
class MicroBatch:
    """What the routers did in a micro-batch.

    Attributes:
        calls: The calls of the routers.
        statistics: The statistics of each of ``L`` routers.
        counts: int64 ``[L, E + 1]``: choices of each expert on this process, and tokens last.
        total: The same of all processes.
        masks: For each router, not 0 for tokens that count, in the order of its tokens; None if all do.
        length: Number of micro-batches that the window is expected to have.
        processes: Number of processes.
    """

    calls: list[RouterCall]
    statistics: list[RouterStatistics]
    counts: Tensor
    total: Tensor
    masks: list[Tensor | None]
    length: int
    processes: int


class RunningEstimator:
    """Balances over the tokens of all processes in the window so far: the buffer of arXiv 2501.11873.

    Attributes:
        window: The counts of all processes in the current window.
        stores_inputs: Whether the inputs of routers have to be recorded.
        uses_sequences: Whether the losses of sequences have to be computed.
    """

    stores_inputs = False
    uses_sequences = False

    def __init__(self) -> None:
        self.window = Window()

    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepare for a fit.

        Raises:
            ValueError: If the estimator does not work with the trainer or the module.
        """

    def look_ahead(
        self, trainer: Trainer, batch: Any, batch_idx: int, length: int, count: Callable[[Any], Tensor]
    ) -> None:
        """Look at the window that a batch begins, before its training step.

        Args:
            trainer: The trainer.
            batch: The batch.
            batch_idx: Its number in the epoch.
            length: Number of micro-batches that the window is expected to have.
            count: Returns int64 ``[L, E + 1]`` for a batch after its forward pass.
        """

    def losses(self, batch: MicroBatch) -> tuple[list[Tensor], Tensor]:
        """The load-balancing loss of each layer.

        Returns:
            ``L`` fp32 scalars with gradient, and their weights in the mean over processes and micro-batches,
            fp32 ``[L]``.
        """
        f, weights = self.fractions(batch)
        return [
            load_balancing_loss(f_i[: len(each.counts)], each.probabilities)
            for f_i, each in zip(f, batch.statistics, strict=True)
        ], weights

    def fractions(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Enter a micro-batch, and return the fractions by which it is balanced, fp32 ``[L, E]``, and its weights."""
        f = self.window.add(batch.total, batch.length)
        return f, batch.processes * batch.counts[:, -1] / batch.total[:, -1].clamp(min=1)

    def before_optimizer_step(self, trainer: Trainer, optimizer: Any, routers: list[Router], strength: float) -> None:
        """Correct gradients before the optimizer steps.

        Args:
            trainer: The trainer.
            optimizer: The optimizer of the routers.
            routers: The routers.
            strength: What the weighted loss of a micro-batch is multiplied by.
        """

    def close_window(self) -> None:
        """Let the next micro-batch begin another window."""
        self.window.closed = True

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Undo what :meth:`start` did."""

    def state_dict(self) -> dict[str, Any]:
        """The counts of the window, so that a run may be resumed in the middle of one."""
        return {"window": self.window.state_dict()}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Take over a state from :meth:`state_dict`."""
        self.window.load_state_dict(state["window"], device)


class WarmEstimator(RunningEstimator):
    """Balances over the window so far and an estimate, from earlier windows, of the micro-batches to come."""

    def __init__(self) -> None:
        self.window = Window(warm=True)


@dataclass
class StoredCall:
    """A call of a router, kept to correct its gradient.

    Attributes:
        router: Number of the router.
        inputs: Arguments by position and by name, detached.
        mask: bool ``[N]``, True for tokens that count; None if all do.
        gradient: fp32 ``[E]``, the derivative of the weighted loss by each expert's probability of a token.
    """

    router: int
    inputs: Any
    mask: Tensor | None
    gradient: Tensor


class DeferredEstimator(RunningEstimator):
    """Balances as :class:`RunningEstimator`, and corrects the gradients of routers when the window is complete.

    The loss is linear in the fractions, so that the correction needs a forward and a backward pass of the routers
    alone.
    """

    stores_inputs = True

    def __init__(self) -> None:
        super().__init__()
        self.stored: list[StoredCall] = []

    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse strategies that split gradients."""
        if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise ValueError(
                "Argument `estimator` must not be 'deferred', which needs whole gradients, with "
                f"{type(trainer.strategy).__name__}."
            )

    def fractions(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """As :meth:`RunningEstimator.fractions`; stores the calls."""
        f, weights = super().fractions(batch)
        masks = [None if mask is None else mask.reshape(-1).bool() for mask in batch.masks]
        for call in batch.calls:
            statistics = batch.statistics[call.router]
            f_i = f[call.router, : len(statistics.counts)]
            gradient = len(f_i) * weights[call.router] / statistics.tokens.clamp(min=1) * f_i
            inputs = tree_map_only(Tensor, Tensor.detach, call.inputs)
            self.stored.append(StoredCall(call.router, inputs, masks[call.router], gradient))
        return f, weights

    @torch.enable_grad()
    def before_optimizer_step(self, trainer: Trainer, optimizer: Any, routers: list[Router], strength: float) -> None:
        """Add the gradient by the fractions of the whole window, less that by the fractions there were."""
        parameters = {i: [p for p in r.module.parameters() if p.requires_grad] for i, r in enumerate(routers)}
        with rng.isolated():  # routers may be noisy
            losses = self._corrections(trainer, routers, parameters, strength)
        corrected = [parameter for i in losses for parameter in parameters[i]]
        if not corrected:
            return
        ones = [torch.ones_like(loss) for loss in losses.values()]
        gradients = torch.autograd.grad(
            list(losses.values()), corrected, ones, allow_unused=True, materialize_grads=True
        )
        flat = sum_over_processes(trainer, torch.cat([g.float().flatten() for g in gradients])) / trainer.world_size
        # Optimizers that scale by themselves still have scaled gradients.
        scaler: Any = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            flat = scaler.scale(flat)
        for parameter, part in zip(corrected, flat.split([p.numel() for p in corrected]), strict=True):
            gradient = part.view_as(parameter).to(parameter.dtype)
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)

    def _corrections(
        self, trainer: Trainer, routers: list[Router], parameters: dict[int, list[Any]], strength: float
    ) -> dict[int, Tensor]:
        """A loss for each router whose gradient is the correction."""
        losses: dict[int, Tensor] = {}
        for call in self.stored:
            if not parameters[call.router]:
                continue
            router, experts = routers[call.router], len(call.gradient)
            tokens = self.window.tokens()[call.router].clamp(min=1)
            scale = trainer.world_size * self.window.size * experts / tokens
            whole = scale * self.window.fractions()[call.router, :experts]
            args, named = tree_map_only(Tensor, partial(_cast_like, parameters[call.router][0]), call.inputs)
            with torch.autocast(whole.device.type, enabled=False):
                logits, _ = router.read(router.module(*args, **named))
                p = router.probabilities(logits, call.mask)
                loss = (p * (strength * (whole - call.gradient))).sum()
            losses[call.router] = losses.get(call.router, 0) + loss
        return losses

    def close_window(self) -> None:
        """Forget the calls, too."""
        super().close_window()
        self.stored = []

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the calls."""
        self.stored = []


class PrepassEstimator(RunningEstimator):
    """Balances over the whole window, whose micro-batches go through the model in evaluation mode beforehand.

    Attributes:
        whole: Counts of the whole window, int64 ``[L, E + 1]``, and its number of micro-batches; None where the
            estimator has not seen the beginning of the window.
    """

    def __init__(self) -> None:
        super().__init__()
        self.whole: tuple[Tensor, int] | None = None
        self._steps: StepsAhead | None = None

    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look ahead in the data loader; callbacks that need the loader itself have had it in ``setup``."""
        self._steps = StepsAhead(trainer, pl_module)

    def look_ahead(
        self, trainer: Trainer, batch: Any, batch_idx: int, length: int, count: Callable[[Any], Tensor]
    ) -> None:
        """Count the choices of a window at its beginning."""
        if not self.window.closed:
            return
        assert self._steps is not None
        counts = [count(tried) for tried in self._steps.steps(batch, batch_idx, length)]
        self.whole = sum_over_processes(trainer, torch.stack(counts).sum(0)), len(counts)

    def fractions(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """The fractions of the whole window, and weights by its tokens."""
        f, weights = super().fractions(batch)
        if self.whole is None:
            return f, weights
        counts, size = self.whole
        tokens = counts[:, -1].clamp(min=1)
        return expert_fractions(counts[:, :-1]), batch.processes * size * batch.counts[:, -1] / tokens

    def close_window(self) -> None:
        """Forget its counts, too."""
        super().close_window()
        self.whole = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the data loader as it was."""
        if self._steps is not None:
            self._steps.teardown(trainer, pl_module, stage)
            self._steps = None

    def state_dict(self) -> dict[str, Any]:
        """The counts so far and those of the whole window."""
        return super().state_dict() | {"exact": None if self.whole is None else (self.whole[0].cpu(), self.whole[1])}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Take over a state from :meth:`state_dict`."""
        super().load_state_dict(state, device)
        whole = state.get("exact")
        self.whole = None if whole is None else (whole[0].to(device), whole[1])


class RankEstimator(RunningEstimator):
    """Balances over the tokens of this process in the window so far.

    Attributes:
        process_window: The counts of this process.
    """

    def __init__(self) -> None:
        super().__init__()
        self.process_window = Window()

    def fractions(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """The fractions of this process, and weights of 1."""
        super().fractions(batch)
        f = self.process_window.add(batch.counts, batch.length)
        return f, torch.ones(len(f), device=f.device)

    def close_window(self) -> None:
        """Let the next micro-batch begin another window."""
        super().close_window()
        self.process_window.closed = True

    def state_dict(self) -> dict[str, Any]:
        """The counts of all processes and of this one."""
        return super().state_dict() | {"own": self.process_window.state_dict()}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Take over a state from :meth:`state_dict`."""
        super().load_state_dict(state, device)
        if "own" in state:
            self.process_window.load_state_dict(state["own"], device)


class MicroBatchEstimator(RunningEstimator):
    """Balances over the tokens of the micro-batch alone, as is usual elsewhere; the window is only logged."""

    def losses(self, batch: MicroBatch) -> tuple[list[Tensor], Tensor]:
        """The loss of each layer by its own fractions, and weights of 1."""
        super().fractions(batch)
        losses = [self.loss(each) for each in batch.statistics]
        return losses, torch.ones_like(torch.stack(losses))

    def loss(self, statistics: RouterStatistics) -> Tensor:
        """The loss of a layer."""
        return load_balancing_loss(expert_fractions(statistics.counts), statistics.probabilities)


class SequenceEstimator(MicroBatchEstimator):
    """Balances over the tokens of each sequence alone."""

    uses_sequences = True

    def loss(self, statistics: RouterStatistics) -> Tensor:
        """The loss of a layer."""
        return statistics.sequence_loss


GLOBAL = {
    "running": RunningEstimator,
    "warm": WarmEstimator,
    "deferred": DeferredEstimator,
    "prepass": PrepassEstimator,
}
LOCAL = {"micro": MicroBatchEstimator, "sequence": SequenceEstimator, "rank": RankEstimator}
SCOPES = (*LOCAL, "global")


def make_estimator(scope: str, estimator: str) -> RunningEstimator:
    """The estimator of a scope.

    Args:
        scope: ``"micro"``, ``"sequence"``, ``"rank"`` or ``"global"``.
        estimator: ``"running"``, ``"warm"``, ``"deferred"`` or ``"prepass"``; ``"running"`` for other scopes than
            ``"global"``.

    Raises:
        ValueError: If they do not go together.

    Example:
        >>> type(make_estimator("global", "warm")).__name__
        'WarmEstimator'
    """
    if scope == "global":
        return GLOBAL[estimator]()
    if estimator != "running":
        raise ValueError(f"Argument `estimator` must be 'running' with the scope {scope!r}, but got {estimator!r}.")
    return LOCAL[scope]()


def _cast_like(weight: Tensor, x: Tensor) -> Tensor:
    """A floating-point tensor in the dtype of the weight; any other tensor as it is."""
    return x.to(weight.dtype) if x.is_floating_point() else x
