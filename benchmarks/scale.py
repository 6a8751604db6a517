"""What it costs to divide an epoch anew, to number and read again a stream, and to select from files.

python benchmarks/scale.py order     # seconds to the first batch of a resumed epoch, 10 million samples
python benchmarks/scale.py stream    # rows a second with and without ids, and of what is read again, 200,000 texts
python benchmarks/scale.py coverage --rows 10000000  # seconds and peak memory of a selection in 4 GB, and in memory
python benchmarks/scale.py dask --rows 1000000       # seconds with one and with two workers of one thread
python benchmarks/scale.py quality --budget 0.04     # retention with 4 shards against the answer of one machine

`quality` needs the tables of `benchmarks/instance_selection.py quality`. Run the others on an idle machine.
"""

import argparse
import contextlib
import itertools
import multiprocessing
import queue
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
import torch
from datasets import Dataset, load_dataset
from instance_selection import TABLES, table
from joblib import Parallel, delayed, parallel_config
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

from curation.callbacks.runs.global_order import GlobalOrder
from curation.callbacks.runs.random_streams import RandomStreams
from curation.callbacks.runs.resumed_order import Position, ResumedStream
from curation.evaluation.statistics import paired_interval
from curation.instances import CoverageInstanceSelector, coverage_shards
from curation.samplers import LengthGroupedSampler
from curation.stream_ids import stream_ids


def seconds(work: Callable[[], Any]) -> float:
    """Median of three."""
    taken = []
    for _ in range(3):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def first_batch(order: Any) -> None:
    """One process's first batch after half of the epoch."""
    next(iter(order))


def order() -> None:
    """The same place of an epoch, reached by the sampler itself on 8 processes and divided anew for 6."""
    samples, batch = 10_000_000, 32
    lengths = np.random.default_rng(0).integers(16, 2048, samples)
    done = samples // 2 // (8 * batch)
    shuffled = DistributedSampler(range(samples), 8, 0, seed=0)
    grouped = LengthGroupedSampler(lengths, batch)
    position = Position(first=done * 8 * batch)
    streams = RandomStreams([0] * 6, 0)
    cases = {
        "DistributedSampler": (shuffled, {"kind": "shuffled", "seed": 0}),
        "LengthGroupedSampler": (grouped, {"kind": "sequence", "sizes": [8 * batch]}),
    }
    for name, (sampler, how) in cases.items():
        batches = BatchSampler(sampler, batch, False)
        loader = DataLoader(range(samples), batch, sampler=sampler)  # type: ignore[arg-type]
        divided = GlobalOrder(how, loader, streams, position)
        ways = {
            "skipped": lambda batches=batches: next(itertools.islice(batches, done, None)),
            "divided anew": lambda divided=divided: first_batch(divided),
        }
        for way, work in ways.items():
            print(f"  {name:22} {way:14} {seconds(work):6.2f} s", flush=True)


def stream() -> None:
    """Parquet shards of texts, in batches of 32, in the process itself."""
    with tempfile.TemporaryDirectory() as folder:
        for shard in range(8):
            rows = {"text": [f"{shard} {row} " + "lorem ipsum " * 20 for row in range(25_000)]}
            Dataset.from_dict(rows).to_parquet(Path(folder) / f"{shard}.parquet")
        files = [str(file) for file in sorted(Path(folder).glob("*.parquet"))]
        plain = load_dataset("parquet", data_files=files, split="train", streaming=True, cache_dir=folder)
        ways = {
            "plain": plain,
            "ids of shards": stream_ids(plain),
            "ids of a column": stream_ids(plain, "text", 2**20),
        }
        for name, dataset in ways.items():
            took = seconds(lambda dataset=dataset: sum(1 for _ in DataLoader(dataset, 32)))
            print(f"  {name:16} {200_000 / took:8.0f} rows a second", flush=True)
        position = Position(batches=6249, batches_in_epoch=6249)

        def read_again() -> None:
            position.skip = 6249
            next(iter(ResumedStream(DataLoader(stream_ids(plain), 32), RandomStreams([0], 0), position)))

        print(f"  {'read again':16} {200_000 / seconds(read_again):8.0f} rows a second", flush=True)


