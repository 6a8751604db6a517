"""A resumed ``curation fit`` goes on in the W&B run of its checkpoint."""

import os
from pickle import UnpicklingError
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from curation.callbacks import same_wandb_run


def continue_wandb_run(config: Any) -> None:
    """Give the W&B loggers of a configuration the run of the checkpoint that is resumed.

    Args:
        config: Configuration of ``fit``, changed in place. A logger with an ``id`` or ``resume`` of its own stays as
            it is, and so do all where ``ckpt_path`` is no file (``last``).
    """
    path = config.get("ckpt_path")
    if path is None or not os.path.isfile(path):
        return
    try:
        same = same_wandb_run(path)
    except (UnpicklingError, RuntimeError) as error:
        rank_zero_warn(f"The W&B run of {path!r} cannot be read, so a new one begins: {error}")
        return
    loggers = config.trainer.logger
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        if str(getattr(logger, "class_path", "")).endswith("WandbLogger"):
            options = logger.init_args
            if options.get("id") is None and options.get("resume") is None:
                for name, value in same.items():
                    options[name] = value
