"""Batches of samples of like length, so that little of a batch is padding."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import BatchSampler

from curation.checks import check_integer
from curation.samplers.fit_epoch import fit_loop
from curation.samplers.global_batch import GlobalBatchSampler, SequenceSampler
from curation.samplers.lengths import check_lengths, lengths_of

BLOCK = 1 << 16  # rows that are sorted at a time, in whole windows


class LengthGroupedSampler(SequenceSampler):
    """Yields samples of like length one after another, for ``DataLoader(sampler=..., batch_size=...)``.

    The order of an epoch is a random one, cut into windows of ``window`` global batches; each window is sorted by
    length, and the global batches are shuffled over the epoch. So a batch is of like lengths, and random otherwise.
    The batch with the longest sample comes first, so that memory that does not suffice shows at once. Of a sorted
    global batch each process takes every ``W``-th sample, in alternate directions, so that all have as many tokens.

    It differs from the sampler of the same name in transformers in that it plans for all processes at once, shuffles
    batches over the whole epoch, and can be resumed.

    Args:
        lengths: Integers ``[N]``, or the data set, of which :func:`~curation.samplers.lengths.lengths_of` finds them.
        batch_size: Samples in a batch of a process, as in the ``DataLoader``.
        window: Global batches that are sorted together; more have less padding and are less random.
        seed: Seed of the order, which depends on the epoch, too; equal on all ranks.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> lengths = [5, 1, 4, 1, 5, 2]
        >>> [lengths[i] for i in LengthGroupedSampler(lengths, batch_size=2)]
        [5, 5, 4, 2, 1, 1]
    """

    def __init__(self, lengths: Any, batch_size: int, window: int = 50, seed: int = 0) -> None:
        self.lengths = as_lengths(lengths)
        super().__init__(self.lengths, seed)
        self.batch_size: int = check_integer("batch_size", batch_size, 1)
        self.window: int = check_integer("window", window, 1)

    def __len__(self) -> int:
        processes = self._place[1]
        whole, rest = divmod(len(self.lengths), self.batch_size * processes)
        return whole * self.batch_size + -(-rest // processes)

    @property
    def sizes(self) -> list[int]:
        """Rows of a global batch."""
        return [self.batch_size * self._place[1]]

    def samples(self, sizes: list[int]) -> int:
        """Number of the samples."""
        return len(self.lengths)

    def global_batches(self, epoch: int, sizes: list[int]) -> Iterator[np.ndarray]:
        """Global batches, each sorted by length; the last is what is left."""
        (rows,) = sizes
        rng = np.random.default_rng((self.seed, epoch))
        order = sorted_windows(self.lengths, rng, self.window * rows)
        whole = len(order) // rows
        batches = order[: whole * rows].reshape(whole, rows)
        for turn in longest_first(rng.permutation(whole), self.lengths[batches[:, :1]].ravel()):
            yield batches[turn]
        yield order[whole * rows :]

    def share(self, batch: np.ndarray, rank: int, processes: int) -> np.ndarray:
        """A process's part of a sorted global batch (:func:`share`)."""
        return share(batch, rank, processes)


