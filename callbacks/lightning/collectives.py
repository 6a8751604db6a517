"""Rows of all processes, of which each may have another number."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import Tensor

T = TypeVar("T")


@functools.lru_cache(maxsize=8)
def _host_group(world: Any) -> Any:
    """Processes that talk without their accelerators, so that no host waits for a device."""
    return world if "gloo" in dist.get_backend(world) else dist.new_group(backend="gloo")


def gather_sizes(trainer: Trainer, size: int) -> list[int]:
    """The numbers that each process gives, in the order of ranks; costs no synchronisation with an accelerator."""
    if trainer.world_size == 1:
        return [size]
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(trainer.world_size)]
    dist.all_gather(sizes, torch.tensor([size]), group=_host_group(dist.group.WORLD))
    return torch.cat(sizes).tolist()


def gather_rows(trainer: Trainer, rows: Tensor) -> Tensor:
    """The rows of all processes in the order of ranks; their number may differ.

    Args:
        trainer: The trainer.
        rows: ``[B, ...]``, on any device; all but ``B`` is equal on all processes.

    Returns:
        ``[B_0 + B_1 + ..., ...]``, the same on every process, on the device of ``rows``.
    """
    if trainer.world_size == 1:
        return rows
    sizes = gather_sizes(trainer, len(rows))
    most = max(sizes)
    padded = rows if len(rows) == most else torch.cat([rows, rows.new_zeros(most - len(rows), *rows.shape[1:])])
    everyone = trainer.strategy.all_gather(padded.to(trainer.strategy.root_device))
    everyone = everyone.view(len(sizes), *padded.shape)
    if min(sizes) == most:
        return everyone.flatten(0, 1).to(rows.device)
    return torch.cat([part[:size] for part, size in zip(everyone, sizes, strict=True)]).to(rows.device)


def gather_samples(trainer: Trainer, ids: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Sample ids and values of all processes in the order of ranks, in one collective; their number may differ.

    Args:
        trainer: The trainer.
        ids: int64 ``[B]``.
        values: fp32 ``[B, n]`` on the same device.

    Returns:
        Ids and values of all rows, the same on every process.
    """
    if trainer.world_size == 1:
        return ids, values
    # One collective of integers: a float would round an id.
    rows = gather_rows(trainer, torch.cat([ids[:, None], values.contiguous().view(torch.int32).long()], 1))
    return rows[:, 0], rows[:, 1:].int().view(torch.float32)


def sum_over_processes(trainer: Trainer, values: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place.

    Lightning's ``strategy.reduce`` has a barrier, at which the host waits for the device; this has none.
    """
    if trainer.world_size > 1:
        dist.all_reduce(values)
    return values


def average_over_processes(trainer: Trainer, tensors: list[Tensor]) -> None:
    """Average floating tensors over all processes, in place, in one collective of the widest dtype, at least fp32.

    Args:
        trainer: The trainer.
        tensors: Of the same number and shapes on every process.
    """
    if trainer.world_size == 1:
        return
    dtype = functools.reduce(torch.promote_types, {t.dtype for t in tensors}, torch.float32)
    share = torch.cat([t.flatten().to(dtype) for t in tensors]) / trainer.world_size  # a sum may not be finite
    means = sum_over_processes(trainer, share).split([t.numel() for t in tensors])
    for tensor, mean in zip(tensors, means, strict=True):
        tensor.copy_((mean if tensor.is_complex() == mean.is_complex() else mean.real).view_as(tensor))


class Totals:
    """Counts that are summed over all processes as they grow: any process can save them without a collective.

    Sums of each process's own would be lost with the processes: a checkpoint holds those of rank 0.

    Args:
        counts: The first counts, integers.

    Attributes:
        values: int64 ``[n]``, the counts of all processes.
    """

    def __init__(self, *counts: int) -> None:
        self.values = torch.tensor(counts, dtype=torch.int64)

    def add(self, trainer: Trainer, *counts: int) -> None:
        """Add the counts of every process, on all at the same time; the host does not wait for an accelerator."""
        added = torch.tensor(counts, dtype=torch.int64)
        if trainer.world_size > 1:
            device = trainer.strategy.root_device
            added = sum_over_processes(trainer, added.to(device, non_blocking=True))
            self.values = self.values.to(device, non_blocking=True)
        self.values = self.values + added


def agree(trainer: Trainer, work: Callable[[], T]) -> T:
    """Run ``work`` on every process; if it fails on one, all raise, and none waits for it.

    Raises:
        Exception: What ``work`` raised on this process.
        RuntimeError: If it failed on another process.
    """
    error: Exception | None = None
    try:
        result = work()
    except Exception as caught:  # any error: the other processes must learn of it
        error = caught
    done = trainer.strategy.reduce_boolean_decision(error is None)
    if error is not None:
        raise error
    if not done:
        raise RuntimeError("Another process failed at the same point; its error says why.")
    return result
