"""Concepts in a Lightning run: what was trained on is counted, and online the sampler's objective chooses it."""

import json
import os

import numpy as np
import pytest
import torch
from helpers import Classifier, Watch, data, trainer
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import Callback, LightningDataModule, seed_everything
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from torch.utils.data import DataLoader, default_collate
from twins import slow_diverse

from curation.batch import SampleIds
from curation.callbacks import (
    ConceptAwareSelection,
    ConceptCoverageMonitor,
    ExactResume,
    RunMeter,
    UniformSelection,
)
from curation.callbacks.samplers import concept_coverage
from curation.samplers.concept_aware import ConceptAwareSampler, ConceptIndex, MovingTargets

ROWS = [[i % 3, 5 + i % 7] if i % 5 else [] for i in range(64)]


def concepts():
    return ConceptIndex.from_lists(ROWS)


def loader(sampler=None, batch_size=8, **kwargs):
    how = {"shuffle": True} if sampler is None else {"sampler": sampler}
    return DataLoader(SampleIds(data()), batch_size, **how, **kwargs)


class Tagged(LightningDataModule):
    def setup(self, stage):
        self.concepts = concepts()

    def train_dataloader(self):
        return loader()


def ids(watch):
    """By their features, since ids are stripped."""
    samples = data().tensors[0]
    return [[int((samples == x).all(1).nonzero()) for x in batch[0]] for batch in watch.batches]


def test_what_was_trained_on_is_counted():
    index, watch, monitor = concepts(), Watch(), ConceptCoverageMonitor()
    run = trainer(monitor, watch, max_epochs=3)
    run.fit(Classifier(), loader(ConceptAwareSampler(index, 8, 16)))
    trained = ids(watch)
    assert len(trained) == 12
    visits = np.bincount(np.ravel(trained), minlength=64)
    assert monitor.visits.tolist() == visits.tolist()
    logged = {k.removeprefix("concepts/"): v.item() for k, v in run.callback_metrics.items() if "concepts/" in k}
    last = np.bincount(index.take(np.array(trained[-1])).ids, minlength=len(index.names))
    shares = last[last > 0] / last.sum()
    assert logged == {
        "coverage": pytest.approx((last > 0).mean()),
        "entropy": pytest.approx(-(shares * np.log(shares)).sum() / np.log(len(index.names))),
        "target_distance": pytest.approx(np.abs(last / last.sum() - 1 / len(index.names)).sum() / 2),
        "distinct_seen": pytest.approx((visits > 0).mean()),
        "repeats": pytest.approx(visits.sum() / (visits > 0).sum()),
    }