class TokenBudgetSampler(BatchSampler):
    """Yields batches of as many samples of like length as fit into a number of tokens, padding included.

    For ``DataLoader(batch_sampler=...)``. Windows of about ``window`` global batches of a random order are sorted,
    and cut into batches of ``c`` samples for each process with the largest ``c`` of which ``c`` times the longest is
    at most ``max_tokens``. All processes have as many samples in each batch, and as many batches in each epoch: where
    an order makes fewer, large batches are cut in two.

    Under DDP Lightning makes a batch sampler anew with a sampler of its own, which is ignored here. It can do so
    where the data loader is made in ``train_dataloader`` of a module or data module; elsewhere set
    ``Trainer(use_distributed_sampler=False)``.

    Args:
        lengths: Integers ``[N]``, or the data set.
        max_tokens: Largest number of tokens of a batch of a process: samples times the longest of them.
        window: Global batches of mean size that are sorted together.
        seed: Seed of the order, which depends on the epoch, too; equal on all ranks.
        sampler: Ignored; Lightning may set it.

    Raises:
        ValueError: If an argument is out of its range, or a sample is longer than ``max_tokens``.

    Example:
        >>> sampler = TokenBudgetSampler([2, 2, 2, 6], max_tokens=6)
        >>> sorted(map(sorted, sampler))
        [[0, 1, 2], [3]]
    """

    def __init__(self, lengths: Any, max_tokens: int, window: int = 50, seed: int = 0, sampler: Any = None) -> None:
        self.max_tokens: int = check_integer("max_tokens", max_tokens, 1)
        self.lengths = as_lengths(lengths)
        longest = int(self.lengths.argmax())
        if self.lengths[longest] > max_tokens:
            raise ValueError(
                f"Argument `max_tokens` must be at least the longest sample, but got {max_tokens} and sample "
                f"{longest} has {self.lengths[longest]}."
            )
        self.window: int = check_integer("window", window, 1)
        self.sampler = self._order = _Order(self.lengths, seed)  # Lightning gives it the epoch
        self._fixed = False
        self._planned: tuple[int, int] | None = None
        self._count = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that is iterated next; Lightning does."""
        self._order.set_epoch(epoch)

    def __len__(self) -> int:
        loop = fit_loop()  # Lightning asks for the length before it iterates,
        if loop is not None:  # and leaves a batch sampler as it is where it overfits batches
            self._fixed = loop.trainer.overfit_batches > 0
        _, processes = self._order._place
        if self._planned != (0, processes):
            self._planned = 0, processes
            count = len(self._plan(0, 0, processes))
            self._count = count if self._one_window(processes) else count + max(2, count // 50)
            self._count = min(self._count, max(count, len(self.lengths) // processes))
        return self._count

    def _rows(self, processes: int) -> int:
        """Samples of a window."""
        mean = max(1, int(self.max_tokens / self.lengths.mean()))
        return self.window * mean * processes

    def _one_window(self, processes: int) -> bool:
        return self._rows(processes) >= len(self.lengths)

    def _plan(self, epoch: int, attempt: int, processes: int) -> list[np.ndarray]:
        """Global batches, each with a multiple of ``processes`` samples; the last may repeat some."""
        rng = np.random.default_rng((self._order.seed, epoch, attempt))
        rows, batches = self._rows(processes), []
        order = sorted_windows(self.lengths, rng, rows)
        rest = order[:0]
        for start in range(0, len(order), rows):
            part = np.concatenate([rest, order[start : start + rows]])
            part = part[np.argsort(-self.lengths[part], kind="stable")] if len(rest) else part
            at, lengths = 0, self.lengths[part]
            while len(part) - at >= processes:
                count = min(self.max_tokens // int(lengths[at]), (len(part) - at) // processes) * processes
                batches.append(part[at : at + count])
                at += count
            rest = part[at:]
        if len(rest):
            batches.append(np.resize(rest, processes))
        return batches

    def __iter__(self) -> Iterator[list[int]]:
        self._order._take_epoch()
        rank, processes = self._order._place
        wanted, attempt = len(self), 0
        epoch = 0 if self._fixed else self._order.epoch
        batches = self._plan(epoch, attempt, processes)
        while len(batches) > wanted:  # another random order has fewer
            attempt += 1
            batches = self._plan(epoch, attempt, processes)
        while missing := wanted - len(batches):
            sizes = np.array([len(batch) for batch in batches])
            for i in np.argsort(-sizes, kind="stable")[:missing]:
                half = sizes[i] // processes // 2 * processes
                if half:
                    batches.append(batches[i][half:])
                    batches[i] = batches[i][:half]
        rng = np.random.default_rng((self._order.seed, epoch, attempt, 1))
        longest = self.lengths[[batch[0] for batch in batches]]
        for turn in longest_first(rng.permutation(len(batches)), longest):
            yield share(batches[turn], rank, processes).tolist()


class _Order(GlobalBatchSampler):
    """The epoch of a batch sampler."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self.dataset)))  # type: ignore[arg-type]


def as_lengths(lengths: Any) -> np.ndarray:
    """Lengths int32 ``[N]`` from integers or a data set."""
    plain = isinstance(lengths, np.ndarray) or hasattr(lengths, "numpy")
    if plain or (isinstance(lengths, (list, tuple)) and all(isinstance(n, (int, np.integer)) for n in lengths[:1])):
        return check_lengths(lengths)
    return lengths_of(lengths)


def sorted_windows(lengths: np.ndarray, rng: np.random.Generator, window: int) -> np.ndarray:
    """A random order of samples, each window of it sorted by length, the longest first; equal ones stay in order.

    Args:
        lengths: int32 ``[N]``.
        rng: Generator of the order.
        window: Samples of a window.

    Returns:
        int32 ``[N]``; int64 for 2^31 samples and more.

    Example:
        >>> sorted_windows(np.array([1, 3, 2], np.int32), np.random.default_rng(0), 3)
        array([1, 2, 0], dtype=int32)
    """
    order = np.arange(len(lengths), dtype=np.int32 if len(lengths) < 2**31 else np.int64)
    rng.shuffle(order)
    windows = max(1, BLOCK // window)  # at a time
    whole = len(order) // window
    for start in range(0, whole, windows):
        block = order[start * window : min(start + windows, whole) * window].reshape(-1, window)
        ranks = np.argsort(-lengths[block], axis=1, kind="stable")
        block[:] = np.take_along_axis(block, ranks, axis=1)
    rest = order[whole * window :]
    rest[:] = rest[np.argsort(-lengths[rest], kind="stable")]
    return order


def longest_first(turns: np.ndarray, longest: np.ndarray) -> np.ndarray:
    """The order of the batches with the one that has the longest sample in front."""
    return turns[np.argsort(turns != longest.argmax(), kind="stable")] if len(turns) else turns


def share(batch: np.ndarray, rank: int, processes: int) -> np.ndarray:
    """A process's part of a sorted global batch, ``[ceil(n / W)]``.

    Each takes one of ``W`` samples that follow one another, in alternate directions, so that no process has the
    longer ones always. A batch that is no multiple of ``W`` repeats its first samples.

    Example:
        >>> [share(np.arange(6), rank, 2).tolist() for rank in (0, 1)]
        [[0, 3, 4], [1, 2, 5]]
    """
    if processes == 1:
        return batch
    table = np.resize(batch, (-(-len(batch) // processes), processes))
    return np.where(np.arange(len(table)) % 2 == 0, table[:, rank], table[:, processes - 1 - rank])