def write_clusters(folder: Path, rows: int, features: int = 64) -> None:
    """10 classes of 20 Gaussian clusters in 8 dimensions, lifted to 64 with noise, as files of fp32 and int64."""
    draw = np.random.default_rng(0)
    centres = draw.normal(size=(200, 8)).astype(np.float32)
    lift = draw.normal(size=(8, features)).astype(np.float32) / np.float32(np.sqrt(8))
    x = np.lib.format.open_memmap(folder / "x.npy", "w+", np.float32, (rows, features))
    y = np.empty(rows, np.int64)
    for start in range(0, rows, 2**17):
        part = slice(start, min(start + 2**17, rows))
        cluster = draw.integers(0, 200, part.stop - start)
        y[part] = cluster // 20
        inside = centres[cluster] + np.float32(0.3) * draw.standard_normal((len(cluster), 8), np.float32)
        x[part] = inside @ lift + np.float32(0.1) * draw.standard_normal((len(cluster), features), np.float32)
    x.flush()
    np.save(folder / "y.npy", y)


def fit_alone(folder: str, rows: int, options: dict[str, Any], found: Any) -> None:
    """Seconds of a fit, which has been compiled, in this process."""
    x, y = np.load(f"{folder}/x.npy", mmap_mode="r"), np.load(f"{folder}/y.npy", mmap_mode="r")
    CoverageInstanceSelector(random_state=0).fit(np.array(x[:2000]), np.array(y[:2000]))
    if options:
        given: tuple[Any, Any] = (f"{folder}/x.npy", f"{folder}/y.npy")
    else:
        given = (np.array(x[:rows]), np.array(y[:rows]))
    del x, y
    began = time.perf_counter()
    selector = CoverageInstanceSelector(random_state=0, **options).fit(*given)
    found.put((time.perf_counter() - began, selector.report_["kept"]))


def watched(folder: str, rows: int, options: dict[str, Any]) -> tuple[float, float]:
    """Seconds of a fit, and the most bytes that its process and the workers of that had together."""
    context = multiprocessing.get_context("spawn")
    found = context.Queue()
    process = context.Process(target=fit_alone, args=(folder, rows, options, found))
    process.start()
    most, result = 0, None
    while result is None:
        at_once, family = 0, [psutil.Process(process.pid)]
        family += family[0].children(recursive=True)
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                at_once += one.memory_info().rss
        most = max(most, at_once)
        with contextlib.suppress(queue.Empty):
            result = found.get(timeout=0.05)
        if result is None and not process.is_alive():
            raise SystemExit(f"The selection ended with the code {process.exitcode}.")
    for one in reversed(family):  # loky's workers stay for minutes
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    return result[0], most


def coverage(rows: int) -> None:
    """A selection from files in 4 GB, and one of a million rows in memory."""
    with tempfile.TemporaryDirectory() as folder:
        write_clusters(Path(folder), rows)
        few = min(rows, 1_000_000)
        took, most = watched(folder, few, {})
        memory = took / few
        print(
            f"  {few:12,} rows in memory {took:8.1f} s {1e6 * memory:6.2f} us a row {most / 1e9:5.2f} GB", flush=True
        )
        options = {"memory": "4GB", "n_jobs": -1, "verbose": True}
        took, most = watched(folder, rows, options)
        print(f"  {rows:12,} rows in files  {took:8.1f} s {1e6 * took / rows:6.2f} us a row {most / 1e9:5.2f} GB")
        print(f"  {took / rows / memory:.2f} times the seconds a row")


