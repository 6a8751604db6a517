"""The state of Lightning's loops; private names of Lightning stand in this folder alone."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.core.optimizer import _init_optimizers_and_lr_schedulers, _MockOptimizer
from torch.utils._pytree import tree_unflatten

from curation.replace import replace_attribute


def is_trained_on(trainer: Trainer) -> bool:
    """Whether the current batch is trained on.

    False in evaluation, in the sanity check, and while stochastic weight averaging updates its normalisation layers.
    """
    return trainer.training and not skips_backward(trainer)


def skips_backward(trainer: Trainer) -> bool:
    """Whether training steps run forward passes only, as stochastic weight averaging has them do at its end."""
    return trainer.fit_loop._skip_backward


def is_accumulating(trainer: Trainer) -> bool:
    """Whether the current batch is one of an accumulation window, but not its last."""
    return trainer.fit_loop._should_accumulate()


def ends_epoch(trainer: Trainer) -> bool:
    """Whether the current batch is the last of its epoch, after which the optimizer steps in any case."""
    return trainer.fit_loop.epoch_loop._num_ready_batches_reached()


def batches_of_epoch(trainer: Trainer) -> int:
    """Batches of the epoch that Lightning has begun, with the current one."""
    return trainer.fit_loop.epoch_loop.batch_progress.current.ready


def advance_schedulers(trainer: Trainer, steps: int) -> None:
    """Advance every learning-rate schedule that goes by optimizer steps, as if there had been so many more."""
    for config in trainer.lr_scheduler_configs:
        if config.interval == "step" and not config.reduce_on_plateau:
            for _ in range(steps):
                trainer.lightning_module.lr_scheduler_step(config.scheduler, None)


def logging_step(trainer: Trainer) -> int:
    """The step under which Lightning logs the metrics of the current batch."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def logs_now(trainer: Trainer) -> bool:
    """Whether Lightning writes the metrics of the current batch to its loggers."""
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return bool(every) and (logging_step(trainer) + 1) % every == 0


def training_loaders(trainer: Trainer) -> list[Any]:
    """The training data loaders of the fit; none before Lightning has prepared them."""
    loaders = trainer.fit_loop._combined_loader
    return [] if loaders is None else loaders.flattened


def curated_name(trainer: Trainer) -> str | int | None:
    """Which of several training data loaders is curated: ``curated_loader`` of the module, or of the data module.

    Returns:
        Its key, or its place in a list; None where there is one data loader, or none is named.
    """
    if len(training_loaders(trainer)) < 2:
        return None
    return _named(trainer)


def _named(trainer: Trainer) -> str | int | None:
    owners: Any = trainer.lightning_module, trainer.datamodule  # type: ignore[attr-defined]
    return next((owner.curated_loader for owner in owners if hasattr(owner, "curated_loader")), None)


def curated_loader(trainer: Trainer) -> Any:
    """The training data loader that is curated: the only one, or the one that is named."""
    name, loaders = curated_name(trainer), trainer.train_dataloader
    return loaders if name is None else loaders[name]  # type: ignore[index]


@dataclass
class Place:
    """Which of the training data loaders Lightning is preparing.

    Attributes:
        number: Its number.
        curated: Number of the one that is curated; 0 where none is named.
        count: How many there are.
        cycles: Whether one that ends before the epoch begins again.
    """

    number: int = 0
    curated: int = 0
    count: int = 1
    cycles: bool = False


def prepared_place(trainer: Trainer) -> Place:
    """The place of the training data loader that Lightning is preparing, in ``setup_data`` of its loop.

    Raises:
        ValueError: If ``curated_loader`` names none of several data loaders.
    """
    frame = inspect.currentframe()
    while frame is not None and not (
        frame.f_code.co_name == "setup_data" and frame.f_locals.get("self") is trainer.fit_loop
    ):
        frame = frame.f_back
    loaders = None if frame is None else frame.f_locals["combined_loader"]
    if frame is None or loaders is None or len(loaders.flattened) < 2:
        return Place()
    count, name = len(loaders.flattened), _named(trainer)
    numbers: Any = tree_unflatten(list(range(count)), loaders._spec)
    names = list(numbers) if isinstance(numbers, dict) else list(range(len(numbers)))
    if name is not None and (name not in names or not isinstance(numbers[name], int)):
        raise ValueError(f"`curated_loader` must name one of the training data loaders, {names}, but is {name!r}.")
    curated = 0 if name is None else numbers[name]
    return Place(len(frame.f_locals["dataloaders"]), curated, count, loaders._mode == "max_size_cycle")


def has_length(loader: Any) -> bool:
    """Whether a data loader tells how many batches it has."""
    try:
        len(loader)
    except (TypeError, NotImplementedError):
        return False
    return True


def prepares_training_loader(trainer: Trainer) -> bool:
    """Whether the data loader that Lightning is preparing is for training: a tuner prepares one for validation."""
    loop = trainer.fit_loop
    return trainer.training and (loop._combined_loader is None or loop._should_reload_train_dl)


