"""Any data module, with a part of its training samples."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule

from curation.callbacks.instances.subset_loader import draw_from_subset, warn_of_other_data
from curation.checks import check_path
from curation.instances.selection_index import SelectionIndex


class SelectedDataModule(LightningDataModule):
    """A data module whose training data loader draws the samples of an index file.

    Everything else is that of the inner data module. Does what :class:`~curation.callbacks.InstanceSelection` with an
    ``index`` does, without a callback.

    Args:
        datamodule: The inner data module, with one map-style training ``DataLoader``.
        index: The file that :meth:`~curation.instances.selection_index.SelectionIndex.save` wrote.

    Raises:
        ValueError: If there is no such file, it is for another number of samples, or the trainer overfits batches.
        TypeError: If the training data loader is of another kind or has a custom sampler.

    Example:
        >>> import tempfile
        >>> from lightning.pytorch.demos.boring_classes import BoringDataModule
        >>> file = Path(tempfile.mkdtemp(), "kept.parquet")
        >>> SelectionIndex([3, 5], scores=[0.9, 0.8], ranks=[0, 1], size=64).save(file)
        >>> datamodule = SelectedDataModule(BoringDataModule(), file)
        >>> datamodule.setup("fit")
        >>> datamodule.train_dataloader().sampler.indices.tolist()
        [3, 5]
    """

    def __init__(self, datamodule: LightningDataModule, index: str | Path) -> None:
        path: str = check_path("index", index)
        # Nothing else is stored here: every attribute is that of the inner data module.
        vars(self).update(_selection=(datamodule, path, SelectionIndex.load(path)))

    def __getattribute__(self, name: str) -> Any:
        if name in ("train_dataloader", "_selection") or name.startswith("__"):
            return object.__getattribute__(self, name)
        return getattr(self._selection[0], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._selection[0], name, value)

    def train_dataloader(self) -> Any:
        """The training data loader of the inner data module, on the samples of the index."""
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
