"""What the online rules, the break-even controller and the ledger cost.

Run on an idle machine: ``python benchmarks/online_selection.py`` (all parts), or name some of
``rules controller ledger``. Times are medians; ratios are taken within one run.
"""

import logging
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
import warnings
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from curation.callbacks import (
    HardSampleSelection,
    OnlineSelection,
    SampleRecord,
    SelectionLedger,
    UniformSelection,
    UtilityDiversitySelection,
)
from curation.recipes.images import ImageClassifier
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from curation.batch import SampleIds
from curation.records.ledger import Ledger, LedgerWriter

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


def fit(module: LightningModule, *callbacks: Callback, steps: int, batch_size: int = CANDIDATES) -> list[float]:
    """Seconds of each step of a fit."""
    clock = Clock()
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, callbacks=[*callbacks, clock], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    # Ids are stripped by whatever curates; without it the data set has none.
    data = images() if callbacks else images().dataset
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
        "cdf": HardSampleSelection(keep=KEEP, rule="cdf"),
        "importance": HardSampleSelection(keep=KEEP, rule="importance", score="grad_norm"),
        "utility-diversity": UtilityDiversitySelection(keep=KEEP),
    }
    full = statistics.median(fit(convolutions(), steps=40))
    small = statistics.median(fit(convolutions(), steps=40, batch_size=int(CANDIDATES * KEEP)))
    module = convolutions().eval()
    x = images(CANDIDATES).dataset.tensors[0]
    forwards = []
    for _ in range(20):
        start = time.perf_counter()
        with torch.no_grad():
            module(x)
        forwards.append(time.perf_counter() - start)
    ideal = statistics.median(forwards) + small
    print(
        f"full step {1e3 * full:.0f} ms; forward of all {1e3 * statistics.median(forwards):.0f} ms, step on the kept"
    )
    print(f"{1e3 * small:.0f} ms, ideal their sum\n")
    print("| rule | ms a step | over the ideal | speed-up over full |\n|---|---|---|---|")
    for name, selection in rule.items():
        seconds = statistics.median(fit(convolutions(), selection, steps=40))
        best = ideal if selection.has_scores else small
        print(f"| {name} | {1e3 * seconds:.0f} | {seconds / best - 1:+.1%} | {full / seconds:.2f} |")
    alone = statistics.median(fit(convolutions(), UniformSelection(keep=KEEP), steps=40))
    with tempfile.TemporaryDirectory() as folder:
        both = UniformSelection(keep=KEEP), SampleRecord(), SelectionLedger(folder)
        recorded = statistics.median(fit(convolutions(), *both, steps=40))
    print(f"\nrecord and ledger beside uniform: {recorded / alone - 1:+.1%} of a step")


def controller() -> None:
    """``when="pays"`` end to end against full training, where selection pays and where it cannot."""
    print('| trunk | full, s | `when="pays"`, s | ratio | predicted speed-up |\n|---|---|---|---|---|')
    for frozen in (False, True):
        ratios, rows = [], []
        for _ in range(3):
            full = sum(fit(Deep(frozen), steps=300))
            selection = HardSampleSelection(keep=0.5, when="pays")
            pays = sum(fit(Deep(frozen), selection, steps=300))
            assert selection._break_even is not None
            rows.append((full, pays, selection._break_even.predicted_speedup))
            ratios.append(pays / full)
        full, pays, predicted = rows[ratios.index(statistics.median(ratios))]
        name = "frozen" if frozen else "trained"
        print(f"| {name} | {full:.1f} | {pays:.1f} | {pays / full:.3f} | {predicted:.2f} |")


def _ten_million(folder: str, results: Any) -> None:
    """Write and read in a process of its own, whose memory is its own."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
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
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    results.put((before / 1024, after / 1024, written, counted, looked_up))


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
        f"{rows:,} rows: {size / 2**20:.0f} MiB on disk; written in {written:.1f} s ({1e6 * written / 1e4:.0f} us per"
    )
    print(f"batch of 1,000), counted in {counted:.1f} s, one sample found in {looked_up:.2f} s; peak memory of the")
    print(f"process {after:.0f} MiB, of which {before:.0f} MiB are torch and Lightning.")


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    parts = {"rules": rules, "controller": controller, "ledger": ledger}
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for part in sys.argv[1:] or parts:
        print(f"\n## {part}\n")
        parts[part]()
