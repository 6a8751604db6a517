"""Selection for a named target: the rows of a pool that rank first for examples of it (BETR, arXiv 2507.12466)."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from time import perf_counter
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from curation.checks import check_flag, check_integer, check_number, check_text
from curation.instances.feature_shards import FeatureShards
from curation.instances.selector import InstanceSelector

CELLS = 1 << 21  # cosines that are computed at a time
CACHED = 1 << 19  # numbers of a block that is gone through several times
LEAST = 16  # ranks that are looked at
COSINES = 1 << 25  # that a forecast computes
POSITIVE, NEGATIVES, TRAINED = 0.1, 3, 1 << 16  # share of a sample, negatives for each; positives that are enough
STRENGTH = 1000.0  # of the mean loss of the classifier over its penalty, whatever the number of rows
BLOCK = 1 << 14  # rows that it scores at a time
PER_RANK, PER_ROW = 200, 40  # bytes in memory


class TargetedSelector(InstanceSelector):
    """Keeps the rows of a pool that are nearest to examples of a target, or whose loss falls most by training on it.

    Each example of the target ranks the whole pool by cosine similarity, and the score of a row is the best of its
    ranks: ``S_j = -min_i r_ij``. So every example has as many of the kept rows as any other, as far as they differ; a
    mean of similarities would follow the most common kind. With ``agree`` of ``k`` the score is the ``k``-th best of
    its ranks, so that an example that is like no other brings few rows. Ties go to the larger mean similarity, then
    to the first row. Features are made unit norm, and not standardised; a row of zeros has a similarity of 0 to
    everything.

    Only ranks that can be kept are found: matrix products in blocks, of which the highest few stay for each example,
    ``O(N M D)`` time and ``O(M T + N)`` memory. The pool may be a memory map, which is read in blocks.

    Of a pool of more than ``sample`` rows so many are drawn and ranked. A logistic regression on the unit features
    tells the first tenth of these from three times as many of the others. Its log-odds are the scores of all rows.

    Args:
        budget: Share of the rows that stay, in (0, 1]; with ``lengths`` of the tokens.
        targets: Examples ``[M, D]``, or a ``.npy`` file of them; or a dict of these by the name of a task, of which
            as many examples are taken as the smallest has, or by ``weights``.
        agree: Examples that must rank a row high, ``k``; 1 is the rule of the paper. Well below the number of
            examples of the rarest kind.
        weights: A number > 0 for each task of ``targets``, in their order; None for equal ones. Tasks give examples
            in proportion to these, as many as the tasks have: ``max(1, floor(c w_t))`` of the ``m_t`` of task ``t``,
            ``c = min_t m_t / w_t``.
        sample: Rows of the pool that are ranked; of a larger pool the others are scored by a classifier.
        lengths: Tokens of each row, integers ``[N]``; rows are kept in their order until the budget is spent.
        losses: In the place of ``targets``: mean losses of the tokens of each row, floating ``[2, N]``, by a model
            and by the same after training on the target. The score is what the loss falls by (CoLoR-Filter, arXiv
            2406.10670), and the pool is only counted.
        exclude: Rows that may not stay, bool ``[N]``, such as :func:`~curation.instances.contamination.contaminated`
            ones; the selection is that from the other rows.
        random_state: Seed of the examples that are taken of each task, and of the sample.
        device: Where the products are computed; None for the CPU.
        verbose: Show a progress bar.

    Attributes:
        scores_: fp32 ``[N]``, minus the ``k``-th best rank; -inf for rows behind all that stay. Or the log-odds of
            the classifier, or the fall of the loss; -inf for excluded rows.
        report_: Also ``examples``, and ``depth``, the ranks that were looked at; with a classifier ``trained``, the
            rows that it learned from.

    Raises:
        ValueError: If there are no targets, fewer than must agree, or they have another number of features or a row
            that is zero or not finite; or a tenth of the sample is fewer rows than examples; of :meth:`fit`.

    Example:
        >>> pool = [[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [-1.0, 0.0]]
        >>> TargetedSelector(0.5, targets=[[1.0, 0.2], [0.1, 1.0]]).fit(pool).ranking_.tolist()
        [1, 2]
    """

    needs_classes = False

    def __init__(
        self,
        budget: float = 0.1,
        targets: Any = None,
        agree: int = 1,
        weights: Any = None,
        sample: int = 20_000_000,
        lengths: Any = None,
        losses: Any = None,
        exclude: Any = None,
        random_state: Any = 0,
        device: str | None = None,
        verbose: bool = False,
    ) -> None:
        self.budget = budget
        self.targets = targets
        self.losses = losses
        self.exclude = exclude
        self.agree = agree
        self.weights = weights
        self.sample = sample
        self.lengths = lengths
        self.random_state = random_state
        self.device = device
        self.verbose = verbose

    def fit(self, X: Any, y: Any = None) -> Self:
        """Select.

        Args:
            X: Features ``[N, D]`` of the pool: an array, a tensor or a memory map of floats, or
                :class:`~curation.instances.feature_shards.FeatureShards`.
            y: Ignored: what other selectors take for labels.
        """
        start = perf_counter()
        check_number("budget", self.budget, "(0, 1]")
        check_integer("agree", self.agree, 1)
        check_integer("sample", self.sample, 10)
        check_flag("verbose", self.verbose)
        check_text("device", self.device, optional=True)
        pool = X if isinstance(X, (np.ndarray, Tensor, FeatureShards)) else np.asarray(X, dtype=np.float32)
        if len(pool.shape) != 2 or not len(pool):
            raise ValueError(f"Argument `X` must be [N, D] with at least one row, but is {list(pool.shape)}.")
        n = len(pool)
        if (self.targets is None) == (self.losses is None):
            raise ValueError("Argument `targets` must be the features of examples, [M, D], or else `losses` [2, N].")
        cost = np.ones(n, np.int64) if self.lengths is None else np.asarray(self.lengths)
        out = np.zeros(n, bool) if self.exclude is None else np.asarray(self.exclude)
        if out.shape != (n,) or out.dtype != bool or out.all():
            raise ValueError(
                f"Argument `exclude` must be bool [{n}] and not all True, but is {out.dtype} {list(out.shape)}."
            )
        if cost.shape != (n,) or cost.dtype.kind not in "iu" or cost.min() < 0 or not cost[~out].any():
            raise ValueError(
                f"Argument `lengths` must be integers >= 0, one for each of {n} rows and not all 0, but is "
                f"{cost.dtype} {list(cost.shape)}."
            )
        cheapest = np.sort(cost[~out]).cumsum()
        share = self.budget * cheapest[-1]
        most = max(1, int(np.searchsorted(cheapest, share, side="right")))  # rows that can stay
        if self.losses is None:
            order, self.scores_, report = self._by_rank(pool, out, cost, share, most)
        else:
            order, self.scores_, report = self._by_loss(out)
        stay = max(1, int(np.searchsorted(cost[order].cumsum(), share + 1e-9, side="right")))
        if self.lengths is None:
            stay = max(1, round(share))
        self.ranking_ = order[:stay]
        self.sample_indices_ = np.sort(self.ranking_)
        self.classes_, self.n_features_in_ = np.zeros(1, np.int64), pool.shape[1]
        self.report_ = {
            "samples": n,
            "kept": stay,
            "reduction": 1 - stay / n,
            **report,
            "seconds": perf_counter() - start,
        }
        return self

    def _by_rank(
        self, pool: Any, out: np.ndarray, cost: np.ndarray, share: float, most: int
    ) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
        """Rows, best first, at least those that stay; the scores of all; and what is reported."""
        examples = self._examples(pool.shape[1])
        if self.agree > len(examples):
            raise ValueError(f"Argument `agree` must be in [1, {len(examples)} examples], but got {self.agree}.")
        if int((~out).sum()) > self.sample:
            return self._by_classifier(pool, examples, out)
        order, best, depth = self._ranked(pool, examples, out, cost, share, most)
        scores = np.where(best > 0, -best, -np.inf).astype(np.float32)
        return order, scores, {"examples": len(examples), "depth": depth}

    def _ranked(
        self, pool: Any, examples: np.ndarray, out: np.ndarray, cost: np.ndarray, share: float, most: int
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """Rows, best first, that cost so much at least; the ranks of all; and how many ranks were looked at."""
        device, rows = torch.device(self.device or "cpu"), int((~out).sum())
        depth = min(rows, max(LEAST, -(-4 * most * self.agree // len(examples))))
        exclude = out if out.any() else None
        if self.verbose:
            seconds, size = forecast(pool, examples, depth, device, exclude)
            print(
                f"{rows:,} rows for {len(examples):,} examples: about {seconds:.0f} s, {size / 2**30:.1f} GiB beside "
                "the pool"
            )
        while True:
            progress = _progress if self.verbose else iter
            best, mean = best_ranks(pool, examples, depth, device, progress, self.agree, exclude)
            ranked = np.flatnonzero(best)
            order = ranked[np.lexsort((ranked, -mean[ranked], best[ranked]))]
            if depth == rows or cost[order].sum() >= share:
                return order, best, depth
            depth = min(rows, 4 * depth)  # examples share their nearest rows

    def _by_classifier(
        self, pool: Any, examples: np.ndarray, out: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
        """As :meth:`_by_rank`, of a pool of which a sample is ranked."""
        positives = round(POSITIVE * self.sample)
        if positives < len(examples):
            raise ValueError(
                f"Argument `sample` must be at least ten times the {len(examples)} examples, but got {self.sample}."
            )
        draw = np.random.default_rng((self._seed(), 1))
        sampled = draw.choice(np.flatnonzero(~out), self.sample, replace=False, shuffle=False)
        rest = np.ones(len(out), bool)
        rest[sampled] = False
        order, _, depth = self._ranked(pool, examples, rest, np.ones(len(out), np.int8), positives, positives)
        near, far = order[:positives], np.setdiff1d(sampled, order[:positives])
        near = draw.permutation(near)[:TRAINED]
        far = draw.permutation(far)[: NEGATIVES * len(near)]
        device = torch.device(self.device or "cpu")
        scores = log_odds(pool, np.sort(near), np.sort(far), device, _progress if self.verbose else iter)
        scores[out] = -np.inf
        best_first = np.argsort(-scores, kind="stable")[: int((~out).sum())]
        return best_first, scores, {"examples": len(examples), "depth": depth, "trained": len(near) + len(far)}

    def _by_loss(self, out: np.ndarray) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
        """Rows, the largest fall of the loss first; the scores of all; and what is reported."""
        if self.agree != 1:
            raise ValueError(f"Argument `agree` must be 1 with `losses`, but got {self.agree}.")
        losses = np.asarray(self.losses, np.float64)
        if losses.shape != (2, len(out)) or not np.isfinite(losses[:, ~out]).all():
            raise ValueError(
                f"Argument `losses` must be finite numbers [2, {len(out)}], but is {list(losses.shape)} with "
                f"{int((~np.isfinite(losses)).sum())} that are not finite."
            )
        scores = np.where(out, -np.inf, losses[0] - losses[1])
        return np.argsort(-scores, kind="stable")[: int((~out).sum())], scores.astype(np.float32), {}

    def _examples(self, features: int) -> np.ndarray:
        """The examples of the target, fp32 ``[M, D]``, as many of each task."""
        tasks = self.targets if isinstance(self.targets, Mapping) else {"": self.targets}
        read = {name: _checked(name, values, features) for name, values in tasks.items()}
        if not read:
            raise ValueError("Argument `targets` must have a task, but got {}.")
        draw = np.random.default_rng(self._seed())
        counts = examples_by_weight([*map(len, read.values())], self.weights)
        return np.concatenate(
            [
                x if len(x) == count else x[np.sort(draw.permutation(len(x))[:count])]
                for x, count in zip(read.values(), counts, strict=True)
            ]
        )


def examples_by_weight(sizes: list[int], weights: Any = None) -> list[int]:
    """How many examples each task gives: in proportion to the weights, at least one, and as many as there are.

    Args:
        sizes: Examples ``m_t`` of each task.
        weights: Weights ``w_t``, > 0; None for equal ones.

    Raises:
        ValueError: If there is not a finite number > 0 for each task.

    Example:
        >>> examples_by_weight([64, 64], [3, 1]), examples_by_weight([30, 90], [3, 1])
        ([64, 21], [30, 10])
    """
    values = np.ones(len(sizes)) if weights is None else np.asarray(weights, np.float64)
    if values.shape != (len(sizes),) or not (np.isfinite(values) & (values > 0)).all():
        raise ValueError(
            f"Argument `weights` must be a finite number > 0 for each of {len(sizes)} tasks, but got {weights!r}."
        )
    scale = (np.asarray(sizes) / values).min()
    return [max(1, int(scale * value + 1e-9)) for value in values]


def log_odds(
    pool: Any,
    near: np.ndarray,
    far: np.ndarray,
    device: torch.device | str = "cpu",
    progress: Callable[[list[Any]], Iterable[Any]] = iter,
) -> np.ndarray:
    """Log-odds of each row of a pool by a logistic regression that tells two parts of it apart, fp32 ``[N]``.

    Args:
        pool: Floating ``[N, D]``: an array, a tensor, a memory map, or shards; made unit norm.
        near: Rows of the first part, int64 in ascending order.
        far: Rows of the second part, as these.
        device: Where all rows are scored.
        progress: Wraps the list of blocks.

    Raises:
        ValueError: If a row of the pool is not finite; its number is named.
    """
    from sklearn.linear_model import LogisticRegression

    x = torch.cat([_unit(pool, torch.from_numpy(rows), torch.device("cpu")) for rows in (near, far)]).numpy()
    y = np.arange(len(x)) < len(near)
    model = LogisticRegression(C=STRENGTH / len(x), max_iter=1000).fit(x, y)
    weights = torch.from_numpy(model.coef_[0]).float().to(device)
    scores = np.empty(len(pool), np.float32)
    for start in progress(list(range(0, len(pool), BLOCK))):
        rows = _unit(pool, slice(start, min(len(pool), start + BLOCK)), torch.device(device))
        scores[start : start + BLOCK] = (rows @ weights).cpu().numpy() + model.intercept_[0]
    return scores


def best_ranks(
    pool: Any,
    examples: np.ndarray,
    depth: int,
    device: torch.device | str = "cpu",
    progress: Callable[[list[Any]], Iterable[Any]] = iter,
    agree: int = 1,
    exclude: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The best rank of each row of a pool for any example, or the ``k``-th best, by cosine similarity.

    Args:
        pool: Floating ``[N, D]``: an array, a tensor, a memory map, or shards.
        examples: fp32 ``[M, D]``.
        depth: Ranks that are found, in [1, N].
        device: Where the products are computed.
        progress: Wraps the list of blocks.
        agree: ``k``, in [1, M].
        exclude: Rows that have no rank and take none, bool ``[N]``.

    Returns:
        Ranks int64 ``[N]`` from 1, 0 beyond the depth; equal similarities are ranked in the order of the rows. And
        the mean similarity to the examples, fp32 ``[N]``.

    Raises:
        ValueError: If a row of the pool is not finite; its number is named.

    Example:
        >>> best_ranks(np.eye(3, dtype=np.float32), np.array([[2, 1, 0]], np.float32), depth=2)[0].tolist()
        [1, 2, 0]
    """
    queries = torch.nn.functional.normalize(torch.from_numpy(examples).to(device), dim=1)
    centre, dtype = queries.mean(0), _faster(queries)
    rounded = queries.to(dtype)
    # Of a product of rounded unit vectors, before it is rounded itself; and its sums, in fp32, are rounded.
    error = 1.01 * (queries - rounded.float()).norm(dim=1).max() + queries.size(1) * 2.0**-23
    if queries.device.type != "cpu":  # libraries may round sums of a few parts, too
        error += 2 * torch.finfo(dtype).eps
    mean = np.empty(len(pool), np.float32)
    nearest = _Nearest(len(queries), depth, dtype, min(4 * depth, len(pool)), queries.device)
    for start, stop in progress(list(_blocks(len(pool), len(queries), depth))):
        rows = _unit(pool, slice(start, stop), queries.device)
        mean[start:stop] = (rows @ centre).cpu().numpy()
        ids = torch.arange(start, stop, device=queries.device)
        if exclude is not None:
            stays = torch.from_numpy(~exclude[start:stop]).to(queries.device)
            rows, ids = rows[stays], ids[stays]
            if not len(ids):
                continue
        near = rows.to(dtype)
        nearest.add(rounded @ near.T, ids, error + (rows - near).norm(dim=1).max())
    nearest.merge()
    ids, places = nearest.compare(pool, queries)
    return _kth_places(ids.cpu(), places.cpu(), len(pool), depth, agree).numpy(), mean


def forecast(
    pool: Any,
    examples: np.ndarray,
    depth: int,
    device: torch.device | str = "cpu",
    exclude: np.ndarray | None = None,
) -> tuple[float, float]:
    """Seconds and bytes that :func:`best_ranks` will take: the time from its first rows, as of all if they are few.

    Args:
        pool: As in :func:`best_ranks`.
        examples: fp32 ``[M, D]``.
        depth: Ranks that are found.
        device: Where the products are computed.
        exclude: As in :func:`best_ranks`.
    """
    first = pool[: max(1, COSINES // len(examples))]
    start = perf_counter()
    part = None if exclude is None else exclude[: len(first)]
    best_ranks(first, examples, max(1, depth * len(first) // len(pool)), device, exclude=part)
    seconds = (perf_counter() - start) * len(pool) / len(first)
    return seconds, PER_RANK * len(examples) * depth + PER_ROW * len(pool)


def _kth_places(ids: Tensor, places: Tensor, rows: int, depth: int, agree: int) -> Tensor:
    """The ``k``-th smallest place of each row, int64 ``[N]`` from 1; 0 for one with fewer below the depth."""
    pairs = (ids * depth + places)[places < depth].sort().values
    ids, places = pairs // depth, pairs % depth
    owners, counts = ids.unique_consecutive(return_counts=True)
    last = counts.cumsum(0) - counts + agree - 1
    enough = counts >= agree
    best = torch.zeros(rows, dtype=torch.int64)
    best[owners[enough]] = places[last[enough]] + 1
    return best


class _Nearest:
    """The nearest rows of each example among those that were seen.

    Args:
        examples: Their number ``M``.
        depth: Rows to keep for each, ``T``.
        dtype: What similarities are rounded to, so that rows behind these may still be among them.
        width: Rows that there is room for at first, ``W``; more is made where more are alike.
        device: The device.

    Attributes:
        ids: int64 ``[M, W]``, rows of the pool.
        values: fp32 ``[M, W]``, their similarities; -inf for empty places.
        sizes: int64 ``[M]``, the places of each example that are not empty; these come first.
        last: fp32 ``[M]``, the similarity of the ``T``-th.
    """

    def __init__(self, examples: int, depth: int, dtype: torch.dtype, width: int, device: torch.device) -> None:
        self.depth, self.dtype = depth, dtype
        self.last = torch.full((examples,), -torch.inf, device=device)
        self.error = torch.zeros((), device=device)
        self.values = torch.full((examples, width), -torch.inf, device=device)
        self.ids = torch.zeros((examples, width), dtype=torch.int64, device=device)
        self.sizes = torch.zeros(examples, dtype=torch.int64, device=device)
        self._seen = self._merged = 0

    def add(self, similarities: Tensor, ids: Tensor, error: Tensor) -> None:
        """Enter the similarities ``[M, B]`` of rows ``[B]``, that were so far off before rounding."""
        self.error = torch.maximum(self.error, error)
        owners, columns = _at_least(similarities, self.floor())
        counts = owners.bincount(minlength=len(self.sizes))
        if int((self.sizes + counts).max()) > self.values.size(1):
            self.merge()
        self._put(owners, ids[columns], similarities[owners, columns].float(), counts)
        self._seen += similarities.size(1)
        if self._seen >= 2 * self._merged:
            self.merge()

    def floor(self) -> Tensor:
        """What a similarity of the nearest is not below, ``[M]``.

        Rounding is monotone. The product of the last may be less by half a step than what it was rounded to; it and
        that of another row are off by the error.
        """
        step = torch.finfo(self.dtype).eps / 2
        return (self.last - step * self.last.abs() - 2 * self.error).to(self.dtype)

    def merge(self) -> None:
        """Raise the floors, and forget what is below them."""
        self._merged = self._seen
        width = int(self.sizes.max())
        if width >= self.depth:
            self.last = _largest(self.values[:, :width], self.depth)
        owners, ids, values = self.entries()
        kept = values >= self.floor().float()[owners]
        owners, ids, values = owners[kept], ids[kept], values[kept]
        counts = owners.bincount(minlength=len(self.sizes))
        self.values.fill_(-torch.inf)
        self.sizes.zero_()
        self._put(owners, ids, values, counts, room=2)

    def entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """Examples ``[n]`` in their order, rows of the pool, and similarities."""
        owners, places = _at_least(self.values, torch.full_like(self.last, -2))  # similarities are in [-1, 1]
        return owners, self.ids[owners, places], self.values[owners, places]

    def _put(self, owners: Tensor, ids: Tensor, values: Tensor, counts: Tensor, room: int = 1) -> None:
        """Enter rows of examples that are in order, so many of each; with room for so many times as many."""
        short = room * int((self.sizes + counts).max()) - self.values.size(1)
        if short > 0:
            self.values = torch.nn.functional.pad(self.values, (0, short), value=-torch.inf)
            self.ids = torch.nn.functional.pad(self.ids, (0, short))
        starts = self.sizes - counts.cumsum(0) + counts
        places = torch.arange(len(owners), device=owners.device) + starts[owners]
        self.values[owners, places] = values
        self.ids[owners, places] = ids
        self.sizes += counts

    def compare(self, pool: Any, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the similarities anew, in fp32.

        Returns:
            Rows of the pool ``[n]``, and their places in the order of their example, from 0; equal ones are in the
            order of the rows.
        """
        owners, ids, _ = self.entries()
        order = ids.argsort(stable=True)
        owners, ids = owners[order], ids[order]
        values = torch.empty(len(ids), device=queries.device)
        size = max(1, CACHED // queries.size(1))
        for part, examples, found in zip(ids.split(size), owners.split(size), values.split(size), strict=True):
            rows, places = part.unique_consecutive(return_inverse=True)
            near = _unit(pool, rows, queries.device).index_select(0, places)
            torch.sum(near.mul_(queries.index_select(0, examples)), 1, out=found)
        order = (owners - values.double() / 4).sort(stable=True).indices  # similarities are in [-1, 1]
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order), device=order.device)
        counts = owners.bincount(minlength=len(self.sizes))
        return ids, places - (counts.cumsum(0) - counts)[owners]


def _at_least(values: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of a matrix ``[M, B]``, row by row, at which it is not below the floor ``[M]`` of the row."""
    floor = floor[:, None]
    if values.device.type != "cpu":
        rows, columns = (values >= floor).nonzero(as_tuple=True)
        return rows, columns
    if values.dtype == torch.bfloat16 and bool((floor >= 0).all()):  # then they are in the order of their bits
        values, floor = values.view(torch.int16), floor.view(torch.int16)
    elif values.dtype == torch.bfloat16:
        values, floor = values.float(), floor.float()
    at = np.flatnonzero(values.numpy() >= floor.numpy())  # several times as fast as torch
    return torch.from_numpy(at // values.size(1)), torch.from_numpy(at % values.size(1))


def _largest(values: Tensor, k: int) -> Tensor:
    """The ``k``-th largest of each row, fp32 ``[M]``."""
    if values.device.type != "cpu":
        return values.topk(k, sorted=False).values.amin(1)
    at = values.size(1) - k
    return torch.from_numpy(np.partition(values.numpy(), at, axis=1)[:, at].copy())


def _faster(queries: Tensor) -> torch.dtype:
    """bf16 where products in it take less time than in fp32, as on a GPU or a CPU with instructions for it."""
    if queries.device.type != "cpu":
        return torch.bfloat16

    def seconds(dtype: torch.dtype) -> float:
        x = queries[:256].to(dtype)
        y = x.repeat(8, 1)
        took = []
        for _ in range(3):
            start = perf_counter()
            x @ y.T
            took.append(perf_counter() - start)
        return min(took)

    return min((torch.bfloat16, torch.float32), key=seconds)


def _blocks(rows: int, examples: int, depth: int) -> Iterator[tuple[int, int]]:
    """Blocks of rows that double, so that floors are high before there is much to compare with them."""
    start, size, most = 0, depth, max(1, CELLS // examples)
    while start < rows:
        stop = min(rows, start + min(size, most))
        yield start, stop
        start, size = stop, max(depth, stop)


def _unit(pool: Any, rows: slice | Tensor, device: torch.device) -> Tensor:
    """Rows of the pool, fp32, of unit norm."""
    place = rows.cpu() if isinstance(rows, Tensor) else rows
    if isinstance(pool, Tensor):
        part = pool[place if isinstance(place, slice) else place.to(pool.device)]
    else:
        part = torch.from_numpy(np.ascontiguousarray(pool[place if isinstance(place, slice) else place.numpy()]))
    values = part.to(device).float()
    norms = values.norm(dim=1, keepdim=True)
    wrong = ~norms.isfinite()
    if bool(wrong.any()):
        at = int(wrong.flatten().long().argmax())
        row = place.start + at if isinstance(place, slice) else int(place[at])
        raise ValueError(f"Argument `X` must have finite rows, but row {row} is not.")
    return values / norms.clamp(min=torch.finfo(torch.float32).tiny)


def _checked(task: str, values: Any, features: int) -> np.ndarray:
    """Examples of a task, fp32 ``[m, D]``."""
    name = f"targets[{task!r}]" if task else "targets"
    if isinstance(values, (str, os.PathLike)):
        if not os.path.isfile(values):
            raise ValueError(f"Argument `{name}` must be [M, D] or a .npy file, but there is no {str(values)!r}.")
        values = np.load(values)
    array = np.asarray(values.detach().cpu().float() if isinstance(values, Tensor) else values, dtype=np.float32)
    if array.ndim != 2 or not len(array) or array.shape[1] != features:
        raise ValueError(
            f"Argument `{name}` must be [M, {features}], as the pool has {features} features, but is "
            f"{list(array.shape)}."
        )
    wrong = ~np.isfinite(array).all(1) | ~array.any(1)
    if wrong.any():
        raise ValueError(
            f"Argument `{name}` must have rows that are finite and not zero, but row {int(wrong.argmax())} is not."
        )
    return array


def _progress(blocks: list[Any]) -> Iterable[Any]:
    from rich.progress import track

    return track(blocks, "ranking")
