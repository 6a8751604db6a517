"""How long `curation compare` takes with runs that are forked from a warm server, and with runs that start anew.

    python benchmarks/compare.py        # on an idle machine, Linux: 12 runs of digits, two at a time, five times

Prints the seconds of the whole command, imports and report included, the ratio of each pair with the 95 % interval of
its mean, and whether the results are the same. Peak memory and kills of runs are in tests/recipes/compare.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from curation.evaluation.statistics import paired_interval

COMMAND = """
import sys
from curation.recipes.compare.warm import Server
if sys.argv.pop(1) == "cold":
    Server.run = lambda *_: None
from curation.recipes.cli import compare
compare.main(sys.argv[1:])
"""
OPTIONS = [
    "fashion_mnist_pruning", "--data.data=digits", "--data.holdout=0.3", "--data.batch_size=32", "--model.shift=1",
    "--trainer.max_epochs=2", "--trainer.logger=false", "--methods=proportional", "--seeds=4", "--jobs=2",
    "--budget=epochs", "--metric=val_loss",
]  # fmt: skip


def compared(way: str) -> tuple[float, int, list[list[float]]]:
    """Seconds, the number of runs, and the values of the metric by arm."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-c", COMMAND, way, *OPTIONS, f"--out={folder}/out"], check=True, capture_output=True,
            cwd=folder, env={**os.environ, "WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        seconds = time.perf_counter() - start
        (workload,) = json.loads(Path(folder, "out", "report.json").read_text())["workloads"]
    return seconds, len(workload["runs"]), [[p["value"] for p in r["points"]] for r in workload["runs"]]


if __name__ == "__main__":
    ratios = []
    for _ in range(5):
        (cold, runs, one), (warm, _, other) = compared("cold"), compared("warm")
        ratios.append(warm / cold)
        print(f"{runs} runs: cold {cold:.1f} s, warm {warm:.1f} s, the same results: {one == other}", flush=True)
    mean, low, high = paired_interval(ratios)
    print(f"warm over cold: {mean:.2f} [{low:.2f}, {high:.2f}]")
