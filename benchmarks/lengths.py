"""What batches of like length save: padding and randomness on chat, planning, tokens a second.

python benchmarks/lengths.py padding   # tokens computed over real ones, and how alike neighbouring batches are
python benchmarks/lengths.py plan      # seconds and memory to plan an order
python benchmarks/lengths.py train     # real tokens a second, SmolLM2 cut to 6 layers; on an idle machine
"""

import argparse
import statistics
import time
import tracemalloc
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from scipy.stats import spearmanr

from curation.recipes.chat import Conversations, SupervisedFineTuning
from curation.samplers import LengthGroupedSampler, TokenBudgetSampler, lengths_of
from curation.samplers.length_grouped import sorted_windows

QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)


def conversations(replies: str, max_length: int, **how: Any) -> Conversations:
    """The chat recipe's data."""
    data = Conversations("chitchat", replies=replies, max_length=max_length, **how)
    data.setup("fit")
    return data


def describe(name: str, lengths: np.ndarray, batches: list[Any]) -> None:
    """Padding of batches, and the rank correlation of the mean lengths of batches that follow one another."""
    padded = sum(int(lengths[batch].max()) * len(batch) for batch in batches) / sum(lengths[b].sum() for b in batches)
    means = [lengths[batch].mean() for batch in batches]
    print(f"  {name:32} {padded:.3f} {spearmanr(means[:-1], means[1:])[0]:+.2f}", flush=True)


def padding() -> None:
    """Every sampler on the lengths of chitchat."""
    from transformers.trainer_pt_utils import get_length_grouped_indices

    for replies, max_length in (("last", 128), ("all", 512)):
        data = conversations(replies, max_length)
        assert data.train is not None
        lengths = lengths_of(data.train)
        labels = sum(sum(label != -100 for label in row) for row in data.train.dataset["labels"])
        print(f"{replies}, {len(lengths)} samples, {lengths.sum() / labels:.2f} real tokens for each label")
        for size in (8, 16, 32):
            orders = {
                "random": np.random.default_rng(0).permutation(len(lengths)).tolist(),
                "transformers": get_length_grouped_indices(
                    lengths.tolist(), size, generator=torch.Generator().manual_seed(0)
                ),
                "LengthGroupedSampler": list(LengthGroupedSampler(lengths, size)),
            }
            for name, order in orders.items():
                describe(f"{name}, {size}", lengths, [order[i : i + size] for i in range(0, len(order), size)])
        describe("TokenBudgetSampler, 2048", lengths, list(TokenBudgetSampler(lengths, 2048)))


def plan() -> None:
    """An order of 1 and of 10 million lengths."""
    for samples in (10**6, 10**7):
        lengths = np.random.default_rng(0).integers(1, 512, samples).astype(np.int32)
        start = time.perf_counter()
        sorted_windows(lengths, np.random.default_rng(0), 400)
        seconds = time.perf_counter() - start
        tracemalloc.start()
        sorted_windows(lengths, np.random.default_rng(0), 400)
        print(f"{samples:,}: {seconds:.2f} s, {tracemalloc.get_traced_memory()[1] / 1e6:.0f} MB beside the lengths")
        tracemalloc.stop()


class Speed(Callback):
    """Real tokens and labels a second of every step but the first three."""

    def __init__(self) -> None:
        self.rates: list[tuple[float, float]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Start the clock."""
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop it."""
        seconds = time.perf_counter() - self.start
        self.rates.append(
            (int(batch["attention_mask"].sum()) / seconds, int((batch["labels"] != -100).sum()) / seconds)
        )


def train(steps: int = 8) -> None:
    """Real tokens a second of each way, in turn, three times."""
    ways = {
        "a sample a reply, random": ("last", 128, {}),
        "a sample a reply, grouped": ("last", 128, {"sampler": LengthGroupedSampler}),
        "a conversation, grouped": ("all", 512, {"sampler": LengthGroupedSampler, "batch_size": 4}),
    }
    made = {
        name: conversations(replies, size, **{"batch_size": 16, **how}) for name, (replies, size, how) in ways.items()
    }
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for turn in range(3):
        for name, data in made.items():
            seed_everything(turn, verbose=False)
            speed = Speed()
            quiet = dict.fromkeys(
                ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
            )
            run = Trainer(max_steps=steps, callbacks=[speed], limit_val_batches=0, accelerator="cpu", **quiet)
            run.fit(SupervisedFineTuning(num_layers=6), data)
            rates[name] += speed.rates[3:]
    for name, found in rates.items():
        tokens, labels = (statistics.median(values) for values in zip(*found, strict=True))
        print(f"{name:28} {tokens:6.0f} real tokens a second, {labels:5.0f} labels a second", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("padding", "plan", "train"))
    {"padding": padding, "plan": plan, "train": train}[parser.parse_args().what]()
