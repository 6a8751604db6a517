"""The base of every callback with a state."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from curation.callbacks.lightning.loggers import log_settings
from curation.callbacks.lightning.loop import training_loaders
from curation.settings import Configured


class FitCallback(Configured, Callback):
    """A callback whose state belongs to a fit, and that cleans up however the fit ends.

    The evaluation of a checkpoint changes nothing. :meth:`teardown` runs after an exception, too, where Lightning
    does not call it. The first such callback of a trainer logs the settings of all, and of the data.
    """

    fitting = False
    _logs_settings = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Note whether this is a fit."""
        self.fitting = stage == "fit"
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        self._logs_settings = (
            self.fitting and next((c for c in callbacks if isinstance(c, FitCallback)), None) is self
        )
        if self._logs_settings:  # before Lightning's own, with which TensorBoard writes its file
            log_settings(trainer, [*callbacks, trainer.datamodule])  # type: ignore[attr-defined]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the settings of the sampler, once: the data loader is there now."""
        if self._logs_settings:
            self._logs_settings = False
            loaders = training_loaders(trainer)
            batches = [getattr(loader, "batch_sampler", None) for loader in loaders]
            samplers = [getattr(loader, "sampler", None) for loader in (*loaders, *batches)]
            log_settings(trainer, [sampler for sampler in samplers if isinstance(sampler, Configured)][:1])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state in a fit."""
        if self.fitting:
            self.restore(state_dict)

    def restore(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned; a callback with a state overrides it."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Clean up as in :meth:`teardown`."""
        self.teardown(trainer, pl_module, "")
