"""The learning-rate schedule of the recipes."""

from typing import Any

import torch
from lightning.pytorch import Trainer


def linear_schedule(
    optimizer: torch.optim.Optimizer, trainer: Trainer | None = None, warmup: float = 0.0
) -> dict[str, Any]:
    """A linear rise of the learning rate, then a constant one, or a linear fall to 0 at the end of the fit.

    Args:
        optimizer: The optimizer.
        trainer: The trainer of a fit at whose end the rate is 0; None keeps it constant.
        warmup: Optimizer steps of the rise; below 1 a share of the fit.

    Returns:
        What ``configure_optimizers`` returns; the schedule counts optimizer steps.

    Raises:
        ValueError: If the fit has no end.
    """
    steps = float("inf") if trainer is None else float(trainer.estimated_stepping_batches)
    if trainer is not None and steps == float("inf"):
        raise ValueError("Argument `schedule` must be 'constant' in a fit without `max_epochs` or `max_steps`.")
    rise = warmup if warmup >= 1 or trainer is None else warmup * steps

    def factor(step: int) -> float:
        return max(0.0, min(1 - step / steps, (step + 1) / max(rise, 1)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
