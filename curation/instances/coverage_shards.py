"""Coverage of features that are larger than the memory: in shards, and then among what these chose.

Each shard of consecutive rows chooses ``RATIO`` times its share of the budget, and each choice counts for the rows
that it covers best in its shard (:func:`~curation.instances.coverage.cover_and_count`). What stays covers these
choices best, each weighing what it counts for: a composable coreset of facility location (arXiv 1506.06715), where
the second choice sees the density of all rows. Shards are the same for any number of workers, and so is the result.

Cost: two passes over the features; time as in memory, and that of ``RATIO`` times the budget once more.
"""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curation.checks import check_bytes
from curation.files import replacing
from curation.instances.class_coverage import cover_classes, mixture, reach
from curation.instances.feature_shards import FeatureShards
from curation.instances.selector import class_budgets

RATIO = 4  # rows that a shard chooses, for one that stays
SHARD = 2**19  # rows of a shard at most
LEAST = 2**12  # rows of a shard, below which the memory is too small
BLOCK = 2**22  # numbers that are read at a time
LIBRARIES = 2**29  # bytes of a process before it has data
FIXED = 2**27  # bytes of the distances that are computed at a time
PER_ROW = 40  # bytes of a row of the data set in the main process: targets, codes, and what sorts them
PROBED = 2**13  # rows by which the time is estimated


@dataclass(frozen=True)
class MappedRows:
    """Rows of a memory map, which a worker opens by itself; only what is asked for is copied.

    Args:
        file: The file.
        dtype: Type of the numbers.
        offset: Bytes before the first row.
        shape: ``(N, D)``.
    """

    file: str
    dtype: np.dtype
    offset: int
    shape: tuple[int, int]

    def __getitem__(self, rows: slice) -> np.ndarray:
        return np.array(np.memmap(self.file, self.dtype, "r", self.offset, self.shape)[rows])

    def place(self, row: int) -> str:
        """The file of a row and its number there, for errors."""
        return f"row {row} of {self.file!r}"


