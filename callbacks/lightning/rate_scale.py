"""Learning rates that a callback scales for the time of a step; schedulers and monitors see them without that."""

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from lightning.pytorch import Trainer

_RATES: WeakKeyDictionary[Any, list[Any]] = WeakKeyDictionary()  # of optimizers that are in a step, whoever scales


class RateScale:
    """Multiplies the learning rates of optimizers while they step.

    Args:
        trainer: The trainer, whose optimizers are there.
        factor: Returns the factor of the step of an optimizer.
    """

    def __init__(self, trainer: Trainer, factor: Callable[[Any], float]) -> None:
        self._factor = factor
        self._optimizers = list(trainer.optimizers)
        self._hooks = [
            hook
            for optimizer in self._optimizers
            for hook in (
                optimizer.register_step_pre_hook(lambda optimizer, *_: self._scale(optimizer)),
                optimizer.register_step_post_hook(lambda optimizer, *_: _restore(optimizer)),
            )
        ]

    def _scale(self, optimizer: Any) -> None:
        _RATES.setdefault(optimizer, [group["lr"] for group in optimizer.param_groups])
        factor = self._factor(optimizer)
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * factor

    def remove(self) -> None:
        """Leave the optimizers as they were, after a step that has failed, too."""
        for optimizer in self._optimizers:
            _restore(optimizer)
        for hook in self._hooks:
            hook.remove()


def _restore(optimizer: Any) -> None:
    for group, rate in zip(optimizer.param_groups, _RATES.pop(optimizer, []), strict=False):
        group["lr"] = rate
