"""A data module with a part of its training samples."""

import copy
import pickle
from pathlib import Path

import pytest
import yaml
from helpers import Classifier, loader, trainer
from instance_runs import Rows, saved, which
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.model_helpers import is_overridden

from curation.callbacks import SelectedDataModule


@pytest.fixture(autouse=True)
def folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class Data(LightningDataModule):
    def __init__(self, size: int = 8, cached: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.batch_size, self.calls = size, []
        self.shape = (8,)
        self.loader = loader(ids=False, batch_size=size) if cached else None

    def prepare_data(self):
        self.calls.append("prepare")

    def setup(self, stage):
        self.calls.append(stage)

    def train_dataloader(self):
        return self.loader or loader(ids=False, batch_size=self.batch_size)

    def val_dataloader(self):
        return loader(ids=False, shuffle=False)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.calls.append("transfer")
        return batch

    def state_dict(self):
        return {"count": 7}

    def load_state_dict(self, state):
        self.loaded = state


def test_a_data_module_is_the_inner_one_but_for_its_training_samples(tmp_path):
    rows, inner = Rows(), Data(cached=True)
    module = SelectedDataModule(inner, saved())
    run = trainer(rows, ModelCheckpoint(tmp_path, save_last=True), enable_checkpointing=True)
    run.fit(Classifier(), datamodule=module)
    assert [sorted(epoch) for epoch in rows.epochs] == [list(range(3, 64, 3))] * 2
    assert rows.epochs[0] != rows.epochs[1]
    assert rows.validated == [8, 8]
    assert inner.calls[:2] == ["prepare", "fit"]
    assert inner.calls.count("transfer") == 2 * (3 + 8) + 2
    assert inner.trainer is module.trainer is run
    assert (module.shape, module.hparams) == ((8,), {"size": 8, "cached": True})
    assert sorted(i for batch in inner.train_dataloader() for i in which(batch[0])) == list(range(64))
    module.batch_size = 4
    assert inner.batch_size == 4
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        module.nothing_of_this_name  # noqa: B018
    again = Data()
    trainer(max_epochs=3).fit(
        Classifier(), datamodule=SelectedDataModule(again, saved()), ckpt_path=tmp_path / "last.ckpt"
    )
    assert again.loaded == {"count": 7}


def test_a_data_module_is_copied_and_has_no_loaders_that_the_inner_one_has_not():
    module = pickle.loads(pickle.dumps(SelectedDataModule(Data(4), saved())))
    assert len(module.train_dataloader()) == 6
    assert module.batch_size == copy.copy(module).batch_size == 4
    bare = LightningDataModule()
    bare.train_dataloader = lambda: loader(ids=False)
    run = trainer(max_epochs=1)
    run.fit(Classifier(), datamodule=SelectedDataModule(bare, saved()))
    assert run.val_dataloaders is None
    assert not is_overridden("test_dataloader", SelectedDataModule(bare, saved()))
    assert is_overridden("on_after_batch_transfer", SelectedDataModule(Data(), saved()))


def test_a_data_module_refuses_what_the_callback_refuses():
    with pytest.raises(ValueError, match=r"Argument `index` must be a path, .* but got 3"):
        SelectedDataModule(Data(), 3)
    with pytest.raises(ValueError, match="there is no such file: 'nowhere'"):
        SelectedDataModule(Data(), "nowhere")
    with pytest.raises(ValueError, match=r"'nowhere\.npy': there is no such file"):
        SelectedDataModule(Data(), "nowhere.npy")
    with pytest.raises(ValueError, match="`index` must be of the 64 training samples, but got 'other' of 65"):
        SelectedDataModule(Data(), saved("other", of=65)).train_dataloader()
    with pytest.warns(UserWarning, match="The index was made of other samples"):
        SelectedDataModule(Data(), saved(fingerprint="other")).train_dataloader()
    module = SelectedDataModule(Data(), saved())
    module.trainer = trainer(overfit_batches=2)
    with pytest.raises(ValueError, match="overfit_batches"):
        module.train_dataloader()


@pytest.mark.parametrize("index", ["file", "list"])
def test_a_data_module_comes_through_the_command_line(index):
    from lightning.pytorch.cli import LightningCLI

    inner = {"class_path": "lightning.pytorch.demos.boring_classes.BoringDataModule"}
    init = {"datamodule": inner, "index": saved() if index == "file" else list(range(3, 64, 3))}
    Path("config.yaml").write_text(
        yaml.safe_dump({"data": {"class_path": "curation.callbacks.SelectedDataModule", "init_args": init}})
    )
    cli = LightningCLI(
        Classifier, LightningDataModule, subclass_mode_data=True, args=["--config=config.yaml"], run=False,
        save_config_callback=None,
    )  # fmt: skip
    cli.datamodule.setup("fit")
    assert len(cli.datamodule.train_dataloader()) == 21
    assert len(cli.datamodule.val_dataloader()) == 64
