"""The base of every callback with a state."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class FitCallback(Callback):
    """A callback whose state belongs to a fit, and that cleans up however the fit ends.

    The evaluation of a checkpoint changes nothing. :meth:`teardown` runs after an exception, too, where Lightning
    does not call it.
    """

    fitting = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Note whether this is a fit."""
        self.fitting = stage == "fit"

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state in a fit."""
        if self.fitting:
            self.restore(state_dict)

    def restore(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned; a callback with a state overrides it."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Clean up as in :meth:`teardown`."""
        self.teardown(trainer, pl_module, "")
