"""Runs that start warm: forked from a server that has imported what every run imports, which takes seconds.

The server computes nothing and uses no GPU, so that it can be forked. A run has its own output and locks, and begins
as ``python -m curation.recipes.cli`` does. If the comparison or the server is killed, runs go on. W&B is not
imported: every run must make its own temporary folder.
"""

import ctypes
import json
import mmap
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from importlib import import_module
from typing import Self

import numpy as np

MODULE = "curation.recipes.cli"
IMPORTED = (MODULE, "curation.callbacks", "lightning.pytorch.cli", "jsonargparse.typing", "torch._dynamo")


class Server:
    """A process from which runs are forked. It starts with the first run, and ends with the last.

    Only Linux has it: elsewhere a fork is not safe with what torch uses.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cwd: str | None = None
        self._environment: dict[str, str] = {}
        self._requests: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, args: list[str], environment: dict[str, str], cwd: str, log: int, locks: list[int]) -> int | None:
        """Run ``curation`` in a process of its own, and wait for its end.

        Args:
            args: Arguments of ``curation``.
            environment: Environment variables.
            cwd: Working directory.
            log: File descriptor of what the run prints.
            locks: File descriptors that the run keeps open.

        Returns:
            The exit status, as :class:`subprocess.Popen` gives it; None if there is no server, or no longer, or not
            with this folder and number of threads.
        """
        with self._lock:
            if self._cwd is None and sys.platform == "linux":
                self._start(environment, cwd)
        names = self._environment.keys() | environment.keys()
        changed = {n: environment.get(n) for n in names if self._environment.get(n) != environment.get(n)}
        if self._requests is None or self._cwd != cwd or "OMP_NUM_THREADS" in changed:
            return None
        message = json.dumps([args, changed]).encode()
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                try:
                    socket.send_fds(self._requests, [message], [theirs.fileno(), log, *locks])
                except OSError:  # the server was killed
                    return None
            status = ours.recv(16)  # nothing, if the server and the run have ended
        return int(status) if status else None

    def _start(self, environment: dict[str, str], cwd: str) -> None:
        self._cwd, self._environment = cwd, environment
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # Ctrl-C is for the runs
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment,
                cwd=cwd,
                pass_fds=[theirs.fileno()],
            )
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Ask for no more runs; after an error or Ctrl-C some may be going on, and are not waited for."""
        if self._requests is not None:
            self._requests.close()
        if self._process is not None and kind is None:
            self._process.wait()


def serve(requests: socket.socket, pages: list[int]) -> list[str]:
    """Fork a process for every request, until the other end is closed and the last process has ended.

    Args:
        requests: Where they come from: arguments and changed variables, with descriptors for the exit status, the log
            and the locks.
        pages: See :func:`pages_of_files`.

    Returns:
        In such a process, its arguments; in the server none.
    """
    runs: dict[int, tuple[int, socket.socket]] = {}  # by a descriptor that is ready when the process has ended
    while requests.fileno() >= 0 or runs:
        waiting: list[int | socket.socket] = [*runs, *([requests] if requests.fileno() >= 0 else [])]
        ready, _, _ = select.select(waiting, [], [])
        for ended in runs.keys() & set(ready):
            pid, answer = runs.pop(ended)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            os.close(ended)
            with answer, suppress(OSError):  # the comparison was killed
                answer.send(str(status).encode())
        if requests in ready:
            message, descriptors, _, _ = socket.recv_fds(requests, 65536, 8)
            if not message:
                requests.close()
                continue
            pid = os.fork()
            if pid == 0:
                requests.close()
                for other, (_, answer) in runs.items():
                    os.close(other)
                    answer.close()
                args, changed = json.loads(message)
                _begin(changed, pages, *descriptors)
                return args
            answer = socket.socket(fileno=descriptors[0])
            runs[os.pidfd_open(pid)] = (pid, answer)
            for descriptor in descriptors[1:]:
                os.close(descriptor)
    return []


def _begin(changed: dict[str, str | None], pages: list[int], answer: int, log: int, *locks: int) -> None:
    """Make a forked process what a new one would be; the answer stays open until it ends, and so do the locks."""
    os.set_inheritable(answer, False)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    for name, value in changed.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    for page in pages:
        ctypes.string_at(page, 1)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def pages_of_files() -> list[int]:
    """Addresses of the pages of libraries and other files that are in the memory of this process.

    A forked process reads each of them once. Otherwise its peak memory would be without what only imports use, and a
    fifth less than that of the same run in a new process.
    """
    pages: list[int] = []
    with open("/proc/self/maps") as maps, open("/proc/self/pagemap", "rb") as pagemap:
        for line in maps:
            bounds, permissions, _, _, inode = line.split()[:5]
            if inode != "0" and permissions[0] == "r":
                start, end = (int(bound, 16) // mmap.PAGESIZE for bound in bounds.split("-"))
                pagemap.seek(8 * start)
                present = np.frombuffer(pagemap.read(8 * (end - start)), np.uint64) >> np.uint64(63)
                pages += ((start + np.flatnonzero(present)) * mmap.PAGESIZE).tolist()
    return pages


def main() -> None:
    """Serve at the descriptor of the command line; in a run, do what its arguments say."""
    for module in IMPORTED:
        import_module(module)
    args = serve(socket.socket(fileno=int(sys.argv[1])), pages_of_files())
    if args:
        sys.argv[1:] = args
        runpy.run_module(MODULE, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
