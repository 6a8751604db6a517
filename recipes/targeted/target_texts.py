"""A pool of text in several domains, of which a part is kept for examples of one."""

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from curation.checks import check_choice, check_integer, check_number, check_text
from curation.instances import TargetedSelector
from curation.recipes.mixture_of_experts.domains import Domains, Pieces
from curation.recipes.seeds import global_seed
from curation.recipes.sources import AUTO
from curation.samplers import NarrowingSampler

KEEP = ("all", "random", "same_domains", "centroid", "best_rank")


class TargetTexts(Domains):
    """A pool of pieces of text, of which those stay that a selection keeps for examples of a domain.

    Each domain gives as many pieces to the pool. The examples are other pieces of the target's domain, and validation
    has pieces of files of their own. Pieces are ``{"input_ids": int64 [T], "domain": int64, "is_target": bool}``; a
    token is a byte.

    Args:
        domains: As in :class:`~curation.recipes.mixture_of_experts.Domains`.
        target: Name of the domain that the examples are of.
        keep: What stays of the pool: ``"all"``; ``"random"`` rows; ``"best_rank"``, what
            :class:`~curation.instances.TargetedSelector` keeps; ``"same_domains"``, random rows with as many of each
            domain as that; or ``"centroid"``, what is nearest to the mean of the examples.
        budget: Share of the pool that stays, in (0, 1]; not with ``"all"``.
        begin: Share of the pool that stays at the first step, which falls to ``budget`` at the last
            (:class:`~curation.samplers.NarrowingSampler`); with ``"best_rank"`` in a fit of ``max_steps``. None for
            ``budget`` throughout.
        agree: As in :class:`~curation.instances.TargetedSelector`.
        pool: Pieces of each domain in the pool.
        examples: Pieces of the target that are given as examples.
        length: Number ``T`` of bytes in a piece, at least 3.
        batch_size: Pieces in a batch, per process.
        holdout: Fraction of the files of each domain that are held out, in (0, 1).
        val_pieces: Number of pieces of each domain in validation.
        num_workers: Number of worker processes of a data loader.
        seed: Seed of the pool, the examples and the random rows; None for that of ``seed_everything``.

    Raises:
        ValueError: If an argument is out of its range, there is no such domain, or one has too few pieces.
    """

    def __init__(
        self,
        domains: dict[str, str] | str = AUTO,
        target: str = "python",
        keep: str = "best_rank",
        budget: float = 0.1,
        begin: float | None = None,
        agree: int = 1,
        pool: int = 1500,
        examples: int = 64,
        length: int = 256,
        batch_size: int = 16,
        holdout: float = 0.1,
        val_pieces: int = 128,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        check_integer("length", length, 3)
        super().__init__(domains, length, batch_size, False, holdout, val_pieces, num_workers, seed)
        self.target: str = check_text("target", target)
        self.keep = check_choice("keep", keep, KEEP)
        self.budget: float = check_number("budget", budget, "(0, 1]")
        self.begin: float | None = check_number("begin", begin, "(0, 1]", optional=True)
        self.agree = check_integer("agree", agree, 1)
        if begin is not None and (keep != "best_rank" or begin < budget):
            raise ValueError(f"Argument `begin` must be >= `budget` and with `keep` 'best_rank', but got {begin}.")
        self.pool = check_integer("pool", pool, 1)
        self.examples = check_integer("examples", examples, 1)
        if self.target not in self.domains:
            raise ValueError(f"Argument `target` must be one of {', '.join(self.domains)}, but got {target!r}.")

    def setup(self, stage: str) -> None:
        """Read the files, draw the pool and the examples, and keep a part of the pool; once."""
        if self.train is not None:
            return
        super().setup(stage)
        if self.target not in self.names:
            raise ValueError(f"Argument `target` must be one of {', '.join(self.names)}, but got {self.target!r}.")
        train, target = self.train, self.names.index(self.target)
        for name, size in zip(self.names, train.sizes, strict=True):  # type: ignore[attr-defined]
            if size < self.pool + self.examples:
                raise ValueError(
                    f"Arguments `pool` and `examples` must be at most the {size} pieces of {name!r} together, but "
                    f"got {self.pool} and {self.examples}."
                )
        draw = np.random.default_rng(global_seed(self.seed))
        parts = [
            part[draw.permutation(len(part))[: self.pool + self.examples]]
            for part in train.x.split(train.sizes)  # type: ignore[attr-defined]
        ]
        pool = torch.cat([part[self.examples :] for part in parts])
        domain = np.repeat(np.arange(len(parts)), self.pool)
        order = self._kept(pool, parts[target][: self.examples], domain, draw)
        rows = np.sort(order)
        self.ranking = np.searchsorted(rows, order)
        of_target = (domain[rows] == target).mean()
        rank_zero_info(f"TargetTexts: {len(rows)} of {len(pool)} pieces, {of_target:.0%} of them of {self.target}.")
        counts = np.bincount(domain[rows], minlength=len(parts)).tolist()
        self.train = Pieces(pool[rows].split(counts))  # rows rise, and the pool goes by domain
        self.train_set, self.val_set = _OfTarget(self.train, target), _OfTarget(self.val, target)

    def _kept(self, pool: Tensor, examples: Tensor, domain: np.ndarray, draw: np.random.Generator) -> np.ndarray:
        """The rows of the pool that stay, int64 ``[n]``, best first where they are ranked."""
        if self.keep == "all":
            return np.arange(len(pool))
        if self.keep == "random":
            size = max(1, round(self.budget * len(pool)))
            return draw.choice(len(pool), size, replace=False)
        features = byte_features(torch.cat([pool, examples]))
        x, targets = features[: len(pool)], features[len(pool) :]
        if self.keep == "centroid":
            targets = targets.mean(0, keepdims=True)
        agree = 1 if self.keep == "centroid" else self.agree
        rows = TargetedSelector(self.begin or self.budget, targets, agree=agree).fit(x).ranking_
        if self.keep == "same_domains":
            counts = np.bincount(domain[rows], minlength=domain[-1] + 1)
            parts = [draw.choice(np.flatnonzero(domain == i), count, replace=False) for i, count in enumerate(counts)]
            return np.concatenate(parts)
        return rows

    def train_dataloader(self) -> DataLoader:
        """The pieces that stay, reshuffled every epoch; or fewer and fewer of them."""
        if self.begin is not None:
            steps = -1 if self.trainer is None else self.trainer.max_steps
            if steps < 1:
                raise ValueError("Argument `begin` needs a trainer with `max_steps`, over which the share falls.")
            last, seed = self.budget / self.begin, global_seed(self.seed)
            sampler = NarrowingSampler(self.ranking, self.batch_size, steps, 1.0, last, seed)
            return DataLoader(self.train_set, self.batch_size, sampler=sampler, num_workers=self.num_workers)
        return DataLoader(self.train_set, self.batch_size, shuffle=True, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader:
        """The held-out pieces, domain by domain."""
        return DataLoader(self.val_set, 64, num_workers=self.num_workers)


class _OfTarget(Dataset):
    """Pieces that say whether they are of the target."""

    def __init__(self, pieces: Pieces, target: int) -> None:
        self.pieces, self.target = pieces, target

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        piece = self.pieces[i]
        return {**piece, "is_target": piece["domain"] == self.target}


def byte_features(pieces: Tensor, size: int = 2048, n: int = 3) -> np.ndarray:
    """Counts of hashed ``n``-grams of bytes, as log(1 + count) times the log of the inverse share of rows with it.

    Rows are scaled to length 1 and the mean row is subtracted: what all rows have in common is no likeness.

    Args:
        pieces: uint8 ``[N, T]``, of at least ``n`` bytes.
        size: Number of hashes, ``D``.
        n: Bytes of an ``n``-gram.

    Returns:
        fp32 ``[N, D]``.

    Example:
        >>> x = byte_features(torch.tensor([list(b"abcd"), list(b"abcd"), list(b"wxyz")]).byte())
        >>> (x[0] @ x[1] > 0).item(), (x[0] @ x[2] < 0).item()
        (True, True)
    """
    x = pieces.numpy().astype(np.uint64)
    hashes = np.zeros((x.shape[0], x.shape[1] - n + 1), np.uint64)
    for i in range(n):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + x[:, i : i + hashes.shape[1]]
    hashes = (hashes ^ (hashes >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9) >> np.uint64(33)
    cells = (hashes % np.uint64(size)).astype(np.int64) + np.arange(len(x))[:, None] * size
    counts = np.bincount(cells.ravel(), minlength=len(x) * size).reshape(len(x), size)
    share = np.maximum((counts > 0).mean(0), 1 / len(x))
    features = np.log1p(counts).astype(np.float32) * -np.log(share).astype(np.float32)
    features /= np.maximum(np.linalg.norm(features, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return features - features.mean(0)
