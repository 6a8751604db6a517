"""How many optimizer steps a fit takes, where their size changes."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer


def estimate_steps(trainer: Trainer, count: Callable[[], int]) -> Callable[[], None]:
    """Let ``trainer.estimated_stepping_batches`` count steps by a plan.

    It is a property, which only a class can replace: the trainer gets a class of its own, derived from its class.

    Args:
        trainer: The trainer.
        count: Steps of a fit of ``max_epochs``; asked when the training data loader is there.

    Returns:
        A function that gives the trainer its class back.
    """
    cls = type(trainer)

    def estimated_stepping_batches(self: Any) -> int | float:
        if self.max_epochs == -1:
            return cls.estimated_stepping_batches.fget(self)  # type: ignore[attr-defined]
        if self.train_dataloader is None:
            self.fit_loop.setup_data()
        if self.num_training_batches == float("inf"):
            return self.max_steps
        steps = count()
        return steps if self.max_steps == -1 else min(steps, self.max_steps)

    namespace = {"estimated_stepping_batches": property(estimated_stepping_batches), "__module__": cls.__module__}
    planned = type(cls.__name__, (cls,), namespace)
    trainer.__class__ = planned

    def undo() -> None:
        if trainer.__class__ is planned:
            trainer.__class__ = cls

    return undo
