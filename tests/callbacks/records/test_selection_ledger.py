"""The ledger of a fit."""

import pytest
import torch
from helpers import Classifier, loader, trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from curation.callbacks import HardSampleSelection, SelectionLedger, UniformSelection
from curation.records.ledger import Ledger


def test_weights_are_in_the_ledger(tmp_path):
    selection = HardSampleSelection(keep=0.25, rule="importance", score="grad_norm")
    trainer(selection, SelectionLedger(str(tmp_path)), max_epochs=1).fit(Classifier(), loader())
    rows = Ledger(tmp_path).rows().to_pydict()
    weights = torch.tensor(rows["weight"])
    assert torch.equal(weights > 0, torch.tensor(rows["kept"]) > 0)
    assert len(weights.unique()) > 3


def test_the_ledger_of_another_run_is_not_written_into(tmp_path):
    def fit():
        callbacks = [HardSampleSelection(keep=0.5), SelectionLedger(str(tmp_path))]
        trainer(*callbacks, max_epochs=1).fit(Classifier(), loader())

    fit()
    before = Ledger(tmp_path).rows()
    with pytest.raises(ValueError, match=r"Argument `path` must be a new folder, or that of the run that is resumed"):
        fit()
    assert Ledger(tmp_path).rows().equals(before)


def test_a_folder_that_cannot_be_written_is_named_before_training(tmp_path):
    with pytest.raises(ValueError, match="Argument `path` must be a string, but got None"):
        SelectionLedger(None)
    (tmp_path / "file").touch()
    module = Classifier()
    with pytest.raises(ValueError, match="Argument `path` must be a folder that can be written"):
        trainer(UniformSelection(keep=0.5), SelectionLedger(str(tmp_path / "file/ledger"))).fit(module, loader())
    assert module.seen == []


def test_a_resumed_run_needs_its_own_ledger(tmp_path):
    def fit(path, epochs=2, **kwargs):
        save = ModelCheckpoint(tmp_path / f"checkpoints-{path}", save_last=True)
        callbacks = [HardSampleSelection(keep=0.5), SelectionLedger(str(tmp_path / path)), save]
        trainer(*callbacks, max_epochs=epochs, enable_checkpointing=True).fit(Classifier(), loader(), **kwargs)

    fit("a")
    fit("b")
    before = Ledger(tmp_path / "a").rows()
    for path in ("a", "c"):
        with pytest.raises(ValueError, match=r"Argument `path` must be .* that of the run that is resumed"):
            fit(path, 3, ckpt_path=tmp_path / "checkpoints-b/last.ckpt")
    assert Ledger(tmp_path / "a").rows().equals(before)


def test_an_exception_loses_no_row(tmp_path):
    class Fails(Classifier):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if batch_idx == 5:
                raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        trainer(UniformSelection(keep=0.5), SelectionLedger(str(tmp_path))).fit(Fails(), loader())
    assert sorted(set(Ledger(tmp_path).rows()["step"].to_pylist())) == [0, 1, 2, 3, 4, 5]
    assert Ledger(tmp_path).cut_off() == {}
