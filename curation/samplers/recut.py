"""A sequence of samples, cut anew into the batches of another number of processes."""

from collections.abc import Iterable, Iterator

import numpy as np


def recut(parts: Iterable[np.ndarray], rows: int, skip: int = 0) -> Iterator[np.ndarray]:
    """Cut a sequence into global batches, whatever parts it comes in.

    Args:
        parts: Integers ``[n]`` each; of any lengths.
        rows: Samples of a global batch.
        skip: Samples at the beginning that are left out.

    Yields:
        Integers ``[rows]``; the last has what is left.

    Example:
        >>> [batch.tolist() for batch in recut([np.arange(4), np.arange(4, 6)], rows=2, skip=1)]
        [[1, 2], [3, 4], [5]]
    """
    held = np.zeros(0, np.int64)
    for part in parts:
        held, skip = np.concatenate([held, part[skip:]]), max(0, skip - len(part))
        whole = len(held) // rows * rows
        yield from held[:whole].reshape(-1, rows)
        held = held[whole:]
    if len(held):
        yield held


def batches_left(samples: int, batch_size: int, processes: int, drop_last: bool, begun: bool) -> int:
    """Batches that each process makes of the rest of a sequence.

    Each process has ``ceil(samples / processes)`` samples, as in torch's ``DistributedSampler``.

    Args:
        samples: Samples that are left.
        batch_size: Samples of a batch of a process.
        processes: Number of processes.
        drop_last: Whether a last batch with fewer samples is left out.
        begun: Whether the sequence was begun with other batches: then the last batch stays if it is the only one.

    Example:
        >>> batches_left(10, batch_size=2, processes=2, drop_last=False, begun=False)
        3
    """
    each = -(-samples // processes)
    return max(each // batch_size, int(begun and each > 0)) if drop_last else -(-each // batch_size)


def every_nth(batch: np.ndarray, rank: int, processes: int) -> np.ndarray:
    """A process's part of a global batch, ``[ceil(n / W)]``: every ``W``-th, filled up with its first samples.

    Example:
        >>> every_nth(np.arange(5), rank=1, processes=2).tolist()
        [1, 3, 0]
    """
    return np.resize(batch, -(-len(batch) // processes) * processes)[rank::processes]
