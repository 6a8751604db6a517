"""Runs that are forked from a warm server: the same as cold ones, and as hard to kill together."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from processes import forked

from curation.recipes.compare import processes, resume, warm
from curation.recipes.compare.run import Run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere every run starts cold")

WAITS = """
import os, time
from pathlib import Path
from lightning.pytorch import Callback

class Waits(Callback):
    def __init__(self, folder: str):
        self.folder = Path(folder)

    def on_train_start(self, trainer, pl_module):
        (self.folder / "environment").write_text(repr((os.environ.get("ADDED"), "TAKEN" in os.environ)))
        (self.folder / "new").write_text(str(os.getpid()))
        (self.folder / "new").rename(self.folder / "pid")
        while not (self.folder / "go").exists():
            time.sleep(0.02)

    def on_train_end(self, trainer, pl_module):
        if (self.folder / "go").read_text() == "wrong":
            raise RuntimeError("as it was told")
"""


def make(folder, go=None):
    """A run that begins to train at once and goes on when it is told."""
    folder.mkdir(parents=True)
    if go is not None:
        (folder / "go").write_text(go)
    boring = "lightning.pytorch.demos.boring_classes."
    callbacks = [
        {"class_path": "waits.Waits", "init_args": {"folder": str(folder)}},
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
         "init_args": {"dirpath": str(folder), "filename": "last"}},
        {"class_path": "curation.callbacks.RunMeter", "init_args": {"path": str(folder / "run.json")}},
    ]  # fmt: skip
    trainer = {
        "accelerator": "cpu", "devices": 1, "max_steps": 4, "val_check_interval": 2, "limit_val_batches": 1,
        "enable_progress_bar": False, "logger": False, "default_root_dir": str(folder), "callbacks": callbacks,
    }  # fmt: skip
    model, data = ({"class_path": boring + name} for name in ("BoringModel", "BoringDataModule"))
    run = Run(folder.name, 0, folder, {"seed_everything": 1, "model": model, "data": data, "trainer": trainer})
    resume.prepare(run)
    return run


def fit(run, place, server=None):
    processes.fit(run, str(place), 1, server)


def in_thread(run, place, server):
    thread = threading.Thread(target=fit, args=(run, place, server))
    thread.start()
    return thread


def ended(thread):
    """Wait for the end of a run; a run that does not end fails the test in place of holding it up."""
    thread.join(120)
    assert not thread.is_alive()


def pid(run):
    """The process of a run, once it trains; a run that never does fails the test."""
    deadline = time.monotonic() + 120
    while not (run.folder / "pid").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return int((run.folder / "pid").read_text())


def parent(pid):
    return int(Path(f"/proc/{pid}/status").read_text().split("PPid:")[1].split()[0])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("warm")
    (folder / "waits.py").write_text(WAITS)
    return folder


@pytest.fixture(scope="module", autouse=True)
def interruptible():
    """Let runs notice an interrupt: a shell that starts the tests in the background has them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def server(place, interruptible):
    with warm.Server() as server:
        yield server


def test_a_run_is_that_of_a_cold_process_and_as_large(place, server):
    runs = {name: make(place / name, go="on") for name in ("cold", "warm")}
    fit(runs["cold"], place)
    fit(runs["warm"], place, server)
    cold, hot = (runs[name].result for name in ("cold", "warm"))
    assert server._process.poll() is None  # so it was not started cold
    assert [point["metrics"] for point in hot["points"]] == [point["metrics"] for point in cold["points"]]
    assert len(cold["points"]) == 2
    assert (cold["finished"], cold["device"]) == (hot["finished"], hot["device"]) == (True, cold["device"])
    weights = [torch.load(run.folder / "last.ckpt", weights_only=True)["state_dict"] for run in runs.values()]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert hot["peak_memory"] == pytest.approx(cold["peak_memory"], rel=0.04)
    logs = [(run.folder / "log.txt").read_text() for run in runs.values()]
    assert all("`Trainer.fit` stopped: `max_steps=4` reached." in log for log in logs)


