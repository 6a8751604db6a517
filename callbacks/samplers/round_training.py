"""The base of callbacks that give a sampler of rounds the losses of a fit."""

from typing import Any, Generic, TypeVar

from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from curation.callbacks.lightning.seam import SeamClient, check_one_loader, check_training_step
from curation.samplers.rounds import RoundSampler

S = TypeVar("S", bound=RoundSampler)


class RoundTraining(SeamClient, Generic[S]):
    """Finds the sampler of the training data loader, restores it before it is iterated, and saves its state.

    Attributes:
        sampler: The sampler of the training data loader; None before the loader is prepared.
    """

    sampler_type: type[S]

    def __init__(self) -> None:
        self.sampler: S | None = None
        self._state: dict[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier fit; watch for the training data loader."""
        super().setup(trainer, pl_module, stage)
        if self.fitting:
            check_training_step(pl_module)
            self.sampler = self._state = None

    def watch(self, dataloader: Any) -> None:
        """Find the sampler, and restore its state before it is iterated."""
        name = self.sampler_type.__name__
        sampler = dataloader.sampler if isinstance(dataloader, DataLoader) else None
        if not isinstance(sampler, self.sampler_type):
            raise ValueError(
                f"{type(self).__name__} needs a training `DataLoader(sampler={name}(...))`, but its sampler is "
                f"{type(sampler).__name__}. (`overfit_batches` takes samplers away.)"
            )
        if dataloader.batch_size != sampler.batch_size:
            raise ValueError(
                f"The data loader must have the `batch_size` of its sampler, {sampler.batch_size}, but has "
                f"{dataloader.batch_size!r}."
            )
        if sampler is not self.sampler:  # the first of the fit, or one of a reloaded data loader
            state = self._state if self.sampler is None else self.sampler.state_dict()
            if state is None:
                sampler.reset()
            else:
                sampler.load_state_dict(state)
        self.sampler = sampler

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse several data loaders, whose losses would be mixed up."""
        check_one_loader(trainer, self)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count an epoch that ended without its last batch, because a hook asked for it."""
        if self.sampler is not None:
            self.sampler.end_epoch()

    def state_dict(self) -> dict[str, Any]:
        """The state of the sampler; equal on all ranks."""
        return {"sampler": self._state if self.sampler is None else self.sampler.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        """Keep the state of the sampler until the data loader is prepared."""
        self._state = state["sampler"]
