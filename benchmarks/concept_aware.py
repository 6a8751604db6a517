"""What concept-aware batches cost and give: speed, memory, loading, coverage, repeats.

Run on an idle machine: ``python benchmarks/concept_aware.py`` (all parts but ``memory``, which needs a process of its
own), or name some of ``speed memory loader coverage repeats``. Times are medians; ratios are taken within one run.
"""

import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler

from curation.metrics.concept_coverage import ConceptCoverage
from curation.samplers import concept_choice
from curation.samplers.concept_aware import ConceptAwareSampler, ConceptIndex, FirstCome

SUPER, BATCH = 20_480, 4_096  # the paper's


def web_like(samples: int, concepts: int = 12_000, mean: float = 10.0, seed: int = 0) -> ConceptIndex:
    """About ``mean`` concepts a sample, their frequencies by Zipf's law."""
    draw = np.random.default_rng(seed)
    weights = np.cumsum(1 / np.arange(1, concepts + 1))
    sizes = draw.poisson(mean, samples) + 1
    ids = np.searchsorted(weights, draw.random(sizes.sum()) * weights[-1]).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    # Unique in each sample, in pieces that fit the memory.
    rows, lengths = [], []
    for start in range(0, samples, 2**20):
        end = min(start + 2**20, samples)
        part = ids[offsets[start] : offsets[end]].astype(np.int64)
        keys = np.unique(np.repeat(np.arange(end - start), sizes[start:end]) * concepts + part)
        rows.append((keys % concepts).astype(np.int32))
        lengths.append(np.bincount(keys // concepts, minlength=end - start))
    return ConceptIndex(
        np.concatenate([[0], np.cumsum(np.concatenate(lengths))]), np.concatenate(rows), range(concepts)
    )


def super_batch_seconds(order: Iterator[int], count: int) -> list[float]:
    """Seconds of each of the next super-batches; the draw of the epoch's order is in the first."""
    times, start = [], time.perf_counter()
    for _ in range(count):
        for _ in range(BATCH):
            next(order)
        now = time.perf_counter()
        times.append(now - start)
        start = now
    return times


def speed() -> None:
    """Samples of super-batches per second, at 1M samples with about 10 concepts each."""
    index = web_like(1_000_000)
    print(f"1,000,000 samples, {index.sizes.mean():.1f} concepts each, of 12,000; {SUPER} -> {BATCH}\n")
    print("| chosen by | objective | ms per super-batch, median | slowest | samples/s |\n|---|---|---|---|---|")
    next(iter(ConceptAwareSampler(index, BATCH, SUPER)))  # compiles
    compiled = concept_choice._compiled
    for how in ("numba", "plain Python"):
        if how != "numba":
            concept_choice._compiled = lambda: concept_choice._greedy
        for objective, penalty in (("diversity", 0.0), ("diversity", 0.1), ("frequency", 0.0)):
            sampler = ConceptAwareSampler(index, BATCH, SUPER, objective, visit_penalty=penalty)
            times = super_batch_seconds(iter(sampler), 40 if how == "numba" else 6)[1:]
            middle = statistics.median(times)
            name = objective + (f", visit_penalty={penalty}" if penalty else "")
            print(f"| {how} | {name} | {1e3 * middle:.1f} | {1e3 * max(times):.1f} | {SUPER / middle:,.0f} |")
    concept_choice._compiled = compiled


def save_web_like(samples: int, path: Path) -> None:
    """Of that many samples, to a file."""
    web_like(samples).save(path)


def anonymous_bytes() -> int:
    """Memory of this process that is no page of a file, which the system may drop."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))


def memory() -> None:
    """Bytes of a memory-mapped index of 10M samples, and what 128M would take."""
    samples = 10_000_000
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "concepts.arrow"
        # In a process of its own, so that this one does not reuse what it frees.
        child = multiprocessing.get_context("spawn").Process(target=save_web_like, args=(samples, path))
        child.start()
        child.join()
        on_disk = path.stat().st_size
        before = anonymous_bytes()
        start = time.perf_counter()
        index = ConceptIndex.load(path)
        loaded, load_seconds = anonymous_bytes(), time.perf_counter() - start
        order = iter(ConceptAwareSampler(index, BATCH, SUPER))
        first, *later = super_batch_seconds(order, 40)
        running = anonymous_bytes()
        scale = 128e6 / samples
        print(
            f"{samples:,} samples, {len(index.ids) / samples:.1f} concepts each; memory that is no page of the file\n"
        )
        print("| | 10M, measured | 128M, extrapolated |\n|---|---|---|")
        print(f"| file | {on_disk / 1e6:,.0f} MB | {on_disk * scale / 1e9:.1f} GB |")
        seconds = f"{load_seconds:.3f} s | {load_seconds * scale:.1f} s, or the disk's"
        print(f"| load, which reads the file once to check it | {(loaded - before) / 1e6:.1f} MB, {seconds} |")
        besides = running - loaded
        print(f"| running, besides | {besides / 1e6:,.0f} MB | {besides * scale / 1e9:.1f} GB |")
        print(f"| first super-batch of an epoch | {first:.2f} s | {first * scale:.1f} s |")
        print(f"| later ones, median | {1e3 * statistics.median(later):.1f} ms | the same, or the disk's |")


class Decoding(Dataset):
    """20 ms an item, as decoding a large picture takes."""

    def __len__(self) -> int:
        return 100_000

    def __getitem__(self, i: int) -> int:
        time.sleep(0.02)
        return i


def loader() -> None:
    """Throughput of a loader with two workers that takes 20 ms for an item, beside an i.i.d. sampler's."""
    index, rates = web_like(100_000), []
    ours = ConceptAwareSampler(index, 128, 640)
    next(iter(ours))  # compiles
    print("| sampler | items/s, in turn | median |\n|---|---|---|")
    for name, sampler in (("i.i.d.", RandomSampler(range(100_000))), ("concept-aware", ours)) * 2:
        batches = iter(DataLoader(Decoding(), 128, sampler=sampler, num_workers=2))
        next(batches)
        start = time.perf_counter()
        for _ in range(16):
            next(batches)
        rates.append((name, 16 * 128 / (time.perf_counter() - start)))
        del batches
    medians = {}
    for name in ("i.i.d.", "concept-aware"):
        own = [rate for other, rate in rates if other == name]
        medians[name] = statistics.median(own)
        print(f"| {name} | {', '.join(f'{rate:.2f}' for rate in own)} | {medians[name]:.2f} |")
    print(f"\nratio {medians['concept-aware'] / medians['i.i.d.']:.4f}")
    print("items decoded for a batch of 128: 128; choosing after decoding takes 640")


def labels(imbalance: float) -> np.ndarray:
    """100 classes of at most 500, exponentially fewer: int64 ``[N]``."""
    return np.repeat(np.arange(100), (500 * imbalance ** (-np.arange(100) / 99)).astype(int))


def batches(sampler: ConceptAwareSampler, epochs: int = 1) -> np.ndarray:
    """The batches of some epochs: int64 ``[epochs * steps, batch_size]``."""
    found = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        found.append(np.fromiter(sampler, int).reshape(-1, sampler.batch_size))
    return np.concatenate(found)


def spread(index: ConceptIndex, found: np.ndarray) -> tuple[float, float]:
    """Mean coverage and normalised entropy of batches."""
    metric = ConceptCoverage(len(index.names))
    values = [metric(torch.from_numpy(index.take(batch).ids)) for batch in found]
    return tuple(float(np.mean([v[name].item() for v in values])) for name in ("coverage", "entropy"))  # type: ignore


def coverage() -> None:
    """Coverage and entropy of batches of 128 of 640, five seeds."""
    print("| data | batches | coverage | of what the super-batch has | entropy |\n|---|---|---|---|---|")
    for name, index in (
        ("100 balanced classes", ConceptIndex.from_labels(labels(1))),
        ("100 classes, imbalance 100", ConceptIndex.from_labels(labels(100))),
        ("web-like, 10 of 1,000 concepts", web_like(30_000, 1_000)),
    ):
        whole = np.mean([spread(index, batches(ConceptAwareSampler(index, 640, 640, seed=s)))[0] for s in range(5)])
        for kind, options in (
            ("i.i.d.", {"objective": FirstCome()}),
            ("diversity", {}),
            ("diversity, visit_penalty=0.1", {"visit_penalty": 0.1}),
            ("proportional", {"targets": "proportional"}),
            ("frequency", {"objective": "frequency"}),
        ):
            runs = [spread(index, batches(ConceptAwareSampler(index, 128, 640, seed=s, **options))) for s in range(5)]
            covered, entropy = np.mean(runs, 0)
            print(f"| {name} | {kind} | {covered:.3f} | {covered / whole:.3f} | {entropy:.3f} |")


def repeats() -> None:
    """Distinct samples after five epochs, and the coverage that a visit penalty costs."""
    print("| data | batches | distinct samples seen in 5 epochs | coverage | entropy |\n|---|---|---|---|---|")
    for name, index in (
        ("100 classes, imbalance 100", ConceptIndex.from_labels(labels(100))),
        ("web-like, 10 of 1,000 concepts", web_like(30_000, 1_000)),
    ):
        kinds = [("i.i.d.", {"objective": FirstCome()}), ("frequency", {"objective": "frequency"})]
        kinds += [(f"diversity, visit_penalty={p}", {"visit_penalty": p}) for p in (0.0, 0.03, 0.1, 0.3, 1.0)]
        kinds += [("frequency, visit_penalty=3", {"objective": "frequency", "visit_penalty": 3.0})]
        for kind, options in kinds:
            found = batches(ConceptAwareSampler(index, 128, 640, **options), 5)
            covered, entropy = spread(index, found)
            print(f"| {name} | {kind} | {len(np.unique(found)) / len(index):.2f} | {covered:.3f} | {entropy:.3f} |")


if __name__ == "__main__":
    parts = {f.__name__: f for f in (speed, memory, loader, coverage, repeats)}
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, numpy {np.__version__}\n")
    for part in sys.argv[1:] or [name for name in parts if name != "memory"]:
        print(f"## {part}\n")
        parts[part]()
        print()
