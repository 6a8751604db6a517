"""Runs in processes of their own, side by side: a run that dies takes nothing with it."""

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
from typing import IO, Any

import torch

from curation.recipes.compare.resume import begin, try_lock, unfinished
from curation.recipes.compare.run import ENDED, FIT, KILLED, Run
from curation.recipes.compare.warm import MODULE, Server

LOCAL = ("threading", "loky")  # a thread that waits for the process of a run cannot be killed alone
DEATHS = ("KilledWorker", "WorkerCrashedError", "TaskCrashedError")  # errors of dask and of ray


def execute(runs: list[Run], title: str, backend: str, jobs: int, server: Server | None = None) -> None:
    """Run what is not finished, over joblib, with a progress bar.

    Args:
        runs: The runs; each is prepared (:func:`curation.recipes.compare.resume.prepare`).
        title: Title of the progress bar.
        backend: Backend of joblib: ``"threading"``, ``"dask"`` or ``"ray"``.
        jobs: Runs side by side.
        server: What runs of this machine are forked from; None starts each anew.

    Raises:
        ValueError: If a worker of the backend is killed, or another comparison uses the folder.
        OSError: If a file cannot be written.
    """
    from joblib import Parallel, delayed

    # Some backends give their processes one thread each.
    threads = None if backend in LOCAL and jobs == 1 else max(1, (os.cpu_count() or 1) // jobs)
    left = unfinished(runs)
    server = server if backend in LOCAL else None
    with _progress_bar(runs, title), _backend(backend, max(1, min(jobs, len(left)))):
        try:
            Parallel(batch_size=1)(delayed(fit)(run, os.getcwd(), threads, server) for run in left)
        except Exception as error:
            if type(error).__name__ not in DEATHS:
                raise
            raise ValueError(
                f"a worker of `--backend={backend}` was killed; the same command goes on where it was ({error})"
            ) from error


def fit(run: Run, cwd: str, threads: int | None, server: Server | None = None) -> None:
    """Run ``curation fit`` in a process, unless the run is finished; wait if another process is running it.

    Args:
        run: The run, which is prepared.
        cwd: Working directory of the process.
        threads: Threads of PyTorch in the process; None leaves the setting alone.
        server: What the process is forked from; None starts it anew.
    """
    with begin(run) as held:
        if held is None:
            return
        trainer = run.config["trainer"]
        on_gpu = trainer["accelerator"] in ("auto", "gpu", "cuda") and trainer["devices"] in ("auto", 1)
        with free_gpu(torch.cuda.device_count() if on_gpu else 0) as gpu, _log(run.folder / "log.txt") as log:
            devices = [] if gpu is None else [f"--trainer.devices=[{gpu.index}]"]
            args = ["fit", "--config", str(run.folder / FIT), *devices]
            environment = {"WANDB_SILENT": "true", **os.environ}  # so that the log ends with the run's own error
            if threads is not None:
                environment["OMP_NUM_THREADS"] = str(threads)
            # The fit keeps the locks if this process is killed: who resumes the comparison waits for it.
            locks = [held.fileno(), *([] if gpu is None else [gpu.lock.fileno()])]
            status = server.run(args, environment, cwd, log.fileno(), locks) if server else None
            if status is None and not run.finished:
                status = subprocess.run(
                    [sys.executable, "-m", MODULE, *args],
                    check=False,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=environment,
                    cwd=cwd,
                    pass_fds=locks,
                ).returncode
            if status is not None and not run.finished:
                log.seek(0, os.SEEK_END)
                log.write(f"\n{KILLED} {-status}\n" if status < 0 else f"\n{ENDED} {status}\n")


@contextmanager
def _log(path: Path) -> Iterator[IO[str]]:
    """A new file for what a run prints; a full disk is reported with its name."""
    try:
        with path.open("w") as log:
            yield log
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@dataclass
class Gpu:
    """A GPU of this machine that no other run uses while the file is open."""

    index: int
    lock: IO[str]


@contextmanager
def free_gpu(count: int) -> Iterator[Gpu | None]:
    """A GPU of this machine for the time of a run, after waiting for one that is free.

    Args:
        count: Number of GPUs; with 0 there is nothing to wait for, and None is yielded.
    """
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    gpu = None
    while count and gpu is None:
        for index in range(count):
            name = names[index] if index < len(names) and names[index] else index
            held = try_lock(Path(tempfile.gettempdir()) / f"curation-{os.getuid()}-gpu-{name}.lock")
            if held is not None:
                gpu = Gpu(index, held)
                break
        else:
            time.sleep(1)
    try:
        yield gpu
    finally:
        if gpu is not None:
            gpu.lock.close()


@contextmanager
def _progress_bar(runs: list[Run], title: str) -> Iterator[None]:
    """A bar of the expected seconds, which a thread reads from the files of the runs once a second."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    total = sum(run.seconds for run in runs)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[runs]} runs"))
    stop = threading.Event()

    def follow(bar: Progress, task: Any) -> None:
        stopped = False
        while not stopped:
            stopped = stop.wait(1)
            done = sum(run.seconds * (1.0 if run.finished else min(run.spent, 1.0)) for run in runs)
            count = f"{len(runs) - len(unfinished(runs))} of {len(runs)}"
            bar.update(task, completed=total if stopped else done, runs=count)

    with Progress(*columns, TimeRemainingColumn()) as bar:
        task = bar.add_task(title, total=total, runs=f"0 of {len(runs)}")
        thread = threading.Thread(target=follow, args=(bar, task), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


@contextmanager
def _backend(name: str, jobs: int) -> Iterator[None]:
    from joblib import parallel_config

    if name == "dask":
        from dask import config
        from distributed import Client

        cluster = {} if config.get("scheduler-address", None) else {"n_workers": jobs, "threads_per_worker": 1}
        with Client(**cluster), parallel_config("dask", n_jobs=jobs):
            yield
        return
    if name == "ray":
        from ray.util.joblib import register_ray

        register_ray()
    with parallel_config("threading" if name in LOCAL else name, n_jobs=jobs):
        yield
