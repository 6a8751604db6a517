"""What every public callback promises on a GPU: every precision, and no wait of the host beyond those of training."""

import warnings

import pytest
import torch
from helpers import Classifier, loader, trainer
from lightning.pytorch import Callback

from contract.registry import CALLBACKS, write_tags

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
every = pytest.mark.parametrize("entry", CALLBACKS.values(), ids=CALLBACKS)


@pytest.fixture(autouse=True)
def folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tags(64)


class Waits(Callback):
    """Places in the code where the host waited for the GPU, from the end of one step to the end of a later one."""

    def __init__(self, first=2, last=6):
        self.first, self.last = first, last
        self.places: list[str] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == self.first:
            self.caught = warnings.catch_warnings(record=True)
            self.found = self.caught.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
        elif batch_idx == self.last:
            torch.cuda.set_sync_debug_mode("default")
            self.caught.__exit__(None, None, None)
            self.places = [f"{w.filename}:{w.lineno}" for w in self.found if "synchronizing" in str(w.message)]


def run(batches, *callbacks, module=Classifier, **options):
    waits, module = Waits(), module()
    trainer(*callbacks, waits, accelerator="gpu", devices=1, log_every_n_steps=100, **options).fit(module, batches)
    return waits.places, module


@every
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_trains_in_every_precision(entry, precision):
    _, module = run(entry.loader(), *entry.in_trainer(), module=entry.module, precision=precision)
    assert set(module.seen) == {2 if entry.curates else 8}
    assert all(value.isfinite().all() for value in module.state_dict().values())


@pytest.mark.parametrize("entry", [e for e in CALLBACKS.values() if not e.refusal("fsdp1")], ids=lambda e: e.name)
def test_trains_under_fsdp1(entry):
    _, module = run(entry.loader(), *entry.in_trainer(), module=entry.module, strategy="fsdp")
    assert set(module.seen) == {8}


@every
def test_the_host_waits_no_more_often_than_without(entry):
    plain, _ = run(loader(ids=False), module=entry.module)
    places, _ = run(entry.loader(), *entry.in_trainer(), module=entry.module)
    assert len(places) == len(plain) + entry.waits, places


def test_a_wait_is_seen():
    class Asks(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, *_):
            outputs["loss"].item()

    places, _ = run(loader(ids=False), Asks())
    assert sum(place.startswith(__file__) for place in places) == 4
