"""Fits in processes and folders of their own, which a dead machine does not lose and two processes do not repeat."""

import fcntl
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

KILLED, ENDED = "killed by signal", "ended with status"
FIT = "fit.yaml"  # Lightning's own record of the configuration is config.yaml


@dataclass
class Run:
    """One fit, in a folder of its own."""

    arm: str
    seed: int
    folder: Path
    config: dict[str, Any]
    seconds: float = 1.0  # expected, for the progress bar

    @property
    def result(self) -> dict[str, Any]:
        """What its meter has written so far."""
        file = self.folder / "run.json"
        return json.loads(file.read_text()) if file.is_file() else {"points": [], "finished": False}

    @property
    def finished(self) -> bool:
        """Whether it came to its end."""
        return self.result["finished"]

    @property
    def spent(self) -> float:
        """Of its budget, at the last validation: 1 for all of it."""
        meter, points = self.config["trainer"]["callbacks"][-1]["init_args"], self.result["points"]
        if not points:
            return 0.0
        if "max_seconds" in meter:
            return points[-1]["seconds"] / meter["max_seconds"]
        return points[-1]["step"] / meter["max_steps"]

    def prepare(self) -> None:
        """Write its configuration.

        Raises:
            ValueError: If the folder holds the run of another one.
        """
        file = self.folder / FIT
        if not file.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            new = file.with_suffix(f".{os.getpid()}")
            new.write_text(yaml.safe_dump(self.config, sort_keys=False))
            new.replace(file)
        there = yaml.safe_load(file.read_text())
        if there != self.config:
            if not self.finished:
                file.unlink()
                return self.prepare()
            raise ValueError(
                "Argument `--out` must be a new folder, or that of the same comparison with the same budget, but in "
                f"{str(file)!r} {_first_difference(there, self.config)}."
            )

    def execute(self, cwd: str, threads: int | None) -> None:
        """Run it unless it is finished; wait for it if another process is running it.

        Args:
            cwd: Where it runs.
            threads: Of PyTorch's; None leaves them alone.
        """
        with _lock(self.folder / "lock") as own:
            if self.finished:
                return
            (self.folder / "run.json").unlink(missing_ok=True)  # of an attempt that failed
            trainer = self.config["trainer"]
            on_gpu = trainer["accelerator"] in ("auto", "gpu", "cuda") and trainer["devices"] in ("auto", 1)
            with (
                _free_gpu(torch.cuda.device_count() if on_gpu else 0) as gpu,
                (self.folder / "log.txt").open("w") as log,
            ):
                devices = [] if gpu is None else [f"--trainer.devices=[{gpu.index}]"]
                fit = [sys.executable, "-m", "curation.recipes.cli.main", "fit", "--config", str(self.folder / FIT)]
                environment = {"WANDB_SILENT": "true", **os.environ}  # so that the last words are its own
                if threads is not None:
                    environment["OMP_NUM_THREADS"] = str(threads)
                # The fit keeps the locks if this process is killed: whoever comes back waits for it.
                keep = [own.fileno(), *([] if gpu is None else [gpu.file.fileno()])]
                how = {"stdout": log, "stderr": log, "env": environment, "cwd": cwd, "pass_fds": keep}
                how["stdin"] = subprocess.DEVNULL
                status = subprocess.run([*fit, *devices], check=False, **how).returncode  # type: ignore[call-overload]
                if not self.finished:
                    log.seek(0, os.SEEK_END)
                    log.write(f"\n{KILLED} {-status}\n" if status < 0 else f"\n{ENDED} {status}\n")


def _first_difference(there: Any, here: Any) -> str:
    if type(there) is type(here) is list and len(there) == len(here):
        there, here = dict(enumerate(there)), dict(enumerate(here))
    if isinstance(there, dict) and isinstance(here, dict):
        for key in [*here, *there]:
            if there.get(key) != here.get(key):
                inner = _first_difference(there.get(key), here.get(key))
                return inner if isinstance(key, int) else f"{key}: {inner}"
    return f"{there!r} there, {here!r} here"


@contextmanager
def _lock(file: Path) -> Iterator[Any]:
    with file.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield held


@dataclass
class _Gpu:
    index: int
    file: Any


@contextmanager
def _free_gpu(count: int) -> Iterator[_Gpu | None]:
    """One of this machine's GPUs for the time of a run; None where there are none."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    held = None
    while count and held is None:
        for index in range(count):
            name = names[index] if index < len(names) and names[index] else index
            file = (Path(tempfile.gettempdir()) / f"curation-{os.getuid()}-gpu-{name}.lock").open("w")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                continue
            held = _Gpu(index, file)
            break
        else:
            time.sleep(1)
    try:
        yield held
    finally:
        if held is not None:
            held.file.close()


def last_words(run: Run) -> str:
    """Why a run did not finish: the exception in its log, or how its process ended."""
    file = run.folder / "log.txt"
    lines = [line for line in file.read_text(errors="replace").splitlines() if line.strip()] if file.is_file() else []
    if not lines:
        return "it was not run"
    if lines[-1].startswith(KILLED):
        return lines[-1]
    for i in reversed(range(len(lines))):
        if lines[i].startswith("Traceback "):
            return next((line for line in lines[i + 1 :] if not line.startswith(" ")), lines[-1])
        if lines[i].startswith("curation: "):
            return " ".join(line.strip() for line in lines[i:-1])
    return f"{lines[-1]}, without an error message"


def execute(runs: list[Run], title: str, backend: str, jobs: int) -> None:
    """Run what is not finished, over joblib, with a progress bar."""
    from joblib import Parallel, delayed
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    # Some backends give their processes one thread each.
    threads = None if backend == "loky" and jobs == 1 else max(1, (os.cpu_count() or 1) // jobs)
    total = sum(run.seconds for run in runs)
    shown = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[runs]} runs"),
        TimeRemainingColumn(),
    )
    stop = threading.Event()

    def follow(bar: Progress, task: Any) -> None:
        last = False
        while not last:
            last = stop.wait(1)
            done = sum(run.seconds * (1.0 if run.finished else min(run.spent, 1.0)) for run in runs)
            bar.update(
                task, completed=total if last else done, runs=f"{sum(run.finished for run in runs)} of {len(runs)}"
            )

    with Progress(*shown) as bar:
        task = bar.add_task(title, total=total, runs=f"0 of {len(runs)}")
        thread = threading.Thread(target=follow, args=(bar, task), daemon=True)
        thread.start()
        try:
            left = [run for run in runs if not run.finished]
            with _backend(backend, max(1, min(jobs, len(left)))):
                Parallel(batch_size=1)(delayed(run.execute)(os.getcwd(), threads) for run in left)
        finally:
            stop.set()
            thread.join()


@contextmanager
def _backend(name: str, jobs: int) -> Iterator[None]:
    from joblib import parallel_config

    if name == "dask":
        from dask import config
        from distributed import Client

        here = {} if config.get("scheduler-address", None) else {"n_workers": jobs, "threads_per_worker": 1}
        with Client(**here), parallel_config("dask", n_jobs=jobs):
            yield
        return
    if name == "ray":
        from ray.util.joblib import register_ray

        register_ray()
    with parallel_config(name, n_jobs=jobs):
        yield
