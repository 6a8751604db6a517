"""A fit on a part of the samples that goes on from a checkpoint, or is begun again."""

import io
import os

import numpy as np
import pytest
import torch
from helpers import Classifier, assert_same_weights, loader, trainer, weights
from instance_runs import Rows, saved
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from stand_ins import EverySecond, Smallest

from curation.callbacks import ExactResume, InstanceSelection


@pytest.fixture(autouse=True)
def folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class Growing(Smallest):
    """8 samples, then 48: the stream that a selector draws from depends on the epoch only."""

    def fit(self, X, y):
        super().fit(X, y)
        self.sample_indices_ = np.argsort(X[:, 0], kind="stable")[: 8 * (7 - np.random.randint(1, 8))]


def fit(folder, resume=None, seed=1, first=False, **checkpoint):
    """Warm-up of an epoch of eight batches, then one of one batch and one of six."""
    seed_everything(seed, verbose=False)
    module, rows, selector = Classifier(), Rows(), Growing()
    callback = InstanceSelection(selector=selector, layer="net.0", warmup_epochs=1, every_n_epochs=1)
    save = ModelCheckpoint(folder, "{epoch}-{step}", save_top_k=-1, **checkpoint)
    pair = [callback, ExactResume()] if first else [ExactResume(), callback]
    run = trainer(*pair, rows, save, enable_checkpointing=True, max_epochs=3)
    run.fit(module, loader(ids=False), loader(ids=False, shuffle=False), ckpt_path=resume)
    return (
        weights(module),
        [len(e) for e in rows.epochs],
        [i for e in rows.epochs for i in e],
        callback,
        len(selector.given),
    )


@pytest.mark.parametrize("first", [True, False], ids=["before ExactResume", "after it"])
@pytest.mark.parametrize(
    "place",
    [
        {"every_n_train_steps": 1},
        {"every_n_epochs": 1, "save_on_train_epoch_end": False},
        {"every_n_epochs": 1, "save_on_train_epoch_end": True},
    ],
    ids=["every step", "validation", "epoch end"],
)
def test_resume_from_everywhere_is_bit_identical(tmp_path, place, first):
    whole, lengths, seen, callback, selections = fit(tmp_path / "whole", first=first, **place)
    assert lengths == [64, 8, 48]
    assert selections == 2
    files = {int(f.stem.split("step=")[1]): f for f in (tmp_path / "whole").glob("*.ckpt")}
    assert set(files) in ({*range(1, 16)}, {8, 9, 15})
    for step, file in files.items():
        resumed, _, again, resumed_callback, selected = fit(tmp_path / "again", file, seed=77, first=first, **place)
        assert again == seen[8 * step :]
        assert_same_weights(whole, resumed)
        assert repr(resumed_callback.state_dict()) == repr(callback.state_dict())
        # Only what is saved at an epoch's end holds the selection that was made there.
        made_then = place.get("save_on_train_epoch_end", False)
        assert selected == sum(at > step or (at == step and not made_then) for at in (8, 9))


def test_a_resumed_run_keeps_to_what_was_selected(tmp_path):
    save = ModelCheckpoint(tmp_path, save_last=True)
    path = saved(indices=range(0, 64, 4))
    trainer(InstanceSelection(path), save, max_epochs=1, enable_checkpointing=True).fit(Classifier(), loader())
    os.unlink(path)
    rows, again = Rows(), InstanceSelection(path)
    trainer(again, rows, max_epochs=2).fit(Classifier(), loader(), ckpt_path=tmp_path / "last.ckpt")
    assert sorted(rows.epochs[0]) == list(range(0, 64, 4))
    file = io.BytesIO()
    torch.save(again.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["indices"].tolist() == list(range(0, 64, 4))
    with pytest.raises(
        ValueError, match="one training data loader, always of as many samples: 64 before, and now 70"
    ):
        trainer(InstanceSelection(path), max_epochs=2).fit(
            Classifier(), loader(n=70), ckpt_path=tmp_path / "last.ckpt"
        )


def test_loader_workers_begin_a_resumed_epoch_in_its_order(tmp_path):
    """Without ExactResume; they are started before Lightning tells samplers the epoch."""
    seen = []
    for resume in (None, tmp_path / "epoch=0.ckpt"):
        rows, save = Rows(), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        run = trainer(InstanceSelection(saved()), rows, save, enable_checkpointing=True)
        run.fit(Classifier(), loader(num_workers=1), ckpt_path=resume)
        seen.append(rows.epochs[-1])
    assert len(rows.epochs) == 1
    assert seen[0] == seen[1]


class Scheduled(Classifier):
    def configure_optimizers(self):
        self.trainer.estimated_stepping_batches  # noqa: B018, asks for the loader before the epoch is restored
        return super().configure_optimizers()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_schedule_that_asks_for_the_length_does_not_change_the_order_of_a_resumed_epoch(tmp_path, workers):
    seen = []
    for resume in (None, tmp_path / "epoch=0.ckpt"):
        rows, save = Rows(), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        run = trainer(InstanceSelection(saved()), rows, save, enable_checkpointing=True)
        run.fit(Scheduled(), loader(num_workers=workers), ckpt_path=resume)
        seen.append(rows.epochs[-1])
    assert seen[0] == seen[1]


def test_a_second_fit_selects_again_and_an_evaluation_changes_nothing():
    selector = EverySecond()
    callback = InstanceSelection(selector=selector)
    batches = loader(ids=False)
    run = trainer(callback, max_epochs=1)
    run.fit(Classifier(), batches)
    kept = callback.indices
    run.validate(Classifier(), loader(shuffle=False))
    assert callback.indices is kept
    trainer(callback, max_epochs=1).fit(Classifier(), loader(n=32))
    assert len(selector.given) == 2
    assert callback.indices.tolist() == list(range(0, 32, 2))
