"""A batch size that follows the noise of the gradients."""

from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor

from curation.batch_size import MovingMoments, gradient_moments, wanted_rows
from curation.callbacks.batch_size.accumulation import VariedBatchSize
from curation.callbacks.lightning.collectives import sum_over_processes
from curation.callbacks.lightning.loop import batches_of_epoch, is_trained_on
from curation.checks import check_integer, check_number


class AdaptiveBatchSize(VariedBatchSize):
    r"""Lets the rows of an optimizer step grow until the noise of its gradient is a given part of it.

    The norm test of AdAdaGrad (arXiv 2402.11215): with ``V`` the trace of the covariance of the gradient of a row and
    ``g`` the gradient of a step, its rows become at least

    .. math:: b = \frac{V}{\eta^2 |g|^2}

    ``V`` is estimated from the gradients of the micro-batches of all processes in every ``every``-th step
    (:func:`~curation.batch_size.gradient_moments`): their norms are taken as they arrive, with no gradient of a
    single row and no copy of a gradient. Under FSDP2, where no process has the gradient of its own micro-batch, those
    of all processes together are compared, and a test copies the part of the gradients that a process keeps. The
    estimates are averaged over tests, and read by the host, which waits for the device once in a test. The size never
    shrinks. How it changes, and what a module that optimizes by hand has to do, is told at
    :class:`~curation.callbacks.BatchSizeScheduler`.

    Learning-rate schedules by step go by steps of the first size, since the number of steps is not known before:
    they are functions of the samples seen, end with the fit, and ``trainer.estimated_stepping_batches`` counts them.
    A module that optimizes by hand steps its schedules itself.

    Logs ``curation/batch_size``, and after each test ``curation/gradient_noise_scale``, the rows at which noise and
    gradient are equal (arXiv 1812.06162), infinite where no gradient shows in the noise.

    Args:
        eta: Noise of a step relative to its gradient that is allowed, in (0, inf); .1 to .5 is usual. Less makes
            larger steps.
        growth: Largest size by the first.
        first: Rows of a step over all processes at the start, at least two micro-batches; None for
            ``accumulate_grad_batches`` batches of every process.
        every: Steps from one test to the next.
        decay: Share of the old averages that a test keeps, in [0, 1).
        couple: How the learning rate of a step follows its rows: ``"none"``; by their square root (``"sqrt"``);
            ``"linear"``; or ``"auto"``, linear for SGD and by the square root for others. The rate of the optimizer
            is that of the first size.
        batch_size: Rows of a batch of the data loader, for loaders that have no ``batch_size``.

    Attributes:
        rows: Rows of the current step, over all processes.
        sizes: Every size with the samples seen when it began: ``(samples, rows)``.
        noise_scales: Noise scale at every test, with the samples seen: ``(samples, rows)``.
        steps: Optimizer steps so far.

    Raises:
        ValueError: If a step has one micro-batch at the start; as :class:`~curation.callbacks.BatchSizeScheduler`.
        TypeError: With several optimizers; as :class:`~curation.callbacks.BatchSizeScheduler`.
        RuntimeError: If a weight gets the gradient of a batch in several parts.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> adaptive = AdaptiveBatchSize(eta=0.3, growth=8)
        >>> trainer = Trainer(accumulate_grad_batches=2, callbacks=[adaptive], logger=False, barebones=True)
    """

    paces_schedulers = True

    def __init__(
        self,
        eta: float = 0.3,
        growth: int = 16,
        first: int | None = None,
        every: int = 50,
        decay: float = 0.95,
        couple: Literal["none", "auto", "sqrt", "linear"] = "none",
        batch_size: int | None = None,
    ) -> None:
        self.eta = check_number("eta", eta, "(0, inf)")
        self.growth = check_integer("growth", growth, 2)
        self.every = check_integer("every", every, 1)
        self.decay = check_number("decay", decay, "[0, 1)")
        super().__init__(first, couple, batch_size)

    def _reset(self) -> None:
        super()._reset()
        self.noise_scales: list[tuple[int, float]] = []
        self._moving = MovingMoments(self.decay)
        self._wanted = 1
        self._next_test = 0  # step
        self._forget()

    def _forget(self) -> None:
        """End a test."""
        for hook in getattr(self, "_hooks", []):
            hook.remove()
        self._hooks: list[Any] = []
        self._weights: list[Tensor] = []
        self._before: dict[int, Tensor] = {}  # gradients of a process after the last batch, under FSDP2
        self._squares: list[Tensor] = []  # of the gradients in this window
        self._parts: list[int] = []  # gradients that a weight got in this window
        self._scale: Any = 1.0  # of the current loss, as against its mean over the rows
        self._passes = 0  # backward passes over whole batches in this window
        self._tests = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot be compared."""
        if len(trainer.optimizers) > 1:
            raise TypeError(f"AdaptiveBatchSize needs one optimizer, but got {len(trainer.optimizers)}.")
        super().on_train_start(trainer, pl_module)
        if self._compared(trainer, self._start)[0] < 2:
            raise ValueError(
                "Argument `first` must be two micro-batches or more, of which gradients are compared, but got "
                f"{self.first}. Set `accumulate_grad_batches=2`, or halve the batch size of the data loader."
            )

    def _compared(self, trainer: Trainer, size: int) -> tuple[int, float]:
        """Number of the micro-batches of a step that have a gradient each, and their rows."""
        if isinstance(trainer.strategy, ModelParallelStrategy):
            return size, self._unit
        return size * trainer.world_size, self._unit / trainer.world_size

    def measure(self, trainer: Trainer) -> None:
        """Begin with the first size."""
        super().measure(trainer)
        self._wanted = max(self._wanted, self._start)

    def wanted(self, trained: int) -> int:
        """Micro-batches of a step by the last test."""
        return self._wanted

    # ------------------------------------------------------------------ a test

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Listen to the gradients of a step that is tested."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        begun = batches_of_epoch(trainer) - 1
        whole = begun % self.size == 0 and begun + self.size <= trainer.num_training_batches
        if whole and is_trained_on(trainer) and self.steps >= self._next_test:
            self._forget()
            self._tests, self._next_test = True, self.steps + self.every
            groups = trainer.optimizers[0].param_groups
            self._weights = [w for group in groups for w in group["params"] if w.requires_grad]
            self._parts = [0] * len(self._weights)
            if not isinstance(trainer.strategy, ModelParallelStrategy):
                self._hooks = [w.register_hook(partial(self._take, i)) for i, w in enumerate(self._weights)]

    def _take(self, i: int, gradient: Tensor) -> None:
        """Add the squared norm of a weight's gradient of the current batch."""
        self._parts[i] += 1
        norm = torch.linalg.vector_norm(gradient.detach(), dtype=_at_least_fp32(gradient))
        self._squares.append((norm / self._scale).square())

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Note by what the loss is scaled."""
        super().on_before_backward(trainer, pl_module, loss)
        if self._tests:
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            one = torch.ones((), device=loss.device)
            self._scale = (one if scaler is None else scaler.scale(one)) / self.size
            self._passes += self._rows == self._usual

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the gradients with those before this batch, where hooks see none."""
        if self._tests and not self._hooks:
            for i, weight in enumerate(self._weights):
                if weight.grad is not None:
                    gradient = _own_part(weight.grad)
                    self._take(i, gradient - self._before[i] if i in self._before else gradient)
                    self._before[i] = gradient.clone()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Compare the gradients of the micro-batches with their mean, and decide the size of the next steps."""
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if not self._tests:
            return
        if max(self._parts, default=0) > self.size:
            raise RuntimeError(
                "AdaptiveBatchSize needs one backward pass for each batch, and the gradient of each weight in one "
                "part, but a weight got more parts than there were batches. Reentrant checkpoints do that, and "
                "several passes of a module that optimizes by hand."
            )
        gradients = [w.grad for group in optimizer.param_groups for w in group["params"] if w.grad is not None]
        if gradients and self._squares:
            norms = torch.stack([torch.linalg.vector_norm(_own_part(g), dtype=_at_least_fp32(g)) for g in gradients])
            squares = torch.stack([torch.stack(self._squares).sum(), norms.square().sum()])
            if self._passes < self.size:  # a batch of this process was short, or skipped
                squares = squares * torch.nan
            square_sum, mean_square = sum_over_processes(trainer, squares)
            if self._hooks:  # every process has the mean gradient
                mean_square = mean_square / trainer.world_size
            self._moving.update(gradient_moments(square_sum, mean_square, *self._compared(trainer, self.size)))
            self._decide()
        self._forget()

    def _decide(self) -> None:
        moments = self._moving.moments
        rows, noise_scale = torch.stack([wanted_rows(moments, self.eta), moments.noise_scale]).tolist()
        if rows == rows:  # not before the first finite estimate
            most = self.growth * self._start
            self._wanted = max(self._wanted, min(most, -int(-rows // self._unit)))
            self.noise_scales.append((self.seen, noise_scale))

    def log_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the rows of a step, and the noise scale of the last test."""
        super().log_step(trainer, pl_module)
        if self.noise_scales:
            value = self.noise_scales[-1][1]
            pl_module.log("curation/gradient_noise_scale", value, on_step=True, on_epoch=False, batch_size=1)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the weights as they were."""
        super().teardown(trainer, pl_module, stage)
        self._forget()

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The state of the size, the averages and the tests so far; equal on all ranks."""
        return {
            **super().state_dict(),
            "wanted": self._wanted,
            "next_test": self._next_test,
            "moments": self._moving.values.cpu(),
            "noise_scales": [list(test) for test in self.noise_scales],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on with the averages of the checkpoint."""
        super().restore(state)
        self._wanted, self._next_test, self._moving.values = (
            state[name] for name in ("wanted", "next_test", "moments")
        )
        self.noise_scales = [(samples, rows) for samples, rows in state["noise_scales"]]


def _own_part(gradient: Tensor) -> Tensor:
    """The part of a gradient that this process keeps."""
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _at_least_fp32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
