"""What two ranks with unequal numbers of rows do, and what plain loops say that they must."""

import functools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from generated import MOST, Tiny, table, with_ids
from helpers import trainer
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from curation.batch import leaves
from curation.callbacks import (
    ExactResume,
    HardSampleSelection,
    RunMeter,
    SampleRecord,
    SelectionLedger,
    UniformSelection,
)
from curation.callbacks.lightning.collectives import agree, gather_rows, gather_sizes, sum_over_processes
from curation.callbacks.online import hard_samples
from curation.callbacks.online.budget import Budget
from curation.callbacks.online.choice import Choice

NONE = math.nan  # no score
LOGGED = ("curation/never_kept_fraction", "curation/samples_scored", "curation/samples_trained")


@functools.cache
def ranks() -> Trainer:
    """A trainer of this process and the other one."""
    run = trainer(devices=2, strategy="ddp", log_every_n_steps=0)
    run.strategy.setup_environment()
    return run


@dataclass
class Rows:
    """Rows of one rank: of a table, and as the candidates of several steps with their scores.

    Attributes:
        dtype: That of the table.
        shape: That of a row of the table.
        rows: Rows of the table.
        steps: Samples, and how often each is kept.
        scores: Of every sample, in every step.
        pool: Scores that Selective-Backprop remembers.
        keep: Of the candidates.
        fails: Whether the work that all have to agree on fails here.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    rows: list[int]
    steps: list[list[tuple[int, int]]]
    scores: list[float]
    pool: int
    keep: float
    fails: bool


def gather(given: Rows) -> dict[str, Any]:
    """What the collectives, and the callbacks that use them, make of the rows of both ranks."""
    run, budget = ranks(), Budget(given.keep)
    record, selection = SampleRecord(size=MOST), HardSampleSelection(keep=0.5, rule="selective_backprop")
    hard_samples.POOL = given.pool
    rows = table(given.dtype, given.shape, given.rows)

    def work() -> int:
        return 1 // (not given.fails)

    try:
        agreed: Any = agree(run, work)
    except (ZeroDivisionError, RuntimeError) as error:
        agreed = type(error)
    for step, samples in enumerate(given.steps):
        ids = torch.tensor([i for i, _ in samples], dtype=torch.int64)
        kept = torch.tensor([row for row, (_, n) in enumerate(samples) for _ in range(n)], dtype=torch.int64)
        selection.scored.scores = torch.tensor([given.scores[i] for i in ids])
        choice = Choice(len(ids), len(kept), kept, scores=selection.scored.scores, sample_ids=ids)
        record.on_selection(run, Tiny(rows, None), step, choice)
        selection.on_kept(run, kept, len(kept))
        budget.rows_to_keep(run, max(1, len(ids)))  # no batch has no rows
    return {
        "rows": gather_rows(run, rows),
        "sizes": gather_sizes(run, len(rows)),
        "sums": sum_over_processes(run, torch.tensor([len(rows), sum(given.rows)])).tolist(),
        "agreed": agreed,
        "record": {name: value.tolist() for name, value in record.store.state_dict().items()},
        "pool": selection.state_dict()["pool"].tolist(),
        "budget": [budget.candidates, budget.k],
    }


def gathered(*both: Rows) -> list[dict[str, Any]]:
    """The same by plain loops: what each rank must have."""
    one, other = both
    record = unseen()
    pool: list[float] = []
    for step, samples in enumerate(zip(one.steps, other.steps, strict=True)):
        for i, times in (*samples[0], *samples[1]):
            enter(record, step, i, one.scores[i], times)
            pool.append(one.scores[i])
    first = max(1, len(one.steps[0]), len(other.steps[0]))
    common = {
        "rows": table(one.dtype, one.shape, one.rows + other.rows),
        "sizes": [len(one.rows), len(other.rows)],
        "sums": [len(one.rows) + len(other.rows), sum(one.rows) + sum(other.rows)],
        "record": record,
        "pool": pool[-one.pool :],
        "budget": [first, max(1, math.floor(one.keep * first + 0.5))],
    }
    anyone = one.fails or other.fails
    return [{**common, "agreed": ZeroDivisionError if rank.fails else RuntimeError if anyone else 1} for rank in both]


def unseen() -> dict[str, list]:
    """The record of samples that were never candidates."""
    return {"scores": [NONE] * MOST, "steps": [-1] * MOST, "seen": [0] * MOST, "kept": [0] * MOST}


def enter(record: dict[str, list], step: int, i: int, score: float, times: int) -> None:
    record["seen"][i] += 1
    record["kept"][i] += times
    if not math.isnan(score):
        record["scores"][i], record["steps"][i] = score, step


@dataclass
class Fit:
    """A fit of two ranks.

    Attributes:
        make: Makes a batch of its rows.
        batches: Of an epoch: the samples of each rank.
        margins: Logits of the first of two classes, quarters of an integer; None for one that is not finite.
        rule: That of the selection.
        keep: Of the candidates.
        pool: Scores that Selective-Backprop remembers.
        epochs: Their number.
        accumulate: Batches of a step.
        seed: Of the selection.
        resumed: Steps after which the fit is resumed from a checkpoint; 0 for never.
    """

    make: Callable[[list[int]], Any]
    batches: list[tuple[list[int], list[int]]]
    margins: list[int | None]
    rule: str
    keep: float
    pool: int
    epochs: int
    accumulate: int
    seed: int
    resumed: int

    def loss(self, step: int, i: int) -> float:
        """Another one in every step."""
        margin = self.margins[(i + step) % len(self.margins)]
        return NONE if margin is None else math.log1p(math.exp(-margin / 4))


class Stepping(Tiny):
    """Its logits are others in every step."""

    def __init__(self, fit: Fit) -> None:
        super().__init__(None, fit.make)
        self.margins = torch.tensor([math.nan if m is None else m / 4 for m in fit.margins])
        self.trained = 0

    def score_step(self, batch):
        rows = leaves(batch)[0][1]
        margins = self.margins[(rows + self.trained) % len(self.margins)]
        return torch.stack([margins, torch.zeros(len(rows))], dim=1), torch.zeros_like(rows)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.trained += batch is not None

    def on_save_checkpoint(self, checkpoint):
        checkpoint["trained"] = self.trained

    def on_load_checkpoint(self, checkpoint):
        self.trained = checkpoint["trained"]


def train(given: tuple[Fit, Path]) -> dict[str, Any]:
    """The fit on this rank, and what its callbacks then know."""
    (fit, folder), run = given, ranks()
    rank, checkpoint, got = run.global_rank, None, []
    hard_samples.POOL = fit.pool
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for steps in (fit.resumed, -1) if fit.resumed else (-1,):
        selection = (
            UniformSelection(keep=fit.keep, seed=fit.seed)
            if fit.rule == "uniform"
            else HardSampleSelection(keep=fit.keep, rule=fit.rule, seed=fit.seed)
        )
        record, meter, module = SampleRecord(), RunMeter(folder / "run.json"), Stepping(fit)
        loader = DataLoader(
            range(MOST),
            batch_sampler=[both[rank] for both in fit.batches],
            collate_fn=lambda rows: with_ids(fit.make, rows) if rows else None,
        )
        run = trainer(
            selection, record, SelectionLedger(folder / "ledger"), meter, ExactResume(), devices=2, strategy="ddp",
            use_distributed_sampler=False, max_epochs=fit.epochs, max_steps=steps,
            accumulate_grad_batches=fit.accumulate,
        )  # fmt: skip
        run.fit(module, loader, ckpt_path=checkpoint, weights_only=False)
        got += module.got
        if module.got:  # the checkpoint may be that of the last batch
            logged = {name: float(run.callback_metrics[name]) for name in LOGGED}
        checkpoint = folder / "half.ckpt"
        if steps > 0:
            run.save_checkpoint(checkpoint)
    return {
        "got": got,
        "record": {name: value.tolist() for name, value in record.state_dict()["store"].items()},
        "pool": selection.state_dict()["pool"].tolist() if fit.rule != "uniform" else [],
        "counts": [selection.candidates, selection.k, selection.samples_scored, selection.samples_trained],
        "metered": meter.samples,
        "logged": logged,
    }


def trained(fit: Fit) -> tuple[list[dict[str, Any]], list[tuple]]:
    """What each rank must know after a fit, and the rows of the ledger, by plain loops."""
    record = unseen()
    pool: list[float] = []
    got: tuple[list, list] = [], []
    ledger: tuple[list, list] = [], []
    counts = [0, 0]  # scored and trained
    real = [both for both in fit.batches if both[0]]
    largest = max(map(len, real[0]))
    k = max(1, math.floor(fit.keep * largest + 0.5))
    scores_rows = fit.rule != "uniform" and fit.keep < 1
    for step, both in enumerate(real * fit.epochs):
        seen: list[float] = []
        for rank, ids in enumerate(both):
            scores = [fit.loss(step, i) for i in ids]
            rows, weights = choose(fit, step, rank, scores, pool, k)
            got[rank].append([ids[row] for row in rows])
            seen += scores
            for row, i in enumerate(ids):
                score = scores[row] if scores_rows else NONE
                enter(record, step, i, score, int(row in rows))
                ledger[rank].append((step, i, score, int(row in rows), weights.get(row, 0)))
            counts[0] += len(ids) if scores_rows else 0
            counts[1] += len(rows)
        pool = (pool + seen)[-fit.pool :] if scores_rows and fit.rule == "selective_backprop" else []
    logged = dict(zip(LOGGED, [record["kept"].count(0) / MOST, *counts], strict=True))
    common = {"record": record, "logged": logged, "pool": pool, "counts": [largest, k, *counts], "metered": counts[1]}
    return [{**common, "got": rows} for rows in got], ledger[0] + ledger[1]


def choose(fit: Fit, step: int, rank: int, scores: list[float], pool: list[float], k: int):
    """Rows, ascending, and what each weighs."""
    size = len(scores)
    if fit.keep == 1 or k >= size:
        return list(range(size)), dict.fromkeys(range(size), 1)
    uniform = np.random.default_rng((fit.seed, step, rank)).random(size).tolist()
    finite = [score for score in pool + scores if math.isfinite(score)]
    keys = []
    for score, u in zip(scores, uniform, strict=True):
        p = (sum(x <= score for x in finite) / len(finite)) ** (1 / fit.keep - 1) if finite else 0
        key = {
            "uniform": float(np.float32(u)),
            "top": score,
            "selective_backprop": min(p, 1 - 1e-12) / max(1 - p, 1e-12) * (1 - u) / u,
            "importance": score / u,
        }[fit.rule]
        keys.append(-1.0 if math.isnan(key) or (math.isnan(score) and fit.rule != "uniform") else key)
    order = sorted(range(size), key=lambda row: -keys[row])
    threshold = max(0.0, keys[order[k]])
    weights = {row: 1.0 for row in order[:k]}
    if fit.rule == "importance":
        weights = {row: (max(1.0, threshold / scores[row]) if scores[row] > 0 else 1.0) * k / size for row in weights}
    return sorted(weights), weights
