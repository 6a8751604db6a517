"""A small module that is trained beside the large one, on the same batches."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase
from torchmetrics import Metric

from curation import rng
from curation.callbacks.lightning.collectives import average_over_processes
from curation.callbacks.lightning.loop import configure_one_optimizer, is_accumulating, muted
from curation.callbacks.lightning.seam import check_training_step


class SideTraining:
    """Trains a module inside the fit of another, and leaves that fit's random streams and logs as they are.

    Of the module's hooks ``setup``, ``configure_model``, ``configure_optimizers``, ``training_step`` and
    ``configure_gradient_clipping`` are called, the last with the trainer's values. ``self.trainer`` is the trainer of
    the fit, ``self.log`` does nothing. The precision is that of the fit, but fp32 where that scales losses
    (16-mixed). The module is the same on every process: gradients and the floating buffers that a step has
    changed are averaged in one collective.

    Args:
        name: Name of the argument that holds the module, for errors.
        module: The module.

    Raises:
        TypeError: If it has no loss or no optimizer of its own, optimizes by itself, or fetches its own batches.
    """

    def __init__(self, name: str, module: LightningModule) -> None:
        kind = type(module).__name__
        for hook in ("training_step", "configure_optimizers"):
            if not is_overridden(hook, module):
                raise TypeError(f"Argument `{name}` must be a module that is trained, but {kind} has no `{hook}`.")
        if not module.automatic_optimization:
            raise TypeError(f"Argument `{name}` must be optimized automatically, but {kind} does so by itself.")
        check_training_step(module)
        self._name = name
        self.module = module
        self.optimizer: torch.optim.Optimizer | None = None
        self._scheduler: Any = None
        self._windows = 0
        self._state: dict[str, Any] | None = None

    @staticmethod
    def prepare(trainer: Trainer, module: LightningModule, seed: int) -> None:
        """Set a module up for the fit of another, with the weights that rank 0 has."""
        with rng.isolated():
            rng.seed(seed)
            module.trainer = trainer
            module.setup("fit")
            module.configure_model()
        trainer.precision_plugin.convert_module(module)
        module.to(trainer.strategy.root_device)
        if trainer.world_size > 1:
            state = module.state_dict()
            on_host = {key: value.cpu() if isinstance(value, Tensor) else value for key, value in state.items()}
            module.load_state_dict(trainer.strategy.broadcast(on_host))

    def attach(self, trainer: Trainer, seed: int) -> None:
        """Set the module up for a fit."""
        self.optimizer = self._scheduler = self._state = None
        self.prepare(trainer, self.module, seed)

    def start(self) -> None:
        """Make the optimizer, once the length of the fit is known, and restore it."""
        with rng.isolated():
            self.optimizer, self._scheduler = configure_one_optimizer(self._name, self.module)
        self._windows = 0
        state, self._state = self._state, None
        if state is not None and state["optimizer"] is not None:
            self.optimizer.load_state_dict(state["optimizer"])
            self._windows = state["windows"]
            if self._scheduler is not None and state["scheduler"] is not None:
                self._scheduler.scheduler.load_state_dict(state["scheduler"])

    @contextmanager
    def precision(self, trainer: Trainer) -> Iterator[None]:
        """The precision of the module's forward passes."""
        plugin = trainer.precision_plugin
        with nullcontext() if getattr(plugin, "scaler", None) is not None else plugin.forward_context():
            yield

    def step(self, trainer: Trainer, batch: Any, index: int, seed: int) -> Tensor | None:
        """Train on a batch.

        Args:
            trainer: The trainer.
            batch: The batch, which ``training_step`` may change.
            index: Batches that the fit trained on before.
            seed: Seed of everything random in the step.

        Returns:
            fp32 scalar, the mean loss over the processes; None if ``training_step`` has skipped the batch. Of several
            processes, one that skips it counts as 0.
        """
        module, optimizer = self.module, self.optimizer
        assert optimizer is not None
        takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
        versions = {id(buffer): buffer._version for buffer in module.buffers()}
        with rng.isolated(), muted(module), torch.enable_grad():
            rng.seed(seed, index, trainer.global_rank)
            with self.precision(trainer):
                output = module.training_step(batch, index) if takes_index else module.training_step(batch)
            loss = output.get("loss") if isinstance(output, Mapping) else output
            if loss is None and trainer.world_size == 1:
                return None
            if loss is not None and not (isinstance(loss, Tensor) and loss.requires_grad and loss.numel() == 1):
                raise TypeError(
                    f"Argument `{self._name}` must be a module whose `training_step` returns its loss, but that of "
                    f"{type(module).__name__} returned {type(output).__name__}."
                )
            optimizer.zero_grad()
            mean = torch.zeros((), device=module.device)
            if loss is not None:
                loss.backward()
                mean = loss.detach().float().reshape(())
            if trainer.world_size > 1:
                self._average(trainer, mean, versions)
            clipping = trainer.gradient_clip_val, trainer.gradient_clip_algorithm
            module.configure_gradient_clipping(optimizer, *clipping)
            optimizer.step()
        for metric in module.modules():
            if isinstance(metric, Metric):  # nothing computes it
                metric.reset()
        return mean

    def _average(self, trainer: Trainer, loss: Tensor, versions: dict[int, int]) -> None:
        """Average the loss, all gradients and the buffers that the step has changed; unused parameters count as 0."""
        buffers = []
        for part in self.module.modules():
            norm = isinstance(part, _NormBase) and part.training  # whose kernel counts no versions
            changed = [b for b in part.buffers(recurse=False) if norm or b._version != versions.get(id(b))]
            buffers += [b for b in changed if b.is_floating_point()]
        for p in self.module.parameters():
            if p.requires_grad and p.grad is None:
                p.grad = torch.zeros_like(p)
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        average_over_processes(trainer, [loss, *gradients, *buffers])

    def end_batch(self, trainer: Trainer) -> None:
        """Go on with a schedule: one of steps counts those of the fit, so it ends when the fit does."""
        scheduler = self._scheduler
        if scheduler is None:
            return
        if scheduler.interval == "epoch":
            due = trainer.is_last_batch and (trainer.current_epoch + 1) % scheduler.frequency == 0
        else:
            self._windows += not is_accumulating(trainer)
            due = not is_accumulating(trainer) and self._windows % scheduler.frequency == 0
        if due:
            self.module.lr_scheduler_step(scheduler.scheduler, None)

    def detach(self) -> None:
        """Release the trainer; what a checkpoint of an exception is to hold stays."""
        self.module.trainer = None

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimizer and schedule; equal on all processes."""
        if self._state is not None:  # a checkpoint of before the fit has begun again
            return {**self._state, "module": self.module.state_dict()}
        return {
            "module": self.module.state_dict(),
            "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
            "scheduler": None if self._scheduler is None else self._scheduler.scheduler.state_dict(),
            "windows": self._windows,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the weights now, the rest in :meth:`start`."""
        self.module.load_state_dict(state["module"])
        self._state = state
