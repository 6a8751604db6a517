"""A small module that is trained beside the large one, on the same batches."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from curation import rng
from curation.callbacks.lightning.collectives import average_over_processes
from curation.callbacks.lightning.loop import configure_one_optimizer, is_accumulating, muted
from curation.callbacks.lightning.seam import check_training_step


class SideTraining:
    """Trains a module inside the fit of another, and leaves that fit's random streams and logs as they are.

    Of the module's hooks ``setup``, ``configure_model``, ``configure_optimizers``, ``training_step`` and
    ``configure_gradient_clipping`` are called, the last with the trainer's values. ``self.trainer`` is the trainer of
    the fit, ``self.log`` does nothing. The precision is that of the fit, but fp32 where that scales losses
    (16-mixed). The module is the same on every process: gradients and floating buffers are averaged in one
    collective a step.

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
    def prepare(trainer: Trainer, module: LightningModule) -> None:
        """Set a module up for the fit of another, with the weights that rank 0 has."""
        module.trainer = trainer
        module.setup("fit")
        module.configure_model()
        trainer.precision_plugin.convert_module(module)
        module.to(trainer.strategy.root_device)
        if trainer.world_size > 1:
            on_host = {key: value.cpu() for key, value in module.state_dict().items()}
            module.load_state_dict(trainer.strategy.broadcast(on_host))

    def attach(self, trainer: Trainer) -> None:
        """Set the module up for a fit."""
        self.optimizer = self._scheduler = self._state = None
        self.prepare(trainer, self.module)
        self.module.train()

    def start(self) -> None:
        """Make the optimizer, once the length of the fit is known, and restore it."""
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

    def step(self, trainer: Trainer, batch: Any, index: int, seed: int) -> Tensor:
        """Train on a batch.

        Args:
            trainer: The trainer.
            batch: The batch, which ``training_step`` may change.
            index: Batches that the fit trained on before.
            seed: Seed of everything random in the step.

        Returns:
            fp32 scalar, the mean loss over the processes.
        """
        module, optimizer = self.module, self.optimizer
        assert optimizer is not None
        takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
        with rng.isolated(), muted(module), torch.enable_grad():
            rng.seed(seed, index, trainer.global_rank)
            with self.precision(trainer):
                output = module.training_step(batch, index) if takes_index else module.training_step(batch)
            loss = output.get("loss") if isinstance(output, Mapping) else output
            if not (isinstance(loss, Tensor) and loss.requires_grad and loss.numel() == 1):
                raise TypeError(
                    f"Argument `{self._name}` must be a module whose `training_step` returns its loss, but that of "
                    f"{type(module).__name__} returned {type(output).__name__}."
                )
            optimizer.zero_grad()
            loss.backward()
            mean = loss.detach().float().reshape(())
            gradients = [p.grad for p in module.parameters() if p.grad is not None]
            buffers = [b for b in module.buffers() if b.is_floating_point()]
            average_over_processes(trainer, [mean, *gradients, *buffers])
            clipping = trainer.gradient_clip_val, trainer.gradient_clip_algorithm
            module.configure_gradient_clipping(optimizer, *clipping)
            optimizer.step()
        return mean

    def end_batch(self, trainer: Trainer) -> None:
        """Go on with a schedule of steps, which counts those of the fit: it ends when the fit does."""
        if self._scheduler is not None and self._scheduler.interval == "step" and not is_accumulating(trainer):
            self._windows += 1
            if self._windows % self._scheduler.frequency == 0:
                self._scheduler.scheduler.step()

    def end_epoch(self, trainer: Trainer) -> None:
        """Go on with a schedule of epochs."""
        scheduler = self._scheduler
        by_epoch = scheduler is not None and scheduler.interval == "epoch"
        if by_epoch and (trainer.current_epoch + 1) % scheduler.frequency == 0:
            scheduler.scheduler.step()

    def detach(self) -> None:
        """Release the trainer; what a checkpoint of an exception is to hold stays."""
        self.module.trainer = None

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimizer and schedule; equal on all processes."""
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
