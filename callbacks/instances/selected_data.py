"""Any data module, with a part of its training samples."""

from typing import Any

from lightning.pytorch import LightningDataModule

from curation.callbacks.instances.subset_loader import draw_from_subset, warn_of_other_data
from curation.instances.selection_index import SelectionIndex


class SelectedDataModule(LightningDataModule):
    """A data module whose training data loader draws the samples of an index; all else is the inner one's.

    For :class:`~curation.callbacks.InstanceSelection` without a callback.

    Args:
        datamodule: The inner one, with one map-style training ``DataLoader``.
        index: File of :meth:`~curation.instances.selection_index.SelectionIndex.save`.

    Raises:
        ValueError: If there is no such file, it is of another number of samples, or the trainer overfits batches.
        TypeError: If the training data loader is of another kind or has a sampler of its own.
    """

    def __init__(self, datamodule: LightningDataModule, index: str) -> None:
        vars(self).update(_selection=(datamodule, index, SelectionIndex.load(index)))  # no state but the inner one's

    def __getattribute__(self, name: str) -> Any:
        if name in ("train_dataloader", "_selection") or name.startswith("__"):
            return object.__getattribute__(self, name)
        return getattr(self._selection[0], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._selection[0], name, value)

    def train_dataloader(self) -> Any:
        """The inner one's, on the samples of the index."""
        datamodule, path, index = self._selection
        if datamodule.trainer is not None and datamodule.trainer.overfit_batches:
            raise ValueError("SelectedDataModule cannot choose samples where `overfit_batches` does.")
        loader, sampler = draw_from_subset(datamodule.train_dataloader())
        samples = len(loader.dataset)  # type: ignore[arg-type]
        if index.size != samples:
            raise ValueError(
                f"Argument `index` must be of the {samples} training samples, but got {path!r} of {index.size}."
            )
        warn_of_other_data(index, loader.dataset)
        sampler.indices = index.indices
        return loader