@dataclass(frozen=True)
class Part:
    """Rows ``[start, stop)`` of the features, as a worker gets them; those of an array travel with it."""

    source: Any
    start: int
    stop: int
    first: int = 0  # row of the data set that comes first in the source

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """The rows in blocks ``[n, D]`` of bounded size, each with the number of its first."""
        step = max(1, BLOCK // self.source.shape[1])
        for start in range(self.start, self.stop, step):
            yield start, self.source[start - self.first : min(start + step, self.stop) - self.first]


@dataclass(frozen=True)
class Plan:
    """How a selection is divided.

    Attributes:
        cuts: The rows at which shards begin, and the end: int64 ``[S + 1]``.
        groups: The shards at which groups begin that are merged at once, and the end: int64 ``[G + 1]``.
        workers: Shards that are in memory at once.
        bytes: The largest working set of all processes together.
    """

    cuts: np.ndarray
    groups: np.ndarray
    workers: int
    bytes: int


def fits_at_once(n: int, d: int, itemsize: int, budget: float, memory: int, k: int | None) -> bool:
    """Whether the rows can be selected from in memory: raw, standardised and with a graph."""
    return LIBRARIES + FIXED + n * (2 * itemsize * d + 16 * d + 36 * (k or reach(budget)) + PER_ROW) <= memory


def plan_shards(n: int, d: int, candidates: int, memory: int, k: int, jobs: int, read: int = 0) -> Plan:
    """Shards, merges and workers that a memory has room for; of these only the workers depend on their number.

    Room is left for two shards at once, and for two idle workers during a merge.

    Args:
        n: Rows.
        d: Features.
        candidates: Rows that all shards together choose.
        memory: Bytes, of all processes on this machine.
        k: Neighbours in the graphs.
        jobs: Workers that are asked for.
        read: Bytes of features that have to be read at a time.

    Raises:
        ValueError: If the memory is too small.

    Example:
        >>> plan = plan_shards(10_000_000, 64, 1_600_000, 4 * 10**9, 10, jobs=8)
        >>> len(plan.cuts) - 1, len(plan.groups) - 1, plan.workers, round(plan.bytes / 1e9, 1)
        (20, 1, 2, 3.9)
    """
    row = 12 * d + 36 * k
    main = LIBRARIES + PER_ROW * n
    fixed = FIXED + 2 * read
    rows = min(SHARD, ((memory - main) // 2 - LIBRARIES - fixed) // row)
    merged = (memory - main - 2 * LIBRARIES - FIXED) // row
    least = main + 2 * (LIBRARIES + fixed + min(LEAST, n) * row)
    if memory < least:
        raise ValueError(
            f"Argument `memory` must be at least {least} bytes for {n} rows of {d} features, but got {memory}."
        )
    shards = -(-n // rows)
    groups = min(shards, -(-candidates // merged))
    shard, merge = fixed + -(-n // shards) * row, FIXED + -(-candidates // groups) * row
    room = min((memory - main) // (LIBRARIES + shard), (memory - main - merge) // LIBRARIES, shards)
    workers = max(1, min(jobs, room))
    apart = LIBRARIES * workers * (workers > 1)  # one works in the main process
    return Plan(
        np.arange(shards + 1) * n // shards,
        np.arange(groups + 1) * shards // groups,
        workers,
        main + apart + max(workers * shard, merge),
    )


def fit_in_shards(selector: Any, X: Any, y: Any, in_memory: Callable[[Any, Any], Any]) -> Any:
    """As ``CoverageInstanceSelector.fit``, within its ``memory``.

    Args:
        selector: The selector.
        X: Features ``[N, D]``: a file, a folder or a list of files (:class:`FeatureShards`), shards, a memory map, an
            array or a tensor.
        y: Targets ``[N]``, the ``.npy`` file of these, or None.
        in_memory: The fit of what fits.

    Raises:
        ValueError: If the memory is too small, a row is not finite (its file is named), or as in memory.
    """
    from joblib import effective_n_jobs

    began = perf_counter()
    memory = check_bytes("memory", selector.memory)
    source = open_features(X, memory)
    n, d = source.shape
    y = None if y is None else _targets(y, n)
    if fits_at_once(n, d, source[0:1].dtype.itemsize, selector.budget, memory, selector.n_neighbors):
        x = source[0:n]
        _check_finite(x, source, 0, 0)
        return in_memory(x, y)
    selector.classes_, codes = selector._strata(y, n)
    budgets = class_budgets(codes, selector.budget, selector.sampling_strategy, selector.classes_)
    k = selector.n_neighbors or reach(min(1.0, RATIO * selector.budget))
    counts = np.bincount(codes, minlength=len(budgets))
    candidates = int(np.minimum(RATIO * budgets, counts).sum())
    plan = plan_shards(n, d, candidates, memory, k, effective_n_jobs(selector.n_jobs), getattr(source, "largest", 0))
    work = _Work(selector, source, codes, counts, budgets, k, plan)
    if selector.verbose:
        how = f"{n:,} rows in {len(plan.cuts) - 1} shards, {plan.workers} at once"
        cost = f"about {work.seconds(candidates):.0f} s, and {plan.bytes / 1e9:.1f} GB with libraries"
        print(f"{how}: {cost}", flush=True)
    with tempfile.TemporaryDirectory() as own:
        folder = Path(selector.folder or own)
        folder.mkdir(parents=True, exist_ok=True)  # what cannot be written is said before the work
        order, gains = work.merge(work.shards(folder))
    selector._keep(order, gains, codes, began)
    selector.n_features_in_ = d
    selector.report_["shards"] = len(plan.cuts) - 1
    return selector


def open_features(X: Any, memory: int) -> Any:
    """What gives features ``[n, D]`` for a range of rows, and opens files by itself in another process.

    Raises:
        ValueError: If ``X`` is no matrix of numbers, or files that are missing or of unequal width are named.
    """
    first = X[0] if isinstance(X, (list, tuple)) and len(X) else X
    if isinstance(first, (str, os.PathLike)):
        return FeatureShards(X, memory=memory)
    if isinstance(X, FeatureShards):
        return X
    array = X.detach().cpu().float().numpy() if isinstance(X, Tensor) else np.asanyarray(X)
    if array.ndim != 2 or not array.size or array.dtype.kind not in "iuf":
        raise ValueError(f"Argument `X` must be [N, D] numbers, but is {array.dtype} {list(array.shape)}.")
    root: Any = array
    while isinstance(root.base, np.memmap):
        root = root.base
    if isinstance(array, np.memmap) and root.filename is not None and array.flags.c_contiguous:
        ahead = array.ctypes.data - root.ctypes.data
        return MappedRows(str(root.filename), array.dtype, root.offset + ahead, array.shape)
    return array


def _targets(y: Any, n: int) -> np.ndarray:
    from sklearn.utils import check_array, column_or_1d

    if isinstance(y, (str, os.PathLike)):
        y = np.load(y, mmap_mode="r")
    y = y.detach().cpu().numpy() if isinstance(y, Tensor) else y
    y = column_or_1d(check_array(y, ensure_2d=False, dtype=None, input_name="y"), warn=True)
    if len(y) != n:
        raise ValueError(f"Argument `y` must be [{n}], a target for each row, but is [{len(y)}].")
    return y


class _Work:
    """A selection in shards: what all of its steps need."""

    def __init__(
        self,
        selector: Any,
        source: Any,
        codes: np.ndarray,
        counts: np.ndarray,
        budgets: np.ndarray,
        k: int,
        plan: Plan,
    ) -> None:
        self.selector, self.source, self.codes, self.plan, self.k = selector, source, codes, plan, k
        self.counts, self.budgets, self.seed = counts, budgets, selector._seed()

    def part(self, s: int) -> Part:
        start, stop = self.plan.cuts[s : s + 2].tolist()
        if isinstance(self.source, np.ndarray):
            return Part(self.source[start:stop], start, stop, start)
        return Part(self.source, start, stop)

    def takes(self, codes: np.ndarray) -> np.ndarray:
        """Rows of each class that a shard chooses, int64 ``[C]``."""
        here = np.bincount(codes, minlength=len(self.counts))
        return np.minimum(-(-RATIO * self.budgets * here // self.counts), here)

    def seconds(self, candidates: int) -> float:
        """About the time of all shards and of the merge, by the first rows."""
        rows = np.asarray(self.source[0:PROBED])
        x = torch.from_numpy(np.nan_to_num(rows).astype(np.float32))
        for few in (x[:256], x):  # compiles
            codes = self.codes[: len(few)]
            began = perf_counter()
            with _one_thread():
                cover_classes(few, codes, torch.ones(len(few)), self.takes(codes), 0, self.k, self.selector.n_views)
        levels = math.log2(self.plan.cuts[1] / len(x) + 1) / 10 + 1  # a larger shard has longer hashes
        return (perf_counter() - began) / len(x) * levels * (len(self.codes) / self.plan.workers + candidates)

    def run(self, function: Callable[..., Any], tasks: list[tuple[Any, ...]], title: str) -> list[Any]:
        """The results in the order of the tasks."""
        from joblib import Parallel, delayed

        calls = [delayed(_numbered)(i, function, *task) for i, task in enumerate(tasks)]
        try:
            parallel = Parallel(self.plan.workers, return_as="generator_unordered")
        except ValueError:  # a backend that returns all at once
            parallel = Parallel(self.plan.workers)
        done: Iterable[Any] = parallel(calls)
        if self.selector.verbose:
            from rich.progress import track

            done = track(done, title, total=len(tasks))
        return [result for _, result in sorted(done, key=lambda pair: pair[0])]

    def shards(self, folder: Path) -> list[Path]:
        """The files of what each shard chose; those that are there already are not made again.

        A name holds a checksum of the features, the targets and all that the choice depends on.
        """
        parts = [self.part(s) for s in range(len(self.plan.cuts) - 1)]
        found = self.run(measure, [(part,) for part in parts], "reading")
        mean, deviation = standardisation(
            [(part.stop - part.start, *of[:2]) for part, of in zip(parts, found, strict=True)], self.wide()
        )
        settings = [1, self.k, self.selector.n_views, self.seed, str(self.selector.device)]
        common = hashlib.sha256(json.dumps(settings).encode() + mean.tobytes() + deviation.tobytes()).digest()
        files, tasks = [], []
        for s, (part, (_, _, digest)) in enumerate(zip(parts, found, strict=True)):
            codes = self.codes[part.start : part.stop]
            takes = self.takes(codes)
            key = hashlib.sha256(common + digest + codes.tobytes() + takes.tobytes()).hexdigest()[:32]
            files.append(folder / f"shard-{s:05}-{key}.npz")
            if not files[-1].is_file():
                seed = self.seed + (s + 1) * len(self.budgets)  # the classes have seeds of their own, as in a merge
                how = (self.k, self.selector.n_views, seed, self.selector.device)
                tasks.append((files[-1], part, codes, takes, mean, deviation, *how))
        self.run(choose, tasks, "selecting")
        return files

    def wide(self) -> bool:
        dtype = self.source[0:1].dtype
        return dtype.kind in "iu" or dtype.itemsize > 4

    def merge(self, files: list[Path]) -> tuple[np.ndarray, np.ndarray]:
        """The rows that stay, best first, and the gains fp32 ``[N]``."""
        k = self.selector.n_neighbors or reach(1 / RATIO)
        orders, gains = [], np.zeros(len(self.codes), np.float32)
        groups = self.plan.groups
        before = np.array([self.class_counts(self.plan.cuts[group]) for group in groups])  # rows by class, [G + 1, C]
        shares = np.diff((2 * before * self.budgets + self.counts) // (2 * self.counts), axis=0)
        for start, stop, budgets in zip(groups[:-1], groups[1:], shares, strict=True):
            x, rows, weights = (joined(files[start:stop], name) for name in ("x", "rows", "weights"))
            points = torch.from_numpy(x).to(self.selector.device)
            codes, of = self.codes[rows], torch.from_numpy(weights)
            covered = cover_classes(points, codes, of, budgets, self.seed, k, self.selector.n_views)
            orders.append(rows[covered.order])
            gains[rows] = covered.gains
        return np.concatenate(orders)[mixture(list(map(len, orders)))], gains

    def class_counts(self, rows: int) -> np.ndarray:
        """How many of the first rows are of each class, int64 ``[C]``."""
        return np.bincount(self.codes[:rows], minlength=len(self.counts))


def joined(files: list[Path], name: str) -> np.ndarray:
    """An array of each file, one after another."""
    parts = []
    for file in files:
        with np.load(file) as arrays:
            parts.append(arrays[name])
    return np.concatenate(parts)


def _numbered(i: int, function: Callable[..., Any], *arguments: Any) -> tuple[int, Any]:
    return i, function(*arguments)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums do not depend on the number of threads of a worker."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def measure(part: Part) -> tuple[np.ndarray, np.ndarray, bytes]:
    """Mean and sum of squared deviations of each feature, fp64 ``[D]``, and a checksum of the rows.

    Raises:
        ValueError: If a row is not finite or too large.
    """
    checksum, moments = hashlib.sha256(), []
    for start, rows in part.blocks():
        if rows.dtype.kind not in "iuf":
            raise ValueError(f"Argument `X` must be [N, D] numbers, but has {rows.dtype}.")
        _check_finite(rows, part.source, start, part.first)
        checksum.update(np.ascontiguousarray(rows).data)
        values = rows.astype(np.float64)
        mean = values.mean(0)
        values -= mean
        moments.append((len(rows), mean, np.einsum("nd,nd->d", values, values)))
    _, mean, squares = together(moments)
    return mean, squares, checksum.digest()


def _check_finite(rows: np.ndarray, source: Any, start: int, first: int) -> None:
    within = np.abs(rows).max(1).astype(np.float64) <= 1e35
    if not within.all():
        row = start + int(np.argmin(within))
        place = source.place(row - first) if hasattr(source, "place") else f"row {row}"
        raise ValueError(f"Argument `X` must hold finite numbers of at most 1e35, but {place} has others.")


def together(moments: list[tuple[int, np.ndarray, np.ndarray]]) -> tuple[int, np.ndarray, np.ndarray]:
    """Number, mean and sum of squared deviations of all parts, from those of each (Chan et al. 1983)."""
    n, mean, squares = moments[0]
    for m, other, of_other in moments[1:]:
        apart = other - mean
        mean = mean + apart * (m / (n + m))
        squares = squares + of_other + apart**2 * (n * m / (n + m))
        n += m
    return n, mean, squares


def standardisation(moments: list[tuple[int, np.ndarray, np.ndarray]], wide: bool) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of each feature, fp64 ``[D]``; infinite for a constant one."""
    n, mean, squares = together(moments)
    deviation = np.sqrt(squares / n)
    varies = deviation > (2e-15 if wide else 1e-7) * np.maximum(np.abs(mean), 1e-30)
    return mean, np.where(varies, deviation, np.inf)


def choose(
    file: Path,
    part: Part,
    codes: np.ndarray,
    takes: np.ndarray,
    mean: np.ndarray,
    deviation: np.ndarray,
    k: int,
    views: int,
    seed: int,
    device: str,
) -> None:
    """What a shard chooses, to a file: rows of the data set, their weights and their standardised features."""
    x = np.empty((part.stop - part.start, part.source.shape[1]), np.float32)
    for start, rows in part.blocks():
        wide = rows.dtype.kind in "iu" or rows.dtype.itemsize > 4
        values = rows.astype(np.float64 if wide else np.float32, copy=False)
        x[start - part.start : start - part.start + len(rows)] = values - mean.astype(values.dtype)
    x /= deviation.astype(np.float32)
    with _one_thread():
        points = torch.from_numpy(x).to(device)
        covered = cover_classes(points, codes, torch.ones(len(x)), takes, seed, k, views)
    with replacing(file) as new:
        np.savez(new, rows=part.start + covered.order, weights=covered.stand_for, x=x[covered.order])