def dask(rows: int) -> None:
    """The same selection with one and with two workers of one thread each, in shards of 100,000 rows."""
    from distributed import Client, LocalCluster

    with tempfile.TemporaryDirectory() as folder:
        write_clusters(Path(folder), rows)
        taken = []
        for workers in (1, 2):
            with (
                LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None) as cluster,
                Client(cluster),
                parallel_config("dask"),
                mock.patch.object(coverage_shards, "SHARD", 100_000),
                mock.patch.object(coverage_shards, "fits_at_once", return_value=False),
            ):
                selector = CoverageInstanceSelector(random_state=0, memory="8GB", n_jobs=-1)
                few = slice(0, rows // 5)  # compiles
                selector.fit(*(np.load(f"{folder}/{name}.npy", mmap_mode="r")[few] for name in "xy"))
                began = time.perf_counter()
                selector.fit(f"{folder}/x.npy", f"{folder}/y.npy")
                taken.append(time.perf_counter() - began)
            print(f"  {workers} workers {taken[-1]:6.1f} s, {selector.report_['shards']} shards", flush=True)
        print(f"  {taken[0] / taken[1]:.2f} times as fast")


def in_shards(x: np.ndarray, y: np.ndarray, budget: float, seed: int, shards: int) -> np.ndarray:
    """What coverage keeps with a number of shards that is given."""
    cuts = np.arange(shards + 1) * len(x) // shards
    plan = coverage_shards.Plan(cuts, np.array([0, shards]), 1, 0)
    with (
        mock.patch.object(coverage_shards, "plan_shards", return_value=plan),
        mock.patch.object(coverage_shards, "fits_at_once", return_value=False),
    ):
        return CoverageInstanceSelector(budget, random_state=seed, memory="1GB").fit(x, y).sample_indices_


def retained(name: str, seed: int, budget: float) -> tuple[float, float, float]:
    """Accuracies of a random forest by all samples, by coverage, and by coverage in 4 shards."""
    torch.set_num_threads(1)
    x, y = table(name)
    x, test, y, test_y = train_test_split(x, y, test_size=0.3, stratify=y, random_state=seed)
    scale = StandardScaler().fit(x)
    x, test = scale.transform(x), scale.transform(test)
    whole = CoverageInstanceSelector(budget, random_state=seed).fit(x, y).sample_indices_
    parts = in_shards(x, y, budget, seed, 4)

    def accuracy(rows: np.ndarray) -> float:
        return RandomForestClassifier(random_state=seed).fit(x[rows], y[rows]).score(test, test_y)

    return accuracy(np.arange(len(y))), accuracy(whole), accuracy(parts)


def quality(budget: float, seeds: int) -> None:
    """Points of retention between shards and no shards, with the interval over the twelve tables."""
    work = [(name, seed) for name in TABLES for seed in range(seeds)]
    found = np.array(Parallel(2)(delayed(retained)(*at, budget) for at in work)).reshape(len(TABLES), seeds, 3)
    share = found[..., 1:] / found[..., :1]
    by_table = (share[..., 1] - share[..., 0]).mean(1)
    for name, of, difference in zip(TABLES, share.mean(1), by_table, strict=True):
        print(f"  {name:12} {of[0]:.3f} {of[1]:.3f} {100 * difference:+.2f}")
    mean, low, high = paired_interval(by_table.tolist())
    print(f"  {budget:.0%} kept, {seeds} seeds: {share[..., 0].mean():.4f}, {share[..., 1].mean():.4f} in 4 shards")
    print(f"  {100 * mean:+.2f} points [{100 * low:+.2f}, {100 * high:+.2f}]")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    commands.add_parser("order")
    commands.add_parser("stream")
    commands.add_parser("coverage").add_argument("--rows", type=int, default=10_000_000)
    commands.add_parser("dask").add_argument("--rows", type=int, default=1_000_000)
    retention = commands.add_parser("quality")
    retention.add_argument("--budget", type=float, default=0.04)
    retention.add_argument("--seeds", type=int, default=5)
    options = vars(parser.parse_args())
    globals()[options.pop("what")](**options)