class Logged(Callback):
    """What was logged after each step, and the loss and concepts of each row that was trained on."""

    def __init__(self):
        self.steps, self.rows = [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        samples = data().tensors[0]
        rows = [int((samples == x).all(1).nonzero()) for x in batch[0]]
        self.rows.append(list(zip(rows, module.seen.tolist(), strict=True)))
        self.steps.append({k: v.item() for k, v in trainer.logged_metrics.items() if "concepts/loss" in k})


class Seen(Classifier):
    def training_step(self, batch, batch_idx):
        x, y = batch
        losses = torch.nn.functional.cross_entropy(self(x), y, reduction="none")
        self.seen = losses.detach()
        return losses.mean()


def by_concept(rows):
    found = {}
    for row, loss in rows:
        for name in ROWS[row]:
            found.setdefault(f"concepts/loss/{name}", []).append(loss)
    return {name: pytest.approx(np.mean(values), rel=1e-5) for name, values in found.items()}


@pytest.mark.parametrize("rule", [None, UniformSelection(keep=0.5)])
def test_the_loss_of_a_concept_is_that_of_its_rows_since_the_last_log(rule):
    logged, rules = Logged(), [] if rule is None else [rule]
    monitor = ConceptCoverageMonitor(concepts(), losses=True)
    run = trainer(*rules, monitor, logged, max_epochs=2, log_every_n_steps=3)
    run.fit(Seen(), loader())
    for end in (2, 5, 8):  # logged after every third step
        expected = by_concept([row for step in logged.rows[end - 2 : end + 1] for row in step])
        assert {name: logged.steps[end][name] for name in expected} == expected


def test_losses_that_were_not_logged_yet_are_in_the_checkpoint(tmp_path):
    def fit(ckpt_path=None, **options):
        seed_everything(7, verbose=False)
        logged, monitor = Logged(), ConceptCoverageMonitor(concepts(), losses=True)
        run = trainer(monitor, logged, ExactResume(), max_epochs=1, log_every_n_steps=6, **options)
        run.fit(Seen(), loader(), ckpt_path=ckpt_path)
        return run, logged.steps

    _, whole = fit()
    run, _ = fit(max_steps=4)
    run.save_checkpoint(tmp_path / "x.ckpt")
    _, resumed = fit(tmp_path / "x.ckpt")
    assert len(resumed) == 4
    assert resumed[-1] == whole[-1] != {}


def test_losses_of_many_concepts_are_refused():
    many = ConceptIndex.from_lists([[f"{i}", f"a{i}"] for i in range(64)])
    with pytest.raises(ValueError, match="`losses` must be False for more than 100 concepts, but there are 128"):
        trainer(ConceptCoverageMonitor(many, losses=True)).fit(Classifier(), loader())


def test_moving_targets_are_compared_where_they_are():
    """The last of six steps comes after 40 samples, two thirds of the way."""
    index, watch, monitor = concepts(), Watch(), ConceptCoverageMonitor()
    names = index.names
    moving = MovingTargets({0: {str(names[0]): 1.0}, 60: {str(names[1]): 1.0}})
    run = trainer(monitor, watch, max_epochs=2, limit_train_batches=3)
    run.fit(Classifier(), loader(ConceptAwareSampler(index, 8, 16, targets=moving)))
    last = np.bincount(index.take(np.array(ids(watch)[-1])).ids, minlength=len(names))
    expected = np.zeros(len(names))
    expected[:2] = 1 / 3, 2 / 3
    distance = np.abs(last / last.sum() - expected).sum() / 2
    assert run.callback_metrics["concepts/target_distance"].item() == pytest.approx(distance)
    rules = [ConceptCoverageMonitor(), UniformSelection(keep=0.25)]
    with pytest.raises(ValueError, match="Argument `targets` must be given where the targets of the sampler move"):
        trainer(*rules).fit(Classifier(), loader(ConceptAwareSampler(index, 8, 16, targets=moving)))


def test_beside_a_selection_the_kept_rows_are_counted():
    for order in (1, -1):
        watch, monitor = Watch(), ConceptCoverageMonitor(concepts())
        trainer(*[monitor, UniformSelection(keep=0.25)][::order], watch).fit(Classifier(), loader())
        assert monitor.visits.tolist() == np.bincount(np.ravel(ids(watch)), minlength=64).tolist()
        assert monitor.visits.sum() == 2 * 8 * 2


def test_the_index_may_come_from_a_file_or_the_data_module(tmp_path):
    concepts().save(tmp_path / "tags.arrow")
    for monitor, source in (
        (ConceptCoverageMonitor(str(tmp_path / "tags.arrow")), {"train_dataloaders": loader()}),
        (ConceptCoverageMonitor(), {"datamodule": Tagged()}),
    ):
        trainer(monitor).fit(Classifier(), **source)
        assert monitor.visits.tolist() == [2] * 64
    for rule in (ConceptAwareSelection(0.25, str(tmp_path / "tags.arrow")), ConceptAwareSelection(0.25)):
        watch = Watch()
        trainer(rule, watch).fit(Classifier(), datamodule=Tagged())
        assert {len(batch) for batch in ids(watch)} == {2}


@pytest.mark.parametrize("objective", ["diversity", "frequency"])
def test_online_the_objective_of_the_sampler_chooses(objective):
    """Batches in the order of the data: the kept rows are those of brute force on 16 candidates."""
    watch, index = Watch(), concepts()
    rule = ConceptAwareSelection(0.25, index, objective)
    trainer(rule, watch, max_epochs=1).fit(Classifier(), DataLoader(SampleIds(data()), 16))
    for step, kept in enumerate(ids(watch)):
        rows = [set(index[i].tolist()) for i in range(16 * step, 16 * step + 16)]
        if objective == "diversity":
            expected = slow_diverse(rows, 4, [1.0] * len(index.names), [0.0] * 16, None)
        else:
            expected = sorted(range(16), key=lambda i, rows=rows: -len(rows[i]))[:4]
        assert kept == [16 * step + i for i in sorted(expected)]


@pytest.mark.parametrize("objective", ["diversity", "frequency"])
@pytest.mark.parametrize("targets", ["uniform", "proportional"])
def test_on_the_device_the_same_rows_are_chosen(objective, targets):
    rule = ConceptAwareSelection(0.25, concepts(), objective, targets)
    rule._index = concepts()
    for draw in (0.0, 0.3, 0.9):
        expected = rule._rows(torch.arange(32), 8, draw)
        assert rule.on_device(torch.arange(32), 8, draw).tolist() == expected.tolist()


def test_the_picture_is_saved_and_logged(tmp_path):
    csv = CSVLogger(tmp_path, "csv")
    wandb = WandbLogger(project="concepts", save_dir=tmp_path, offline=True)
    trainer(ConceptCoverageMonitor(), logger=[csv, wandb]).fit(
        Classifier(), loader(ConceptAwareSampler(concepts(), 8, 16))
    )
    wandb.experiment.finish()
    assert (tmp_path / "csv/version_0/concepts.png").read_bytes()[1:4] == b"PNG"
    assert list(tmp_path.glob("wandb/offline-run-*/files/media/images/concepts/picture*.png"))


def test_the_picture_is_saved_after_an_exception_and_missing_matplotlib_is_told(tmp_path, monkeypatch):
    class Breaks(Classifier):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if batch_idx == 3:
                raise RuntimeError("broken")

    def fit():
        run = trainer(ConceptCoverageMonitor(concepts()), logger=CSVLogger(tmp_path, "csv"))
        with pytest.raises(RuntimeError, match="broken"):
            run.fit(Breaks(), loader())

    fit()
    assert (tmp_path / "csv/version_0/concepts.png").is_file()
    with monkeypatch.context() as patch:
        patch.setattr(concept_coverage, "plot_concepts", lambda *_: 1 / 0)
        with pytest.warns(UserWarning, match="was not written: ZeroDivisionError"):
            fit()
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.warns(UserWarning, match="A picture needs matplotlib"):
        fit()


def test_a_picture_that_cannot_be_written_is_told_and_ends_no_fit(tmp_path):
    logger, meter = CSVLogger(tmp_path, "csv"), RunMeter(tmp_path / "run.json")
    (tmp_path / "csv/version_0/concepts.png").mkdir(parents=True)
    logger._version = 0
    run = trainer(ConceptCoverageMonitor(concepts()), meter, logger=logger)
    with pytest.warns(UserWarning, match=r"The picture of the concepts was not written: .*concepts.png"):
        run.fit(Classifier(), loader())
    assert json.loads((tmp_path / "run.json").read_text())["finished"]


def test_the_picture_lies_where_the_logger_writes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logger = CSVLogger("memory://coverage")
    run = trainer(ConceptCoverageMonitor(concepts()), default_root_dir="memory://coverage", logger=logger)
    run.fit(Classifier(), loader())
    with get_filesystem(logger.log_dir).open(f"{logger.log_dir}/concepts.png", "rb") as file:
        assert file.read(4)[1:] == b"PNG"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("broken", [0, 3])
def test_a_batch_that_is_none_is_not_counted(broken):
    def collate(samples):
        return None if samples[0][-1]["sample_id"] // 8 == broken else default_collate(samples)

    monitor = ConceptCoverageMonitor(concepts())
    trainer(monitor, max_epochs=1).fit(Classifier(), DataLoader(SampleIds(data()), 8, collate_fn=collate))
    assert monitor.visits.view(8, 8).sum(1).tolist() == [0 if batch == broken else 8 for batch in range(8)]


def test_validation_and_the_last_pass_of_weight_averaging_are_not_counted():
    for callbacks in ([], [StochasticWeightAveraging(0.01, swa_epoch_start=1)]):
        monitor = ConceptCoverageMonitor(concepts())
        trainer(monitor, *callbacks, max_epochs=2, limit_train_batches=2).fit(Classifier(), loader(), loader())
        assert monitor.visits.sum() == 32


def test_a_checkpoint_of_other_data_is_refused(tmp_path):
    run = trainer(ConceptCoverageMonitor(concepts()), max_epochs=1)
    run.fit(Classifier(), loader())
    run.save_checkpoint(tmp_path / "x.ckpt")
    few = DataLoader(SampleIds(data(32)), 8)
    with pytest.raises(ValueError, match="The checkpoint counts 64 samples, but now there are 32"):
        trainer(ConceptCoverageMonitor(concepts().take(np.arange(32)))).fit(
            Classifier(), few, ckpt_path=tmp_path / "x.ckpt", weights_only=True
        )


def test_rubbish_is_named():
    with pytest.raises(TypeError, match=r"must be a ConceptIndex or a file, but got \[\['a'\]\]"):
        ConceptCoverageMonitor([["a"]])
    few, small = ConceptIndex.from_labels([0, 1]), ConceptAwareSampler(concepts(), 4, 16)
    for callback, batches, error, message in (
        (ConceptCoverageMonitor(), loader(), ValueError, "Argument `concepts` must be given where neither"),
        (ConceptCoverageMonitor(few), loader(), ValueError, "a row for each of the 64 samples, but got 2"),
        (ConceptCoverageMonitor(concepts(), {"x": 1.0}), loader(), ValueError, "`targets` must name concepts"),
        (ConceptCoverageMonitor(concepts()), DataLoader(data(), 8), TypeError, "Monitor needs sample ids"),
        (ConceptCoverageMonitor("missing.arrow"), loader(), ValueError, "must name a file, .*missing"),
        (ConceptCoverageMonitor(), loader(small), ValueError, "the `batch_size` of its sampler, 4, but has 8"),
        (ConceptCoverageMonitor(concepts()), [loader(), loader()], TypeError, "needs one training data loader"),
        (ConceptAwareSelection(0.5), loader(), ValueError, "Argument `concepts` must be given where the data module"),
        (ConceptAwareSelection(0.5, few), loader(), ValueError, "a row for each of the 64 samples, but got 2"),
        (ConceptAwareSelection(0.5, concepts(), targets={"x": 1.0}), loader(), ValueError, "`targets` must name"),
        (ConceptAwareSelection(0.5, concepts()), DataLoader(data(), 8), TypeError, "Selection needs sample ids"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            trainer(callback).fit(Classifier(), batches)
    with pytest.raises(
        ValueError, match="Argument `objective` must be 'diversity' or 'frequency', but got 'variety'"
    ):
        ConceptAwareSelection(0.5, concepts(), "variety")
