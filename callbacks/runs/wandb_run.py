"""The W&B run that a checkpoint belongs to, so that a resumed fit goes on in it."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import WandbLogger

KEY = "wandb_run"  # in a checkpoint


def enter_wandb_run(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Enter the id of the first W&B run of a trainer into a checkpoint; nothing where it has none."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger) and logger.version is not None:
            checkpoint[KEY] = str(logger.version)
            return


def same_wandb_run(checkpoint: str | Path) -> dict[str, str]:
    """Arguments of ``WandbLogger`` with which a resumed fit goes on in the W&B run that the checkpoint belongs to.

    ``ExactResume`` enters the id of the run into every checkpoint, and ``curation fit --ckpt_path`` does this by
    itself, unless it is told ``--same_wandb_run=false``.

    Args:
        checkpoint: File of a checkpoint.

    Returns:
        ``id`` and ``resume``; empty for a checkpoint without an id, or a folder (of shards).

    Raises:
        FileNotFoundError: If there is no such file.
        pickle.UnpicklingError: If it holds objects that are not loaded with ``weights_only``.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "last.ckpt"
        >>> torch.save({"wandb_run": "abc"}, file)
        >>> same_wandb_run(file)  # WandbLogger(project="p", **same_wandb_run(file))
        {'id': 'abc', 'resume': 'allow'}
    """
    if Path(checkpoint).is_dir():
        return {}
    content = torch.load(checkpoint, map_location="meta", weights_only=True, mmap=True)
    return {"id": content[KEY], "resume": "allow"} if KEY in content else {}