def test_a_run_that_is_killed_or_interrupted_or_fails_ends_alone(place, server):
    runs = [make(place / name) for name in ("killed", "interrupted", "failed", "finished")]
    threads = [in_thread(run, place, server) for run in runs]
    pids = [pid(run) for run in runs]
    assert {parent(p) for p in pids} == {server._process.pid}
    os.kill(pids[0], signal.SIGKILL)
    os.kill(pids[1], signal.SIGINT)
    os.kill(server._process.pid, signal.SIGINT)  # Ctrl-C reaches the whole group
    for thread in threads[:2]:
        ended(thread)
    (runs[2].folder / "go").write_text("wrong")
    (runs[3].folder / "go").write_text("on")
    for thread in threads[2:]:
        ended(thread)
    assert [run.finished for run in runs] == [False, False, False, True]
    assert runs[0].failure == "killed by signal 9"
    assert "KeyboardInterrupt" in (runs[1].folder / "log.txt").read_text()
    assert runs[2].failure == "RuntimeError: as it was told"
    assert server._process.poll() is None


def compare(folder, place):
    """A comparison of one run, to be killed."""
    with warm.Server() as server:
        fit(make(folder), place, server)


def test_a_run_goes_on_without_its_comparison_and_keeps_its_lock(place):
    folder = place / "orphan"
    comparison = forked().Process(target=compare, args=(folder, str(place)))
    comparison.start()
    run = Run("orphan", 0, folder, {})
    alone = pid(run)
    comparison.kill()
    comparison.join()
    assert comparison.exitcode == -9
    assert resume.try_lock(folder / "lock") is None
    os.kill(alone, 0)
    (folder / "go").write_text("on")
    with resume.lock(folder / "lock"):  # which the server has not
        assert run.finished


def test_a_run_goes_on_without_its_server_and_the_next_one_starts_cold(place, monkeypatch):
    cold = []

    def record(command, **_):
        cold.append(command[-1])
        return subprocess.CompletedProcess(command, 0)

    runs = [make(place / name) for name in ("first", "second", "third")]
    with warm.Server() as server:
        threads = [in_thread(run, place, server) for run in runs[:2]]
        alone = [pid(run) for run in runs[:2]]
        monkeypatch.setattr(subprocess, "run", record)
        server._process.kill()
        os.kill(alone[1], signal.SIGKILL)
        ended(threads[1])
        assert cold == [str(runs[1].folder / "fit.yaml")]  # it had not finished
        (runs[0].folder / "go").write_text("on")
        ended(threads[0])
        assert runs[0].finished
        fit(runs[2], place, server)
    assert cold == [str(run.folder / "fit.yaml") for run in runs[1:]]


def test_a_run_has_its_own_environment(place, monkeypatch):
    runs = [make(place / name, go="on") for name in ("before", "after")]
    with warm.Server() as server:
        monkeypatch.setenv("TAKEN", "1")
        fit(runs[0], place, server)
        monkeypatch.delenv("TAKEN")
        monkeypatch.setenv("ADDED", "1")
        fit(runs[1], place, server)
        environment = {**os.environ, "OMP_NUM_THREADS": "2"}
        assert server.run(["--help"], environment, str(place), 1, []) is None
    assert [(run.folder / "environment").read_text() for run in runs] == ["(None, True)", "('1', False)"]


def test_elsewhere_there_is_no_server(place, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    server = warm.Server()
    assert server.run(["--help"], {}, str(place), 1, []) is None
    assert server._process is None


def test_what_is_imported_can_be_forked():
    """No threads of Python, no GPU and no temporary folder, which the first run that ends would remove for all."""
    code = (
        "import json, tempfile, threading; made = []; "
        "tempfile.TemporaryDirectory = lambda *a, **k: made.append(a); "
        "from importlib import import_module; from curation.recipes.compare import warm; "
        "[import_module(name) for name in warm.IMPORTED]; import torch; "
        "print(json.dumps([threading.active_count(), torch.cuda.is_initialized(), made]))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(out.splitlines()[-1]) == [1, False, []]
