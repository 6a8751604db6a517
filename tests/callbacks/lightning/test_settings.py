"""What a logger is told of a fit."""

import functools
import json
import pickle
import struct
import time

import pytest
import yaml
from helpers import Classifier, Proxy, data, loader, trainer
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from torch.utils.data import DataLoader

import curation
from curation.callbacks import (
    DynamicDataPruning,
    ExactResume,
    HardSampleSelection,
    OnlineSelection,
    ProxySelection,
    SampleRecord,
    UniformSelection,
)
from curation.callbacks.lightning.loggers import log_settings
from curation.recipes.image_classification import ImageClassifier, Images
from curation.samplers import DynamicDataPruningSampler
from curation.settings import plain

BLOCK = 32768  # bytes


def told(logger):
    return yaml.safe_load(open(f"{logger.log_dir}/hparams.yaml").read())


def test_every_argument_is_a_hyperparameter(tmp_path):
    logger = CSVLogger(tmp_path)
    selection = HardSampleSelection(0.25, rule="rank", pressure=50.0)
    run = trainer(SampleRecord(), selection, ExactResume(), EarlyStopping("train_loss"), logger=logger, max_epochs=1)
    run.fit(Classifier(), loader())
    got = told(logger)
    assert got["HardSampleSelection"]["keep"] == 0.25
    assert got["HardSampleSelection"]["pressure"] == 50.0
    assert got["HardSampleSelection"]["seed"] == 0  # a default
    assert got["SampleRecord"]["size"] is None
    assert got["EarlyStopping"]["monitor"] == "train_loss"
    assert got["lightning_curation"] == curation.__version__
    assert "ExactResume" not in got  # no arguments


def test_data_module_and_sampler_too(tmp_path):
    logger, events = TensorBoardLogger(tmp_path), CSVLogger(tmp_path)
    data = Images("digits", batch_size=64, sampler=functools.partial(DynamicDataPruningSampler, prune=0.5))
    run = trainer(DynamicDataPruning(), logger=[logger, events], max_epochs=1, limit_val_batches=0)
    run.fit(ImageClassifier(), data)
    logger.finalize("success")
    got = told(logger)
    assert got["Images"]["batch_size"] == 64
    assert got["Images"]["sampler"] == {"class": "DynamicDataPruningSampler", "prune": 0.5}
    assert got["DynamicDataPruning"]["lr_scale"] == 0
    assert told(events)["DynamicDataPruningSampler"]["rule"] == "mean"  # TensorBoard's file is written before


class Secret(LightningDataModule):
    def __init__(self, password="hush"):
        super().__init__()
        self.password = password

    def train_dataloader(self):
        return DataLoader(data(), 8)


def test_arguments_of_others_may_be_secrets(tmp_path):
    logger = CSVLogger(tmp_path)
    trainer(UniformSelection(0.5), logger=logger, max_epochs=1).fit(Classifier(), Secret())
    assert "hush" not in str(told(logger))


class OfAUser(OnlineSelection):
    def __init__(self, power, keep=0.5):
        super().__init__(keep)
        self.exponent = power

    def score(self, trainer, pl_module, batch, sample_ids):
        return batch[0].norm(dim=1) ** self.exponent

    def on_train_start(self, trainer, pl_module):
        super().on_train_start(trainer, pl_module)


def test_a_rule_of_ones_own_is_told_of(tmp_path):
    logger = CSVLogger(tmp_path)
    trainer(OfAUser(2), logger=logger, max_epochs=1).fit(Classifier(), loader())
    assert told(logger)["OfAUser"] == {"power": 2, "keep": 0.5}


def test_two_of_a_class_are_told_apart(tmp_path):
    logger = CSVLogger(tmp_path)
    log_settings(trainer(logger=logger), [SampleRecord(size=64), SampleRecord(size=65)])
    logger.save()
    got = told(logger)
    assert (got["SampleRecord"]["size"], got["SampleRecord_2"]["size"]) == (64, 65)


def test_arguments_that_are_objects_are_named():
    assert ProxySelection(0.5, Proxy()).settings()["proxy"] == "Proxy"
    assert plain(range(3)) == "range"
    assert plain([1, (2.5, None)]) == [1, [2.5, None]]


def test_a_pickled_callback_keeps_its_settings():
    copy = pickle.loads(pickle.dumps(UniformSelection(0.25)))
    assert copy.settings()["keep"] == 0.25


def test_a_logger_that_fails_stops_no_fit(tmp_path, monkeypatch):
    logger = CSVLogger(tmp_path)
    calls = []

    def fails(params):
        calls.append(params)
        raise OSError("disk full")

    monkeypatch.setattr(logger, "log_hyperparams", fails)
    with pytest.warns(UserWarning, match="settings of the fit was not written: OSError: disk full"):
        trainer(UniformSelection(0.5), logger=logger, max_epochs=2).fit(Classifier(), loader())
    assert len(calls) == 1  # once a fit


def written_config(file):
    """The configuration in the file of an offline run, a log in the format of LevelDB."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, part, config = file.read_bytes(), 7, b"", {}
    while place + 7 <= len(content):
        if (left := BLOCK - place % BLOCK) < 7:
            place += left
            continue
        _, size, kind = struct.unpack("<IHB", content[place : place + 7])
        part += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record, part = Record.FromString(part), b""
            for update in (*record.run.config.update, *record.config.update):
                config[update.key or ".".join(update.nested_key)] = json.loads(update.value_json)
    return config


def test_two_runs_are_told_apart_in_wandb(tmp_path):
    configs = []
    for keep in (0.25, 0.5):
        logger = WandbLogger(project="settings", save_dir=tmp_path / str(keep), offline=True)
        trainer(UniformSelection(keep), logger=logger, max_epochs=1).fit(Classifier(), loader())
        logger.experiment.finish()
        (file,) = (tmp_path / str(keep)).rglob("*.wandb")
        for _ in range(100):  # another process writes it
            config = written_config(file)
            if "UniformSelection" in config:
                break
            time.sleep(0.1)
        configs.append(config)
    assert [config["UniformSelection"]["keep"] for config in configs] == [0.25, 0.5]
