"""The base of callbacks that keep a store with a row for every sample."""

from typing import Any, Generic, TypeVar

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from curation.callbacks.lightning.fit_callback import FitCallback
from curation.callbacks.lightning.loop import curated_loader, curated_name, training_loaders
from curation.checks import check_integer
from curation.records.sample_store import SampleStore

S = TypeVar("S", bound=SampleStore)


class StoreRecord(FitCallback, Generic[S]):
    """Makes the store with the first batch, saves it with checkpoints, and restores it.

    Args:
        size: Number of samples, more than the largest id; None for the length of the training data set. Compared with
            the ids of the first batch.

    Attributes:
        store: The record; None before the first batch was trained on.
    """

    store_type: type[S]

    def __init__(self, size: int | None = None) -> None:
        self.size: int | None = check_integer("size", size, 1, optional=True)
        self.store: S | None = None
        self._state: dict[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier fit."""
        super().setup(trainer, pl_module, stage)
        if self.fitting:
            self.store = self._state = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse data without a length, where no size is given."""
        if len(training_loaders(trainer)) == 1 or curated_name(trainer) is not None:
            self._samples(trainer)

    def _samples(self, trainer: Trainer) -> int:
        if self.size is not None:
            return self.size
        dataset = getattr(curated_loader(trainer), "dataset", None)
        if not hasattr(dataset, "__len__"):
            raise ValueError(
                f"Argument `size` must be given for a {type(dataset).__name__}, which has no length, but got None."
            )
        return len(dataset)  # type: ignore[arg-type]

    def store_for(self, trainer: Trainer, ids: Tensor) -> S:
        """The store, made where there is none.

        Args:
            trainer: The trainer.
            ids: int64 ``[B]``, the ids of the batch, of all ranks.

        Raises:
            ValueError: If the first batch has an id that is no row of the store, or neither a size nor a length is
                known.
        """
        if self.store is None:
            size = self._samples(trainer)
            if int(ids.max()) >= size:  # only of the first batch, since this waits for the device
                raise ValueError(
                    f"Argument `size` must be more than every sample id, but {int(ids.max())} >= {size}."
                )
            self.store = self.store_type(size, ids.device)
            if self._state is not None:
                self.store.load_state_dict(self._state)
        return self.store

    def state_dict(self) -> dict[str, Any]:
        """The record; equal on all ranks."""
        return {"store": self._state if self.store is None else self.store.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        """Keep the record of the checkpoint until the first batch makes the store."""
        self._state = state["store"]
