"""Any data module, with a part of its training samples."""

from typing import Any

from lightning.pytorch import LightningDataModule

from curation.callbacks.instances.subset_loader import draw_from_subset, warn_of_other_data
from curation.instances.selection import Selection, check_selection, load_selection, read_selection


class SelectedDataModule(LightningDataModule):
    """A data module whose training data loader draws some of its samples.

    Everything else is that of the inner data module. Does what :class:`~curation.callbacks.InstanceSelection` with an
    ``index`` does, without a callback.

    Args:
        datamodule: The inner data module, with one map-style training ``DataLoader``.
        index: The samples: integers ``[n]``, a mask bool ``[N]``, a fitted selector, a
            :class:`~curation.instances.selection_index.SelectionIndex`, or a file of one
            (:func:`~curation.instances.selection.check_selection`).

    Raises:
        ValueError: If ``index`` is something else, there is no such file, it is for another number of samples, or the
            trainer overfits batches.
        TypeError: If the training data loader is of another kind or has a custom sampler.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringDataModule
        >>> datamodule = SelectedDataModule(BoringDataModule(), [3, 5])
        >>> datamodule.setup("fit")
        >>> datamodule.train_dataloader().sampler.indices.tolist()
        [3, 5]
    """

    def __init__(self, datamodule: LightningDataModule, index: Selection) -> None:
        selection = check_selection("index", index)
        if isinstance(selection, str):
            load_selection("index", selection)  # raises now
        # Nothing else is stored here: every attribute is that of the inner data module.
        vars(self).update(_selection=(datamodule, selection))

    def __getattribute__(self, name: str) -> Any:
        if name in ("train_dataloader", "_selection") or name.startswith("__"):
            return object.__getattribute__(self, name)
        return getattr(self._selection[0], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._selection[0], name, value)

    def train_dataloader(self) -> Any:
        """The training data loader of the inner data module, on the samples of the index."""
        datamodule, selection = self._selection
        if datamodule.trainer is not None and datamodule.trainer.overfit_batches:
            raise ValueError("SelectedDataModule cannot choose samples where `overfit_batches` does.")
        loader, sampler = draw_from_subset(datamodule.train_dataloader())
        index = read_selection("index", selection, len(loader.dataset))  # type: ignore[arg-type]
        warn_of_other_data(index, loader.dataset)
        sampler.indices = index.indices
        return loader
