"""A pass over the training samples that collects what a selector gets."""

import copy
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from curation.callbacks.instances.features import flatten_inputs, inputs_and_labels, row_vectors
from curation.callbacks.lightning.collectives import agree
from curation.callbacks.lightning.loop import move_to_device
from curation.samplers.subset import SubsetSampler
from curation.scoring import find_route

LOADER_OPTIONS = (
    "num_workers",
    "collate_fn",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "prefetch_factor",
    "multiprocessing_context",
)


def features_and_labels(
    trainer: Trainer, loader: DataLoader, samples: np.ndarray, layer: str | None, classes: bool = True
) -> tuple[Tensor, Tensor]:
    """Features and labels of training samples, computed by all processes.

    Args:
        trainer: The trainer; its module runs where there is a ``layer``.
        loader: The training data loader.
        samples: int64 ``[N]``, the samples, ascending.
        layer: Path of the submodule whose outputs are the features; None for the inputs themselves.
        classes: Whether the labels must be classes; else they may be numbers, or missing.

    Returns:
        Features fp32 ``[N, D]`` and labels ``[N]`` (int64, or floating and NaN where they are missing) on the CPU of
        the first process, in the order of ``samples``; what the other processes get has no meaning.

    Raises:
        ValueError: If a batch has not one feature and one label for each sample.
        TypeError: If a batch has no labels, or without a ``layer`` not one tensor of inputs.
        RuntimeError: If the pass failed on another process.
    """
    batches = agree(trainer, lambda: _share(trainer, loader, samples, layer, classes))
    features, labels = (_gather_interleaved(trainer, part)[: len(samples)] for part in zip(*batches, strict=True))
    return features, labels


def _share(
    trainer: Trainer, loader: Any, samples: np.ndarray, layer: str | None, classes: bool
) -> list[tuple[Tensor, Tensor]]:
    """Features ``[B, D]`` and labels ``[B]`` of each batch of this process: every W-th of the samples."""
    module, size = trainer.lightning_module, loader.batch_sampler.batch_size
    sampler = SubsetSampler(loader.dataset, samples, shuffle=False)
    options = {name: getattr(loader, name) for name in LOADER_OPTIONS}
    batches = DataLoader(loader.dataset, size, sampler=sampler, generator=torch.Generator(), **options)
    outputs: list[Any] = []
    share = []
    with ExitStack() as stack:
        if layer is not None:
            hook = module.get_submodule(layer).register_forward_hook(lambda _, __, output: outputs.append(output))
            stack.callback(hook.remove)
        stack.enter_context(trainer.precision_plugin.forward_context())
        for step, batch in enumerate(batches):
            batch = move_to_device(trainer, batch)
            inputs, labels = inputs_and_labels(batch, classes)
            if layer is None:
                features = flatten_inputs(inputs)
            else:
                find_route(module, batch).take(copy.copy(batch))  # a copy, since the step may take items out of it
                features = row_vectors(layer, outputs, batch)
                outputs.clear()
            rows = min(size, len(sampler) - step * size)
            if (len(features), len(labels)) != (rows, rows):
                raise ValueError(
                    f"A batch of {rows} samples must have as many features and labels to select by, but has "
                    f"{len(features)} and {len(labels)}."
                )
            share.append((features.cpu(), labels.cpu()))
    return share


def _gather_interleaved(trainer: Trainer, batches: tuple[Tensor, ...]) -> Tensor:
    """The rows of all processes, each of which has every W-th: on the CPU of the first process, in order."""
    rows = []
    for batch in batches:  # one at a time, to need little memory on the device
        gathered = trainer.strategy.all_gather(batch.to(trainer.strategy.root_device))
        if trainer.is_global_zero:
            rows.append(gathered.view(trainer.world_size, *batch.shape).transpose(0, 1).flatten(0, 1).cpu())
    return torch.cat(rows) if rows else batches[0]
