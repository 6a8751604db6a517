"""Processes of the tests, forked from one server that has imported everything: a start takes no seconds."""

import multiprocessing
import os
import pickle
import runpy
import socket
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest


def forked():
    """The context whose processes are forked from the server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["contract.worker", "pandas"])  # what pyarrow imports
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
        forkserver.ensure_running()
    return context


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def join(*processes, code: int = 0) -> None:
    """Wait for processes to end with an exit code."""
    for process in processes:
        process.join(120)
    alive = [process.is_alive() for process in processes]
    for process in processes:
        process.kill()
    assert not any(alive), "hangs"
    assert [process.exitcode for process in processes] == [code] * len(processes)


def fit_in_this_process(patch: pytest.MonkeyPatch) -> None:
    """Let ``curation compare`` run its fits here, one after another: new processes would mostly import."""
    from curation.recipes import cli
    from curation.recipes.compare import processes

    one_at_a_time = threading.Lock()

    def fit(run, cwd, threads, server=None):
        with one_at_a_time, processes.begin(run) as held:
            if held is not None:
                cli.main(["fit", "--config", str(run.folder / "fit.yaml")])
                if "wandb" in sys.modules:
                    sys.modules["wandb"].finish()

    patch.setattr(processes, "fit", fit)


def run_script(script: str, arguments: tuple[str, ...], environment: dict[str, str]) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.update(environment)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def rank_environment(rank: int, port: int) -> dict[str, str]:
    """What ``torchrun`` sets for one of two ranks on CPUs."""
    return {
        "TORCHELASTIC_RUN_ID": "tests", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        "RANK": str(rank), "LOCAL_RANK": str(rank),
    }  # fmt: skip


def on_two_ranks(script: str, *arguments: object, **environment: str) -> None:
    """Run a test module as a script on two ranks, as ``torchrun`` starts them on CPUs; it must succeed."""
    port = free_port()
    ranks = [
        forked().Process(
            target=run_script,
            args=(script, tuple(map(str, arguments)), {**os.environ, **rank_environment(rank, port), **environment}),
        )
        for rank in (0, 1)
    ]
    for rank in ranks:
        rank.start()
    join(*ranks)


class TwoRanks:
    """Two ranks that stay, for many small questions; after a failure or a hang the next question starts new ones."""

    def __init__(self, patience: int = 60) -> None:
        self.patience = patience  # seconds
        self.processes: list[Any] = []
        self.pipes: list[Connection] = []

    def ask(self, work: Callable[[Any], Any], *arguments: Any) -> list[Any]:
        """What ``work`` gives on each rank for its argument."""
        if not self.processes:
            self._start()
        for pipe, argument in zip(self.pipes, arguments, strict=True):
            pipe.send_bytes(pickle.dumps((work, argument)))
        answers: dict[int, Any] = {}
        while len(answers) < len(self.pipes):
            ready = wait([pipe for rank, pipe in enumerate(self.pipes) if rank not in answers], self.patience)
            for pipe in ready:
                rank = self.pipes.index(pipe)
                answers[rank], error = pickle.loads(pipe.recv_bytes())
                if error:
                    self.stop()
                    raise AssertionError(f"rank {rank}: {error}")
            if not ready:
                self.stop()
                raise AssertionError(f"hangs; ranks that answered: {sorted(answers)}")
        return [answers[rank] for rank in sorted(answers)]

    def _start(self) -> None:
        port, context = free_port(), forked()
        for rank in (0, 1):
            here, there = context.Pipe()
            process = context.Process(target=answer, args=(there, rank_environment(rank, port)), daemon=True)
            process.start()
            there.close()
            self.processes.append(process)
            self.pipes.append(here)

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.processes, self.pipes = [], []


def answer(pipe: Connection, environment: dict[str, str]) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.update(environment)
    warnings.simplefilter("ignore")
    while True:
        work, argument = pickle.loads(pipe.recv_bytes())
        try:
            result = work(argument), None
        except Exception:
            result = None, traceback.format_exc()
        pipe.send_bytes(pickle.dumps(result))
