"""Two processes, as ``torchrun`` starts them on CPUs."""

import os
import socket
import subprocess
import sys
from pathlib import Path


def on_two_ranks(script: str, *arguments: object, **environment: str) -> None:
    """Run a test module as a script on both ranks, and wait for it to succeed."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    common = {
        **os.environ, "TORCHELASTIC_RUN_ID": "tests", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "PYTHONPATH": path,
        **environment,
    }  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, script, *map(str, arguments)], env={**common, "RANK": rank, "LOCAL_RANK": rank}
        )
        for rank in ("0", "1")
    ]
    try:
        assert [process.wait(120) for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()
