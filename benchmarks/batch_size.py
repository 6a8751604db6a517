"""What a changing batch size costs: time inside the hooks, in a step of about 100 ms on two CPU cores.

    python benchmarks/batch_size.py            # BatchSizeScheduler, and AdaptiveBatchSize with and without a test
    python benchmarks/batch_size.py --width 600

On an idle machine; medians over 200 batches, of which four make a step. A test is what ``AdaptiveBatchSize`` does in
every 50th step; here it is done in every step, or in none but the first.
"""

import argparse
import itertools
import statistics
import time
from typing import Any

import torch
from dynamic_pruning import Net
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader, TensorDataset

from curation.callbacks import AdaptiveBatchSize, BatchSizeScheduler

ROWS = 256


class Clock(Callback):
    """When each batch began."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """Note the time."""
        self.times.append(time.perf_counter())

    @property
    def batch(self) -> float:
        """Median seconds of a batch."""
        return statistics.median(b - a for a, b in itertools.pairwise(self.times[20:]))


def timed(width: int, callback: Callback | None, batches: int = 220) -> tuple[float, float]:
    """Seconds of a batch, and of that in the hooks of the callback."""
    spent: list[float] = []
    for name in ("on_train_batch_start", "on_before_backward", "on_after_backward", "on_before_optimizer_step",
                 "on_train_batch_end", "_take"):  # fmt: skip
        if hasattr(callback, name):
            setattr(callback, name, timed_hook(getattr(callback, name), spent))
    clock = Clock()
    dataset = TensorDataset(torch.randn(ROWS * batches, 64), torch.randint(10, (ROWS * batches,)))
    Trainer(
        max_epochs=1, accumulate_grad_batches=4, callbacks=[clock, *([] if callback is None else [callback])],
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    ).fit(Net(width), DataLoader(dataset, ROWS))  # fmt: skip
    return clock.batch, sum(spent) / batches


def timed_hook(function: Any, spent: list[float]) -> Any:
    """The function, which adds its seconds to a list."""

    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = function(*args, **kwargs)
        spent.append(time.perf_counter() - start)
        return result

    return call


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1800)
    width = parser.parse_args().width
    for name, callback in {
        "scheduler": BatchSizeScheduler([(0, 4 * ROWS)]),
        "adaptive, no test": AdaptiveBatchSize(1e9, every=10**9),
        "adaptive, every step a test": AdaptiveBatchSize(1e9, every=1),
    }.items():
        batch, hooks = timed(width, callback)
        print(f"{name:28} batch {1000 * batch:6.1f} ms, hooks {1000 * hooks:7.3f} ms: {hooks / batch:.2%}")
