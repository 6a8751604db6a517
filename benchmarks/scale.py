"""What it costs to divide an epoch anew, and to number and read again a stream.

python benchmarks/scale.py order   # seconds to the first batch of a resumed epoch, 10 million samples
python benchmarks/scale.py stream  # rows a second with and without ids, and of what is read again, 200,000 texts
"""

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, load_dataset
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

from curation.callbacks.runs.global_order import GlobalOrder
from curation.callbacks.runs.random_streams import RandomStreams
from curation.callbacks.runs.resumed_order import Position, ResumedStream
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["order", "stream"])
    globals()[parser.parse_args().what]()
