"""Schedules of the batch size: rows of an optimizer step as a function of the samples seen.

Every schedule is a function ``schedule(seen, first, last, over) -> rows``: ``seen`` samples of the fit, ``first`` and
``last`` rows of a step over all processes, and ``over``, the samples within which the size grows.
"""

import bisect
import math
from collections.abc import Callable, Iterator, Sequence

COUPLINGS = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}  # exponent of the learning rate in the rows of a step


def ramp(seen: float, first: int, last: int, over: float) -> float:
    """Straight from ``first`` to ``last``.

    Example:
        >>> [ramp(seen, 64, 256, 1000) for seen in (0, 500, 2000)]
        [64.0, 160.0, 256.0]
    """
    return first + (last - first) * min(1.0, seen / over)


def doubling(seen: float, first: int, last: int, over: float) -> float:
    """Twice as many rows at equal distances, of which the last is at ``over``; ``last / first`` is a power of two.

    Example:
        >>> [doubling(seen, 64, 256, 1000) for seen in (0, 499, 500, 999, 1000)]
        [64, 64, 128, 128, 256]
    """
    doublings = _doublings(first, last)
    return first * 2 ** min(doublings, math.floor(doublings * seen / over))


def seesaw(seen: float, first: int, last: int, over: float) -> float:
    """Twice as many rows where a cosine decay over ``over`` samples has halved the rate; at most ``last``.

    In place of halving, the rate is divided by the square root of two (Seesaw, arXiv 2510.14717): the coupling of
    this schedule has the exponent -1/2.

    Example:
        >>> [seesaw(seen, 64, 256, 1000) for seen in (0, 499, 500, 667, 900)]
        [64, 64, 128, 256, 256]
    """
    decay = 0.5 * (1 + math.cos(math.pi * min(1.0, seen / over)))
    halvings = math.floor(-math.log2(decay) + 1e-9) if decay > 0 else math.inf
    return first * 2 ** min(_doublings(first, last), halvings)


SCHEDULES: dict[str, Callable[[float, int, int, float], float]] = {
    "ramp": ramp,
    "doubling": doubling,
    "seesaw": seesaw,
}


def _doublings(first: int, last: int) -> int:
    return (last // first).bit_length() - 1


def steps(pairs: Sequence[Sequence[int]]) -> Callable[[float], int]:
    """A schedule of pairs (samples seen, rows of a step): the rows of the last pair that was reached.

    Example:
        >>> size = steps([(0, 64), (1000, 128)])
        >>> size(999), size(1000)
        (64, 128)
    """
    return lambda seen: next(rows for samples, rows in reversed(pairs) if samples <= seen)


def next_size(size: int, wanted: int, ready: int) -> int:
    """Micro-batches of the next optimizer step, at the end of a step.

    Windows of accumulation begin at multiples of their size (Lightning zeroes gradients where
    ``batch_idx % size == 0`` and steps where ``ready % size == 0``), so a size can begin only where it divides
    ``ready``. Taken is the size nearest to ``wanted``, of those from ``size`` to ``wanted``, that does; a multiple of
    ``size`` is waited for.

    Args:
        size: Micro-batches of the step that ended; divides ``ready``.
        wanted: Micro-batches that the schedule asks for.
        ready: Batches of the epoch so far; 0 where the next epoch begins.

    Example:
        >>> next_size(4, 8, ready=12), next_size(4, 8, ready=16), next_size(4, 7, ready=12), next_size(4, 7, ready=0)
        (4, 8, 6, 7)
    """
    if wanted % size == 0:
        return wanted if ready % wanted == 0 else size
    towards = 1 if wanted < size else -1
    return next(k for k in range(wanted, size + towards, towards) if ready % k == 0)


def window_sizes(wanted: Callable[[int], int], batches: float, total: int) -> Iterator[int]:
    """Micro-batches of every optimizer step of a fit; the last of an epoch may have fewer than its size.

    Args:
        wanted: Micro-batches that the schedule asks for after a number of batches.
        batches: Batches of an epoch; infinity where it has no end.
        total: Batches of the fit.

    Example:
        >>> list(window_sizes(lambda trained: 1 if trained < 3 else 2, 7, 7))
        [1, 1, 1, 1, 2, 1]
    """
    trained, size = 0, wanted(0)
    while trained < total:
        ready = trained % batches
        if trained:
            size = next_size(size, wanted(trained), int(ready))
        window = int(min(size, batches - ready, total - trained))
        trained += window
        yield window


def count_steps(wanted: Callable[[int], int], batches: float, total: int) -> int:
    """Optimizer steps of a fit: the number of :func:`window_sizes`."""
    return sum(1 for _ in window_sizes(wanted, batches, total))


def batches_within(stretched: Callable[[int], Callable[[int], int]], batches: float, steps: int, largest: int) -> int:
    """Batches that a fit of a number of optimizer steps trains on, where the schedule stretches over the fit.

    Args:
        stretched: Returns, for the batches of a fit, the ``wanted`` of :func:`window_sizes`.
        batches: Batches of an epoch.
        steps: Optimizer steps of the fit.
        largest: Largest number of micro-batches of a step.

    Example:
        >>> batches_within(lambda total: lambda trained: 1 if 2 * trained < total else 2, math.inf, 6, 2)
        8
    """
    totals = range(steps * largest + 1)
    return bisect.bisect_right(totals, steps, key=lambda total: count_steps(stretched(total), batches, total)) - 1
