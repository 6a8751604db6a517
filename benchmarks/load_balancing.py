"""The cost of load balancing: seconds that it adds to an update, and one collective against one per layer.

    python benchmarks/load_balancing.py [--accumulate 16] [--rounds 5]    # idle; a line of JSON per measurement

A decoder with 16 experts in each of 8 layers (Qwen3-MoE of transformers), micro-batches of 8 x 256 tokens, 4 to an
update. Medians, and ratios within a round of fits with their 95 % intervals: of updates with and without balancing,
and of the time in the hooks of the callback (all that it adds but the backward pass through its loss); of prepass
also over that of a forward pass over the micro-batches. The collectives run on two processes (gloo).
"""

import argparse
import itertools
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
from curation.evaluation.statistics import paired_interval
from curation.recipes.mixture_of_experts.mixture_lm import MixtureLM

STEPS = 4
ESTIMATORS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "micro": {"scope": "micro"},
    **{estimator: {"estimator": estimator} for estimator in ("running", "warm", "deferred", "prepass")},
}


class Steps(Callback):
    """Seconds of every update after the first. Comes before the other callbacks, so that a prepass counts."""

    def __init__(self, accumulate: int) -> None:
        self.accumulate = accumulate
        self.seconds: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Begin with a window."""
        if batch_idx % self.accumulate == 0:
            self.began = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """End with it."""
        if (batch_idx + 1) % self.accumulate == 0 and batch_idx >= self.accumulate:
            self.seconds.append(time.perf_counter() - self.began)


HOOKS = (
    "on_train_batch_start",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)


def timed(callback: Any, spent: list[float]) -> Any:
    """The callback, whose hooks add their seconds to a list."""

    def of(hook: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> None:
            start = time.perf_counter()
            hook(*args, **kwargs)
            spent.append(time.perf_counter() - start)

        return call

    for name in HOOKS:
        setattr(callback, name, of(getattr(callback, name)))
    return callback


class Noise(LightningDataModule):
    """Random tokens."""

    names = ("one", "other")

    def __init__(self, accumulate: int) -> None:
        super().__init__()
        self.accumulate = accumulate

    def train_dataloader(self) -> DataLoader:
        """Micro-batches."""
        rows = [{"input_ids": torch.randint(256, (256,)), "domain": torch.tensor(0)} for _ in range(64)]
        return DataLoader(rows * (STEPS + 1) * (self.accumulate // 4), 8)  # type: ignore[arg-type]


def overhead(accumulate: int, rounds: int) -> None:
    """Print the seconds of an update with each estimator."""
    seconds: dict[str, list[float]] = {name: [] for name in (*ESTIMATORS, "forward")}
    in_hooks: dict[str, list[float]] = {name: [] for name in ESTIMATORS}
    for _ in range(rounds):
        for name, options in ESTIMATORS.items():
            torch.manual_seed(0)
            steps, spent = Steps(accumulate), list[float]()
            balancing = [] if options is None else [timed(GlobalBatchLoadBalancing(**options), spent)]
            run = Trainer(
                callbacks=[steps, *balancing], max_steps=STEPS + 1, accumulate_grad_batches=accumulate,
                limit_val_batches=0, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                enable_model_summary=False,
            )  # fmt: skip
            module, data = MixtureLM(hidden=256, layers=8, heads=8, experts=16, expert_hidden=64), Noise(accumulate)
            run.fit(module, data)
            seconds[name].append(statistics.median(steps.seconds))
            in_hooks[name].append(sum(spent) / (STEPS + 1))
        forwards = []
        for _ in range(STEPS):
            batches = list(itertools.islice(data.train_dataloader(), accumulate))
            start = time.perf_counter()
            with torch.no_grad():
                for batch in batches:
                    module.eval()(batch["input_ids"])
            forwards.append(time.perf_counter() - start)
        seconds["forward"].append(statistics.median(forwards))
    for name, values in seconds.items():
        ratios = [v / none for v, none in zip(values, seconds["none"], strict=True)]
        line = {"estimator": name, "seconds_an_update": statistics.median(values), **of_ratios("over_none", ratios)}
        if in_hooks.get(name, [0])[0]:
            line |= of_ratios("in_hooks", [h / v for h, v in zip(in_hooks[name], values, strict=True)])
        if name == "prepass":
            columns = zip(in_hooks[name], seconds["forward"], strict=True)
            line |= of_ratios("in_hooks_over_forward", [h / forward for h, forward in columns])
        print(json.dumps(line))


def of_ratios(name: str, ratios: list[float]) -> dict[str, Any]:
    """Their median, and the 95 % interval of their mean."""
    _, low, high = paired_interval(ratios)
    return {name: round(statistics.median(ratios), 3), f"{name}_interval": [round(low, 3), round(high, 3)]}


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accumulate", type=int, default=4, help="micro-batches of an update, a multiple of 4")
    parser.add_argument("--rounds", type=int, default=9)
    overhead(**vars(parser.parse_args()))
    multiprocessing.spawn(reduce, args=(48, 128), nprocs=2)
