"""What a step costs with a proxy, beside a step on every candidate and one that the large model scores.

    python benchmarks/proxy.py

Four fits in turn, seven times over, of the same candidates: all of them trained on; half, chosen by a proxy; half,
chosen by the losses of the large model; half, replayed. Prints the medians of a step and of the ratios to everything,
with the smallest and the largest.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch.utils.data import DataLoader, TensorDataset

from curation.batch import SampleIds
from curation.callbacks import (
    ExactResume,
    HardSampleSelection,
    ProxySelection,
    ReplaySelection,
    SelectionLedger,
    SelectionRehearsal,
    UniformSelection,
)
from curation.online import share_of_operations
from curation.recipes.image_classification import ImageClassifier

ROUNDS, STEPS, CANDIDATES = 7, 24, 256


def large(channels: int) -> ImageClassifier:
    """The module that is trained."""
    module = ImageClassifier(channels=channels)
    module(torch.zeros(1, 1, 28, 28))
    return module


def small() -> ImageClassifier:
    """The proxy."""
    module = ImageClassifier(channels=8, hidden=32, strides=True)
    module(torch.zeros(1, 1, 28, 28))
    return module


def batches() -> DataLoader:
    """An epoch of candidate batches."""
    x, y = torch.randn(STEPS * CANDIDATES, 1, 28, 28), torch.randint(10, (STEPS * CANDIDATES,))
    return DataLoader(SampleIds(TensorDataset(x, y)), CANDIDATES, shuffle=True)


def fit(module: ImageClassifier, *callbacks: Callback) -> None:
    """Train for an epoch."""
    seed_everything(0, verbose=False)
    Trainer(
        max_epochs=1, callbacks=list(callbacks), logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=50,
    ).fit(module, batches())  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        choices = Path(folder) / "choices"
        fit(small(), SelectionRehearsal(0.5), SelectionLedger(choices), ExactResume())
        arms = {
            "everything": lambda: UniformSelection(keep=1.0),
            "proxy": lambda: ProxySelection(0.5, small()),
            "large model": lambda: HardSampleSelection(0.5),
            "replay": lambda: ReplaySelection(choices),
        }
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        for _ in range(ROUNDS):
            for name, make in arms.items():
                selection = make()
                fit(large(options.channels), selection, ExactResume())
                seconds[name].append(selection.train_seconds / STEPS)
    batch = [torch.zeros(2, 1, 28, 28), torch.tensor([0, 1])]
    share = share_of_operations(small(), large(options.channels), batch)
    print(f"proxy of 1/{1 / share:.0f} of the operations, {CANDIDATES} candidates, {options.threads} threads")
    for name, values in seconds.items():
        ratios = [value / whole for value, whole in zip(values, seconds["everything"], strict=True)]
        print(
            f"{name:12} {1e3 * statistics.median(values):7.1f} ms a step, {statistics.median(ratios):.3f} "
            f"[{min(ratios):.3f}, {max(ratios):.3f}] of everything"
        )


if __name__ == "__main__":
    main()
