"""What the comparisons share: fits that are kept as they finish, and intervals of paired differences."""

import json
import multiprocessing
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

T_975 = {3: 4.303, 4: 3.182, 5: 2.776}  # by number of pairs


def load(file: Path) -> list[dict[str, Any]]:
    """The finished fits."""
    return json.loads(file.read_text()) if file.exists() else []


def run_all(run: Callable[[Any], dict[str, Any]], jobs: list[Any], results: list[dict[str, Any]], file: Path) -> None:
    """Run the jobs in as many processes as there are cores; write the results after every one."""
    from rich.progress import track

    if not jobs:
        return
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        for result in track(pool.imap_unordered(run, jobs), "fits", len(jobs)):
            results.append(result)
            file.parent.mkdir(exist_ok=True)
            file.write_text("[\n" + ",\n".join(map(json.dumps, results)) + "\n]\n")


def interval(differences: list[float]) -> tuple[float, float]:
    """Mean of paired differences, and half the width of its 95 % t interval."""
    half = T_975[len(differences)] * statistics.stdev(differences) / len(differences) ** 0.5
    return statistics.mean(differences), half
