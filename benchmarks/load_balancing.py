"""The cost of load balancing: seconds that it adds to an update, and one collective against one per layer.

    python benchmarks/load_balancing.py            # on an idle machine; prints one line of JSON per measurement

A decoder with 16 experts in each of 8 layers (Qwen3-MoE of transformers), micro-batches of 8 x 256 tokens, 4 to an
update. Medians, and ratios within a round of fits. The collectives run on two processes (gloo).
"""

import json
import logging
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch.utils.data import DataLoader

from curation.callbacks import GlobalBatchLoadBalancing
from curation.recipes.mixture_of_experts.mixture_lm import MixtureLM

ROUNDS, STEPS, ACCUMULATE = 5, 3, 4
ESTIMATORS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "micro": {"scope": "micro"},
    **{estimator: {"estimator": estimator} for estimator in ("running", "warm", "deferred", "prepass")},
}


class Steps(Callback):
    """Seconds of every update after the first. Comes before the other callbacks, so that a prepass counts."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Begin with a window."""
        if batch_idx % ACCUMULATE == 0:
            self.began = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """End with it."""
        if batch_idx % ACCUMULATE == ACCUMULATE - 1 and batch_idx >= ACCUMULATE:
            self.seconds.append(time.perf_counter() - self.began)


class Noise(LightningDataModule):
    """Random tokens."""

    names = ("one", "other")

    def train_dataloader(self) -> DataLoader:
        """Micro-batches."""
        rows = [{"input_ids": torch.randint(256, (256,)), "domain": torch.tensor(0)} for _ in range(64)]
        return DataLoader(rows * (STEPS + 1), 8)  # type: ignore[arg-type]


def overhead() -> None:
    """Print the seconds of an update with each estimator."""
    seconds: dict[str, list[float]] = {name: [] for name in ESTIMATORS}
    for _ in range(ROUNDS):
        for name, options in ESTIMATORS.items():
            torch.manual_seed(0)
            steps = Steps()
            balancing = [] if options is None else [GlobalBatchLoadBalancing(**options)]
            run = Trainer(
                callbacks=[steps, *balancing], max_steps=STEPS + 1, accumulate_grad_batches=ACCUMULATE,
                limit_val_batches=0, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                enable_model_summary=False,
            )  # fmt: skip
            run.fit(MixtureLM(hidden=256, layers=8, heads=8, experts=16, expert_hidden=64), Noise())
            seconds[name].append(statistics.median(steps.seconds))
    for name, values in seconds.items():
        ratio = statistics.median(v / none for v, none in zip(values, seconds["none"], strict=True))
        median = statistics.median(values)
        print(json.dumps({"estimator": name, "seconds_an_update": round(median, 3), "over_none": round(ratio, 3)}))


def reduce(rank: int, layers: int, experts: int) -> None:
    """Print the milliseconds to sum the counts of all layers at once, and layer by layer, on two processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method="tcp://127.0.0.1:29617", rank=rank, world_size=2)
    stacked = torch.zeros(layers, experts + 1, dtype=torch.int64)
    seconds: dict[str, list[float]] = {"one": [], "each": []}
    for _ in range(50):
        for name, parts in (("one", [stacked]), ("each", list(stacked))):
            dist.barrier()
            start = time.perf_counter()
            for part in parts:
                dist.all_reduce(part)
            seconds[name].append(time.perf_counter() - start)
    if rank == 0:
        medians = {f"{name}_ms": round(1e3 * statistics.median(values), 2) for name, values in seconds.items()}
        print(json.dumps({"layers": layers, "experts": experts, **medians}))
    dist.destroy_process_group()


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    overhead()
    multiprocessing.spawn(reduce, args=(48, 128), nprocs=2)