def forget_training_loader(trainer: Trainer) -> None:
    """Have Lightning ask for the training data loader again when it needs one."""
    trainer.fit_loop._combined_loader = None


def reload_training_loader(trainer: Trainer) -> None:
    """Have Lightning prepare the training data loader again, and count its batches, now."""
    forget_training_loader(trainer)
    trainer.fit_loop.setup_data()


def restart_epoch(trainer: Trainer) -> None:
    """Have Lightning begin the epoch that it resumes with its first batch."""
    loop = trainer.fit_loop.epoch_loop
    loop.reset()
    loop.restarting = False
    loop.reset_restart_stage()


def next_epoch(trainer: Trainer) -> int:
    """The epoch for which a training data loader is prepared."""
    progress: Any = trainer.fit_loop.epoch_progress.current
    return progress.processed


def ends_before(trainer: Trainer, epoch: int) -> bool:
    """Whether the fit ends before an epoch."""
    loop = trainer.fit_loop
    return (
        0 <= (-1 if loop.max_epochs is None else loop.max_epochs) <= epoch
        or 0 <= loop.max_steps <= trainer.global_step
        or (trainer.should_stop and loop._can_stop_early)
    )


def move_to_device(trainer: Trainer, batch: Any, transfer: Callable[..., Any] | None = None) -> Any:
    """A batch as the training step would get it: converted, through the transfer hooks, on the device.

    Args:
        trainer: The trainer.
        batch: A batch as the data loader yields it.
        transfer: What moves it; None for the strategy's ``batch_to_device``.
    """
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return (transfer or trainer.strategy.batch_to_device)(batch, device=None, dataloader_idx=0)


@contextmanager
def muted(pl_module: LightningModule) -> Iterator[None]:
    """Let ``self.log`` and ``self.log_dict`` of a module do nothing: Lightning would refuse them or count twice."""
    with ExitStack() as stack:
        for name in ("log", "log_dict"):
            stack.callback(replace_attribute(pl_module, name, lambda *_, **__: None))
        yield


def wait_for(device: torch.device) -> None:
    """Wait until an accelerator has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def trained_batches(trainer: Trainer) -> int:
    """The number of batches that a trainer has trained on, in earlier fits, too."""
    return trainer.fit_loop.epoch_loop.batch_progress.total.completed


def batches_of_epochs(trainer: Trainer, batches: float) -> float:
    """The number of batches that ``max_epochs`` lets a fit train on; infinity without it.

    Args:
        trainer: The trainer.
        batches: Batches of an epoch.
    """
    epochs = trainer.fit_loop.max_epochs
    if epochs in (None, -1):
        return float("inf")
    averages = any(
        isinstance(c, StochasticWeightAveraging) and c._model_contains_batch_norm
        for c in trainer.callbacks  # type: ignore[attr-defined]
    )
    return float((epochs - averages) * batches)  # its last epoch trains nothing


def fit_batches(trainer: Trainer, batches: int) -> float:
    """The number of batches that a fit trains on; infinity where nothing but the clock ends it.

    Args:
        trainer: The trainer.
        batches: Length of the training data loader.
    """
    limit = trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    loop, total = trainer.fit_loop, batches_of_epochs(trainer, batches)
    if loop.max_steps != -1 and trainer.lightning_module.automatic_optimization and batches:
        micro = trainer.accumulate_grad_batches
        epochs, steps = divmod(loop.max_steps, -(-batches // micro))
        total = min(total, float(epochs * batches + min(batches, steps * micro)))
    return total


def configure_one_optimizer(name: str, module: LightningModule) -> tuple[torch.optim.Optimizer, Any]:
    """The optimizer of a module that is not the trainer's own, and its schedule (``LRSchedulerConfig``) or None.

    Args:
        name: Name of the argument that holds the module, for errors.
        module: The module; its ``trainer`` is set.

    Raises:
        TypeError: If it has no optimizer, several ones, or a schedule that waits for a metric.
    """
    made = (
        f"Argument `{name}` must be a module with one optimizer, but `{type(module).__name__}.configure_optimizers`"
    )
    try:
        optimizers, schedulers = _init_optimizers_and_lr_schedulers(module)
    except RuntimeError as error:
        raise TypeError(f"{made} gives several: {error}") from error
    if not optimizers or isinstance(optimizers[0], _MockOptimizer):
        raise TypeError(f"{made} gives none.")
    if len(schedulers) > 1:
        raise TypeError(f"Argument `{name}` must be a module with one schedule at most, but it has several.")
    scheduler = schedulers[0] if schedulers else None
    if scheduler is not None and scheduler.reduce_on_plateau:
        raise TypeError(f"Argument `{name}` must not have a schedule that waits for a metric, which it does not log.")
    return optimizers[0], scheduler
