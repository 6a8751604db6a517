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
    """A copy of a data loader that draws from a :class:`SubsetSampler`, at first of all samples.

    Args:
        loader: A map-style ``DataLoader`` that makes its batches itself.
        seed: Of a new sampler; None for that of the ``DistributedSampler`` it replaces, else of ``seed_everything``.

    Returns:
        The copy, and its sampler, which is a copy of the loader's own if that is such a one.

    Raises:
        TypeError: If it is another data loader or has another sampler.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        data = loader.dataset if isinstance(loader, DataLoader) else loader
        raise TypeError(f"Instances can be selected of a map-style `DataLoader`, but not of {type(data).__name__}.")
    batches = loader.batch_sampler
    inner: Any = getattr(batches, "sampler", None)
    kind = type(inner)
    known = isinstance(inner, SubsetSampler) or kind in (RandomSampler, SequentialSampler, DistributedSampler)
    part = kind is RandomSampler and (inner.replacement or len(inner) != len(loader.dataset))  # type: ignore[arg-type]
    if type(batches) is not BatchSampler or not known or part:
        raise TypeError(
            "Instances can be selected of a `DataLoader` that is shuffled without replacement, sequential or has a "
            f"SubsetSampler, but not of one with {kind.__name__} in {type(batches).__name__}."
        )
    if isinstance(inner, SubsetSampler):
        sampler = copy.copy(inner)
    else:
        shuffle = getattr(inner, "shuffle", kind is RandomSampler)
        own_seed = inner.seed if kind is DistributedSampler else int(os.environ.get("PL_GLOBAL_SEED", 0))
        sampler = SubsetSampler(loader.dataset, shuffle=shuffle, seed=own_seed if seed is None else seed)
    own, own_batches = copy.copy(loader), copy.copy(batches)
    own_batches.sampler = sampler
    # DataLoader forbids assigning; Lightning looks for a distributed sampler in `sampler`.
    vars(own).update(sampler=sampler, batch_sampler=own_batches, _iterator=None)
    return own, sampler


def warn_of_other_data(index: SelectionIndex, dataset: Any) -> None:
    """Warn if an index seems to be of another data set."""
    if index.fingerprint and index.fingerprint != fingerprint(dataset):
        rank_zero_warn(
            "The index was made of other samples than those trained on, or of the same in a random augmentation."
        )
