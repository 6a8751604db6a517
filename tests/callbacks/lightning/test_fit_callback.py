"""A state belongs to a fit, and no trace is left however it ends."""

import pytest
from helpers import Classifier, loader, trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from curation.callbacks.lightning.fit_callback import FitCallback


class Counts(FitCallback):
    def __init__(self) -> None:
        self.batches, self.torn_down = 0, 0

    def on_train_batch_end(self, *_):
        self.batches += 1

    def state_dict(self):
        return {"batches": self.batches}

    def restore(self, state):
        self.batches = state["batches"]

    def teardown(self, trainer, pl_module, stage):
        self.torn_down += 1


def test_a_state_is_restored_in_a_fit_and_in_no_evaluation(tmp_path):
    save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=8)
    trainer(Counts(), save, enable_checkpointing=True, max_epochs=1).fit(Classifier(), loader(ids=False))
    for stage in ("fit", "validate", "test"):
        counts = Counts()
        run = trainer(counts, max_epochs=2)
        getattr(run, stage)(Classifier(), loader(ids=False, shuffle=False), ckpt_path=tmp_path / "step=8.ckpt")
        assert counts.batches == (16 if stage == "fit" else 0)
        assert counts.fitting == (stage == "fit")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_it_is_torn_down_once_however_the_fit_ends(error):
    class Fails(Callback):
        def on_train_batch_end(self, *_):
            raise error("stop")

    counts = Counts()
    with pytest.raises((error, SystemExit)):
        trainer(counts, Fails()).fit(Classifier(), loader(ids=False))
    assert counts.torn_down == 1
    counts = Counts()
    trainer(counts, max_epochs=1).fit(Classifier(), loader(ids=False))
    assert counts.torn_down == 1


def test_a_callback_without_a_state_restores_nothing():
    callback = FitCallback()
    callback.fitting = True
    assert callback.load_state_dict({"of": "another version"}) is None
