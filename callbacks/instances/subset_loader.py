"""A data loader that draws from a part of its samples."""

import copy
import os
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from curation.instances.selection_index import SelectionIndex, fingerprint
from curation.samplers.subset import SubsetSampler


def draw_from_subset(loader: Any, seed: int | None = None) -> tuple[DataLoader, SubsetSampler]:
    """A copy of a data loader that draws from a :class:`SubsetSampler`, at first from all samples.

    Args:
        loader: A map-style ``DataLoader`` that makes its batches itself.
        seed: Seed of a new sampler; None for the seed of the ``DistributedSampler`` that it replaces, else that of
            ``seed_everything``.

    Returns:
        The copy, and its sampler: a copy of the loader's sampler if that is a :class:`SubsetSampler`, else a new one.

    Raises:
        TypeError: If the data loader is of another kind, or has a sampler of another kind.

    Example:
        >>> copied, sampler = draw_from_subset(DataLoader("abcdef", batch_size=2))
        >>> sampler.indices = [1, 3, 5]
        >>> list(copied)
        [['b', 'd'], ['f']]
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        data = loader.dataset if isinstance(loader, DataLoader) else loader
        raise TypeError(f"Instances can be selected of a map-style `DataLoader`, but not of {type(data).__name__}.")
    batches = loader.batch_sampler
    replaced: Any = getattr(batches, "sampler", None)
    kind = type(replaced)
    known = isinstance(replaced, SubsetSampler) or kind in (RandomSampler, SequentialSampler, DistributedSampler)
    partial = kind is RandomSampler and (replaced.replacement or len(replaced) != len(loader.dataset))  # type: ignore[arg-type]
    if type(batches) is not BatchSampler or not known or partial:
        raise TypeError(
            "Instances can be selected of a `DataLoader` that is shuffled without replacement, sequential or has a "
            f"SubsetSampler, but not of one with {kind.__name__} in {type(batches).__name__}."
        )
    if isinstance(replaced, SubsetSampler):
        sampler = copy.copy(replaced)
    else:
        shuffle = getattr(replaced, "shuffle", kind is RandomSampler)
        if seed is None:
            seed = replaced.seed if kind is DistributedSampler else int(os.environ.get("PL_GLOBAL_SEED", 0))
        sampler = SubsetSampler(loader.dataset, shuffle=shuffle, seed=seed)
    new_loader, new_batches = copy.copy(loader), copy.copy(batches)
    new_batches.sampler = sampler
    # DataLoader forbids assigning; Lightning looks for a distributed sampler in `sampler`.
    vars(new_loader).update(sampler=sampler, batch_sampler=new_batches, _iterator=None)
    return new_loader, sampler


def warn_of_other_data(index: SelectionIndex, dataset: Any) -> None:
    """Warn if an index seems to have been made for another data set."""
    if index.fingerprint and index.fingerprint != fingerprint(dataset):
        rank_zero_warn(
            "The index was made of other samples than those trained on, or of the same in a random augmentation."
        )
