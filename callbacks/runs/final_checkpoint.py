"""The weights that a fit ends with."""

import os
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from curation.callbacks.lightning.loggers import not_essential


class FinalCheckpoint(Checkpoint):
    """Saves ``last.ckpt`` when a fit ends, on an error or an interruption, too.

    ``ModelCheckpoint`` saves at its own times, so that what was trained after the last of them is lost. The file is
    beside those of the first ``ModelCheckpoint``; without one it is in ``checkpoints`` in the logger's folder. It is
    what ``ckpt_path="last"`` resumes from, and it replaces the file that ``ModelCheckpoint(save_last=True)`` wrote.
    With several processes an error of one of them saves nothing, since the others do not take part; an interruption
    by the keyboard does.

    Example:
        >>> from lightning.pytorch.callbacks import ModelCheckpoint
        >>> callbacks = [ModelCheckpoint(monitor="val_loss"), FinalCheckpoint()]  # Trainer(callbacks=callbacks)
    """

    def __init__(self) -> None:
        self._unsaved = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin with nothing to save."""
        self._unsaved = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note that there will be something to save."""
        self._unsaved = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save."""
        self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save, but hide no error behind another."""
        if trainer.world_size == 1 or isinstance(exception, KeyboardInterrupt):
            with not_essential("The final checkpoint"):
                self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if not self._unsaved or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        trainer.save_checkpoint(os.path.join(self._folder(trainer), "last.ckpt"))
        self._unsaved = False

    def _folder(self, trainer: Trainer) -> str:
        for other in self._model_checkpoints(trainer):
            if other.dirpath is not None:
                return str(other.dirpath)
        return os.path.join(trainer.log_dir or trainer.default_root_dir, "checkpoints")

    @staticmethod
    def _model_checkpoints(trainer: Trainer) -> list[ModelCheckpoint]:
        return [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
