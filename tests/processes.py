"""Processes of the tests, forked from one server that has imported everything: a start takes no seconds."""

import multiprocessing
import os
import runpy
import socket
import sys
from multiprocessing import forkserver
from pathlib import Path

import pytest


def forked():
    """The context whose processes are forked from the server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["contract.worker"])
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


def run_script(script: str, arguments: tuple[str, ...], environment: dict[str, str]) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.update(environment)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def on_two_ranks(script: str, *arguments: object, **environment: str) -> None:
    """Run a test module as a script on two ranks, as ``torchrun`` starts them on CPUs; it must succeed."""
    common = {
        **os.environ, "TORCHELASTIC_RUN_ID": "tests", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1", **environment,
    }  # fmt: skip
    ranks = [
        forked().Process(
            target=run_script, args=(script, tuple(map(str, arguments)), {**common, "RANK": rank, "LOCAL_RANK": rank})
        )
        for rank in ("0", "1")
    ]
    for rank in ranks:
        rank.start()
    join(*ranks)
