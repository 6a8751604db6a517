import pytest
import torch
from helpers import Classifier, assert_same_weights, loader, trainer, weights
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from curation.callbacks import ExactResume, FinalCheckpoint, UniformSelection, same_wandb_run


class Stops(Callback):
    def __init__(self, step, error):
        self.step, self.error = step, error

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            raise self.error


def fit(folder, *callbacks, resume=None, save=None, after=(), **options):
    seed_everything(7, verbose=False)
    module = Classifier()
    saves = [ModelCheckpoint(folder, "{step}", every_n_train_steps=5, **(save or {})), FinalCheckpoint()]
    callbacks = UniformSelection(0.5), ExactResume(), *callbacks, *saves, *after
    run = trainer(*callbacks, enable_checkpointing=True, **options)
    run.fit(module, loader(), ckpt_path=resume)
    return weights(module)


def test_the_weights_that_a_fit_ends_with_are_saved(tmp_path):
    trained = fit(tmp_path, max_steps=7)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert_same_weights(saved["state_dict"], trained)
    assert saved["global_step"] == 7


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("stop")])
def test_and_those_of_a_fit_that_was_interrupted_go_on_exactly(error, tmp_path):
    whole = fit(tmp_path / "whole", max_epochs=2)
    with pytest.raises((SystemExit, RuntimeError)):
        fit(tmp_path, Stops(7, error), max_epochs=2)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 7
    assert_same_weights(fit(tmp_path / "on", max_epochs=2, resume=tmp_path / "last.ckpt"), whole)


def test_nothing_is_saved_twice(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr("lightning.pytorch.Trainer.save_checkpoint", lambda self, path, *_, **__: saved.append(path))
    callback, module = FinalCheckpoint(), Classifier()
    run = trainer(
        callback, default_root_dir=tmp_path, max_steps=2, logger=CSVLogger(tmp_path), enable_checkpointing=True
    )
    run.fit(module, loader(ids=False))
    assert saved == [f"{run.log_dir}/checkpoints/last.ckpt"]
    callback.on_train_end(run, module)
    assert len(saved) == 1


def test_it_takes_the_place_of_an_older_last_checkpoint(tmp_path):
    """Whatever other callbacks save in between."""
    other = ModelCheckpoint(tmp_path / "other", every_n_train_steps=7)
    fit(tmp_path, max_steps=7, save={"save_last": True}, after=[other])
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 7
    assert len(list(tmp_path.glob("last*.ckpt"))) == 1


def test_an_error_before_the_first_step_saves_nothing(tmp_path):
    class Early(Callback):
        def on_train_start(self, *_):
            raise RuntimeError("early")

    with pytest.raises(RuntimeError, match="early"):
        fit(tmp_path, Early(), max_steps=5)
    assert not list(tmp_path.glob("*.ckpt"))


def test_a_resumed_fit_goes_on_in_its_wandb_run(tmp_path):
    def logger(**how):
        return WandbLogger(project="resume", save_dir=tmp_path, offline=True, **how)

    first = logger()
    fit(tmp_path, max_steps=7, logger=first)
    first.experiment.finish()
    same = same_wandb_run(tmp_path / "last.ckpt")
    assert same == {"id": first.version, "resume": "allow"}
    second = logger(**same)
    fit(tmp_path / "on", max_steps=9, logger=second, resume=tmp_path / "last.ckpt")
    second.experiment.finish()
    runs = {folder.name.split("-")[3] for folder in tmp_path.glob("wandb/offline-run-*")}
    assert runs == {first.version}
    assert same_wandb_run(tmp_path / "on" / "last.ckpt") == same


def test_a_checkpoint_without_a_run_begins_a_new_one(tmp_path):
    fit(tmp_path, max_steps=1)
    assert same_wandb_run(tmp_path / "last.ckpt") == {}
    assert same_wandb_run(tmp_path) == {}  # shards
    with pytest.raises(FileNotFoundError):
        same_wandb_run(tmp_path / "none.ckpt")
