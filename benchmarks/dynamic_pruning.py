"""What dynamic pruning costs: planning a round, and the hooks of the callback in a step.

    python benchmarks/dynamic_pruning.py plan      # seconds to plan a round of 10 million samples, by rule
    python benchmarks/dynamic_pruning.py hooks     # time inside the callback's hooks, of a step of about 100 ms

On an idle machine; medians. ``hooks`` adds up the seconds in the hooks and in the seam over 200 steps.
"""

import argparse
import itertools
import statistics
import time

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

from curation.callbacks import DynamicDataPruning
from curation.samplers import DynamicDataPruningSampler
from curation.samplers.pruning_rules import RULES


def plan(samples: int = 10_000_000, repeats: int = 5) -> None:
    """Seconds to plan a round, with its order."""
    losses = torch.rand(samples, generator=torch.Generator().manual_seed(0)).square()
    for rule in RULES:
        sampler = DynamicDataPruningSampler(range(samples), 128, rule=rule)
        sampler.losses, sampler.round, times = losses, 2, []
        for _ in range(repeats):
            start = time.perf_counter()
            sampler._begin_round()
            times.append(time.perf_counter() - start)
        print(f"{rule:13} {statistics.median(times):5.2f} s, {len(sampler._ids):,} samples", flush=True)


class Net(LightningModule):
    """A step of about 100 ms on two CPU cores."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = [64, *[width] * 4, 10]
        layers = [torch.nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
        self.net = torch.nn.Sequential(*[m for layer in layers for m in (layer, torch.nn.ReLU())][:-1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        return self.net(x)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Mean cross-entropy."""
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.01)


def hooks(steps: int = 200, width: int = 1800) -> None:
    """Share of the step that the callback's hooks take."""
    dataset = TensorDataset(torch.randn(51_200, 64), torch.randint(10, (51_200,)))
    sampler = DynamicDataPruningSampler(dataset, 256)
    pruning, spent = DynamicDataPruning(), []
    for name in (
        *("curate", "on_train_batch_start", "on_before_backward", "on_after_backward", "on_train_batch_end"),
        "before_transfer",
    ):
        setattr(pruning, name, timed(getattr(pruning, name), spent))
    times: list[float] = []

    class Clock(Net):
        def on_train_batch_start(self, batch: object, batch_idx: int) -> None:
            times.append(time.perf_counter())

    trainer = Trainer(
        max_epochs=-1, max_steps=steps + 20, accelerator="auto", callbacks=[pruning], logger=False, barebones=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Clock(width), DataLoader(dataset, 256, sampler=sampler))
    step = statistics.median(b - a for a, b in itertools.pairwise(times[20:]))
    per_step = sum(spent[len(spent) // 11 :]) / (steps + 20) * 1.1
    print(f"step {1000 * step:.1f} ms, hooks {1000 * per_step:.3f} ms: {per_step / step:.2%}")


def timed(function: object, spent: list[float]) -> object:
    """The function, which adds its seconds to a list."""

    def call(*args: object, **kwargs: object) -> object:
        start = time.perf_counter()
        result = function(*args, **kwargs)  # type: ignore[operator]
        spent.append(time.perf_counter() - start)
        return result

    return call


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("plan", "hooks"))
    {"plan": plan, "hooks": hooks}[parser.parse_args().what]()
