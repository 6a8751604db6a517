"""Batches of any structure and a module that learns from their rows; unlike lambdas, they go to other processes."""

import math

import numpy as np
import torch
from helpers import Pair, Record
from lightning.pytorch import LightningModule
from torch import nn

from curation.batch import leaves

MOST = 16  # rows of a batch at most
DTYPES = (torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Every field is a function that makes it of the rows asked for: the twin of taking them.


def tag(rows):
    return torch.tensor(rows, dtype=torch.int64)


def table(dtype, shape, rows):
    return torch.arange(MOST * math.prod(shape)).view(MOST, *shape)[rows].to(dtype)


def column(number, rows):
    return COLUMNS[number](rows)


def constant(value, rows):
    return value


def build(kind, a, b, rows):
    return CONTAINERS[kind](tag(rows), a(rows), b(rows))


CONTAINERS = {
    "tensor": lambda rows, a, b: rows,
    "dict": lambda rows, a, b: {"rows": rows, 0: a, "0": b},
    "list": lambda rows, a, b: [rows, a, b],
    "tuple": lambda rows, a, b: (rows, a, b),
    "namedtuple": lambda rows, a, b: Pair(rows, {"a": a, "b": b}),
    "dataclass": lambda rows, a, b: Record(rows, (a, b, rows)),
}
COLUMNS = [
    lambda rows: [f"row {i}" for i in rows],
    lambda rows: tuple({"i": i} for i in rows),
    lambda rows: [[i] * (i % 3) for i in rows],
    lambda rows: [torch.tensor(i) for i in rows],
    lambda rows: np.arange(MOST, dtype=np.float16)[rows],
]


def with_ids(make, rows):
    """A batch that is a dictionary, a list or a tuple, with sample ids."""
    batch, ids = make(rows), {"sample_id": tag(rows)}
    return {**batch, **ids} if isinstance(batch, dict) else type(batch)([*batch, ids])


class Tiny(LightningModule):
    """Its logits are those of a table; remembers the rows that it was trained on."""

    def __init__(self, logits, make, stop=None):
        super().__init__()
        self.weight, self.sample_weights, self.got = nn.Parameter(torch.ones(())), None, []
        self.logits, self.make, self.stop = logits, make, stop

    def score_step(self, batch):
        rows = leaves(batch)[0][1]
        return self.logits[rows], rows % 2

    def training_step(self, batch, batch_idx):
        if len(self.got) == self.stop:
            raise InterruptedError
        rows = leaves(batch)[0][1]
        assert repr(batch) == repr(self.make(rows.tolist()))
        weights = torch.ones(len(rows)) if self.sample_weights is None else self.sample_weights
        assert weights.isfinite().tolist() == [True] * len(rows)
        self.got.append(rows.tolist())
        return (weights * (self.weight - rows.float()) ** 2).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)
