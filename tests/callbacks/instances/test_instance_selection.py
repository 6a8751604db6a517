"""A fit on a part of the samples: which, when, and that nothing else changes."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from helpers import Classifier, LanguageModel, assert_same_weights, data, loader, texts, trainer, weights
from instance_runs import Rows, X, Y, saved, unlike
from lightning.pytorch import Callback, LightningDataModule, seed_everything
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger
from stand_ins import EverySecond, Everything, Smallest
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
)

import curation.instances
from curation.batch import SampleIds
from curation.callbacks import InstanceSelection, SelectedDataModule, SelectionLedger, UniformSelection
from curation.instances import CoverageInstanceSelector, SelectionIndex
from curation.instances.selection_index import fingerprint
from curation.records.ledger import Ledger
from curation.samplers.subset import SubsetSampler


@pytest.fixture(autouse=True)
def folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# ---------------------------------------------------------------------- which samples


@pytest.mark.parametrize("ids", [False, True])
def test_a_fit_trains_on_the_samples_of_the_index(ids):
    rows, kept = Rows(), list(range(3, 64, 3))
    callback = InstanceSelection(saved(fingerprint=fingerprint(data())))
    batches = loader(ids=ids)
    trainer(callback, rows).fit(Classifier(), batches, loader(ids=False, shuffle=False))
    assert [sorted(epoch) for epoch in rows.epochs] == [kept, kept]
    assert rows.epochs[0] != rows.epochs[1] != kept  # shuffled, as before
    assert rows.validated == [8, 8]
    assert callback.indices.tolist() == kept
    assert callback.indices.dtype == torch.int64


@pytest.mark.parametrize("way", ["list", "array", "mask", "tensor", "selector", "file of a mask", "index"])
def test_the_index_may_be_anything_that_names_samples(way):
    kept = list(range(3, 64, 3))
    mask = np.isin(np.arange(64), kept)
    np.save("mask.npy", mask)
    selector = EverySecond(3)
    selector.fit(np.zeros((64, 1)))
    selector.sample_indices_ = np.array(kept)
    index = {
        "list": kept[::-1], "array": np.array(kept), "mask": mask, "tensor": torch.from_numpy(mask),
        "selector": selector, "file of a mask": "mask.npy", "index": SelectionIndex.load(saved()),
    }[way]  # fmt: skip
    rows, inner, callback = Rows(), LightningDataModule(), InstanceSelection(index)
    trainer(callback, rows, max_epochs=1).fit(Classifier(), loader(ids=False))
    assert sorted(rows.epochs[0]) == kept
    inner.train_dataloader = lambda: loader(ids=False)
    assert SelectedDataModule(inner, index).train_dataloader().sampler.indices.tolist() == kept
    with pytest.raises(ValueError, match="`index` must"):
        trainer(InstanceSelection(index)).fit(Classifier(), loader(n=16, ids=False))


class Numbers(EverySecond):
    needs_classes = False


def regression(kind):
    """A data loader whose labels are no classes."""
    return {
        "numbers": unlike(lambda x, y: (x, y + 0.5)),
        "column": unlike(lambda x, y: {"x": x, "y": y[:, None] + 0.5}),
        "several": unlike(lambda x, y: (x, torch.stack([y, y], 1) + 0.5)),
        "mapping": unlike(lambda x, y: {"x": x}),
        "one": unlike(lambda x, y: [x]),
        "tensor": unlike(lambda x, y: x),
        "classes": unlike(lambda x, y: (x, y)),
    }[kind]


class Anything(Classifier):
    def training_step(self, batch, batch_idx):
        x = batch["x"] if isinstance(batch, dict) else batch[0] if isinstance(batch, (list, tuple)) else batch
        self.seen = [*self.seen, *x[:, 0].tolist()]
        return self(x).square().mean()


@pytest.mark.parametrize("kind", ["numbers", "column", "several", "mapping", "one", "tensor", "classes"])
def test_a_selector_that_needs_no_classes_gets_numbers_or_none(kind):
    selector, module = Numbers(), Anything()
    trainer(InstanceSelection(selector=selector), max_epochs=1).fit(module, regression(kind))
    ((features, labels),) = selector.given
    np.testing.assert_array_equal(features, X)
    if kind in ("numbers", "column"):
        np.testing.assert_array_equal(labels, Y + 0.5)
    elif kind == "classes":
        assert labels.dtype == np.int64
        np.testing.assert_array_equal(labels, Y)
    else:
        assert labels is None
    assert sorted(module.seen) == sorted(X[::2, 0].tolist())


@pytest.mark.parametrize("kind", ["numbers", "tensor"])
def test_coverage_keeps_the_budget_of_numbers_and_of_unlabelled_samples(kind):
    callback = InstanceSelection(selector=CoverageInstanceSelector(0.25, random_state=0))
    trainer(callback, max_epochs=1).fit(Anything(), regression(kind))
    assert len(callback.indices) == 16
    expected = CoverageInstanceSelector(0.25, random_state=0).fit(X, Y + 0.5 if kind == "numbers" else None)
    assert callback.indices.tolist() == expected.sample_indices_.tolist()


@pytest.mark.parametrize("sampler", ["sequential", "distributed"])
def test_an_order_that_was_not_shuffled_is_not(sampler):
    how = None if sampler == "sequential" else DistributedSampler(data(), 1, 0, shuffle=False)
    rows = Rows()
    run = trainer(InstanceSelection(saved()), rows, max_epochs=1)
    run.fit(Classifier(), DataLoader(data(), 8, sampler=how))
    assert rows.epochs == [list(range(3, 64, 3))]


def test_a_batch_sampler_of_the_users_own_may_be_given():
    rows, batch_sampler = Rows(), BatchSampler(RandomSampler(data()), 5, drop_last=True)
    batches = DataLoader(data(), batch_sampler=batch_sampler)
    before = batch_sampler.sampler, batches.sampler
    trainer(InstanceSelection(selector=EverySecond()), rows, max_epochs=1).fit(Classifier(), batches)
    assert len(rows.epochs[0]) == 30
    assert not [i for i in rows.epochs[0] if i % 2]
    assert (batch_sampler.sampler, batches.sampler) == before


def test_ids_are_those_of_the_whole_data_set():
    """And the pass over all samples is no business of another selection."""
    ledger = SelectionLedger("ledger")
    callbacks = UniformSelection(keep=0.5), InstanceSelection(selector=EverySecond(), layer="net"), ledger
    trainer(*callbacks, max_epochs=1).fit(Classifier(), loader())
    assert sorted(Ledger("ledger").rows()["sample_id"].to_pylist()) == list(range(0, 64, 2))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_selector_gets_the_inputs_and_labels_of_all_samples_in_order(workers):
    selector = EverySecond()
    callback = InstanceSelection(selector=selector)
    trainer(callback, max_epochs=1).fit(Classifier(), loader(batch_size=7, num_workers=workers, drop_last=True))
    ((features, labels),) = selector.given
    assert (features.dtype, labels.dtype) == (np.float32, np.int64)
    np.testing.assert_array_equal(features, X)
    np.testing.assert_array_equal(labels, Y)


class Flexible(Classifier):
    """Logs in its forward, and remembers the mode of its normalisation layer."""

    def __init__(self):
        super().__init__()
        self.modes = set()

    def forward(self, x):
        self.log("mean", x.mean())
        self.modes.add(self.net[1].training)
        return super().forward(x)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        x, y = batch
        return (x + 1 if self.trainer.training else x), y


def test_a_selector_gets_what_a_layer_gives_in_evaluation():
    selector, module = EverySecond(), Flexible()
    module.net[4].eval()
    before = copy.deepcopy(module)
    trainer(InstanceSelection(selector=selector, layer="net.2"), max_epochs=1).fit(module, loader(batch_size=7))
    ((features, _),) = selector.given
    torch.testing.assert_close(torch.from_numpy(features), before.eval().net[:3](X).detach())
    assert module.modes == {False, True}
    assert not module.net[2]._forward_hooks
    assert not {"log", "log_dict"} & set(vars(module))


def test_layers_run_in_the_precision_of_the_fit():
    selector, module = EverySecond(), Classifier()
    before = copy.deepcopy(module)
    run = trainer(InstanceSelection(selector=selector, layer="net"), precision="bf16-mixed", max_epochs=1)
    run.fit(module, loader(batch_size=64))
    with torch.autocast("cpu", torch.bfloat16):
        expected = before.eval()(X).detach().float().numpy()
    np.testing.assert_array_equal(selector.given[0][0], expected)


class Sentences(LanguageModel):
    def score_step(self, batch):
        return self.model(batch["input_ids"], batch["attention_mask"]).logits[:, -1], batch["label"]

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(*self.score_step(batch))


def test_sequences_of_mappings_are_averaged_over_their_tokens():
    samples = [{**sample, "label": i % 3} for i, sample in enumerate(texts(20))]
    for sample in samples:
        del sample["labels"]
    selector, module = EverySecond(), Sentences()
    run = trainer(InstanceSelection(selector=selector, layer="model.model.norm"), max_epochs=1)
    run.fit(module, DataLoader(SampleIds(samples), 8))
    ((features, labels),) = selector.given
    assert labels.tolist() == [i % 3 for i in range(20)]
    for i, sample in enumerate(samples):
        ids, mask = sample["input_ids"][None], sample["attention_mask"][None]
        hidden = module.model.model(ids, mask).last_hidden_state[0].detach()
        torch.testing.assert_close(torch.from_numpy(features[i]), hidden[mask[0].bool()].mean(0))


class Drawn(EverySecond):
    def fit(self, X, y):
        super().fit(X, y)
        self.sample_indices_ = np.random.permutation(len(X))[:16]


def test_a_selector_without_a_seed_and_augmentations_depend_on_the_epoch_only():
    runs = []
    for seed in (1, 2):
        seed_everything(seed, verbose=False)
        rows, selector = Rows(), Drawn()
        callback = InstanceSelection(selector=selector, every_n_epochs=1)
        noisy = unlike(lambda x, y: (x + torch.where(torch.arange(8) > 0, torch.rand(8), 0), y))  # not the first
        trainer(callback, rows).fit(Classifier(), noisy)
        runs.append(([sorted(epoch) for epoch in rows.epochs], [features for features, _ in selector.given]))
    (epochs, given), (same, alike) = runs
    assert epochs == same
    assert epochs[0] != epochs[1]
    np.testing.assert_array_equal(given, alike)
    assert (given[0] != given[1]).any()


@pytest.mark.parametrize("layer", [None, "net.3"])
@pytest.mark.parametrize("workers", [0, 2])
def test_selecting_everything_is_bit_identical_to_a_sampler_of_everything(layer, workers):
    """Dropout, BatchNorm and every random stream."""

    def run(*callbacks, sampler):
        seed_everything(5, verbose=False)
        module = Classifier()
        how = {"sampler": SubsetSampler(data(), seed=5)} if sampler else {"shuffle": True}
        batches = DataLoader(data(), 8, num_workers=workers, **how)
        trainer(*callbacks).fit(module, batches, loader(ids=False, shuffle=False))
        return weights(module), torch.get_rng_state(), np.random.get_state()[1].tolist()

    selection = InstanceSelection(selector=Everything(), layer=layer)
    (expected, *streams), (got, *after) = run(sampler=True), run(selection, sampler=False)
    assert_same_weights(expected, got)
    assert torch.equal(streams[0], after[0])
    assert streams[1] == after[1]


def test_a_subset_of_the_users_own_bounds_the_selection_and_comes_back():
    sampler, rows = SubsetSampler(data(), range(40, 10, -1), seed=3), Rows()
    batches = DataLoader(data(), 8, sampler=sampler)
    selector = EverySecond(start=1)
    trainer(InstanceSelection(selector=selector, warmup_epochs=1), rows).fit(Classifier(), batches)
    np.testing.assert_array_equal(selector.given[0][0], X[11:41])
    assert [sorted(epoch) for epoch in rows.epochs] == [list(range(11, 41)), list(range(12, 41, 2))]
    assert batches.sampler is batches.batch_sampler.sampler is sampler
    assert sampler.indices.tolist() == list(range(40, 10, -1))
    with pytest.raises(ValueError, match="`index` must hold samples of the loader's SubsetSampler only"):
        trainer(InstanceSelection(saved())).fit(Classifier(), batches)


def test_validation_by_the_same_data_loader_is_on_all_samples():
    rows, batches = Rows(), loader(ids=False, shuffle=False)
    trainer(InstanceSelection(saved()), rows, max_epochs=1).fit(Classifier(), batches, batches)
    assert sorted(rows.epochs[0]) == list(range(3, 64, 3))
    assert rows.validated == [8]
    assert len(batches) == 8


# ---------------------------------------------------------------------- when


class Lengths(Callback):
    def __init__(self):
        self.steps, self.loaders = [], []

    def on_train_epoch_end(self, trainer, pl_module):
        self.steps.append(trainer.global_step)
        self.loaders.append(trainer.train_dataloader)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("persistent", [False, True])
def test_selections_after_a_warm_up_and_every_n_epochs(workers, persistent):
    if persistent and not workers:
        return
    torch.manual_seed(3)  # dropout
    selector, rows, lengths, module = Smallest(), Rows(), Lengths(), Classifier()
    callback = InstanceSelection(selector=selector, layer="net.0", warmup_epochs=2, every_n_epochs=2)
    batches = loader(ids=False, num_workers=workers, persistent_workers=persistent)
    expected = []

    class Expect(Callback):
        """What the layer gives once the epoch has ended."""

        def on_train_epoch_end(self, trainer, pl_module):
            first = pl_module.net[0](X)[:, 0].detach()
            expected.append(sorted(first.argsort(stable=True)[:16].tolist()))

    run = trainer(Expect(), callback, rows, lengths, max_epochs=6)
    run.fit(module, batches, loader(ids=False, shuffle=False))
    assert [sorted(epoch) for epoch in rows.epochs[:2]] == [list(range(64))] * 2
    assert [sorted(epoch) for epoch in rows.epochs[2:]] == [expected[1]] * 2 + [expected[3]] * 2
    assert expected[1] != expected[3]
    assert rows.epochs[2] != rows.epochs[3]
    assert rows.validated == [8] * 6
    assert lengths.steps == [8, 16, 18, 20, 22, 24]
    assert None not in lengths.loaders
    assert len(selector.given) == 2  # and none after the last epoch


def test_a_growing_selection_and_reloaded_loaders_are_not_cut():
    class Grows(EverySecond):
        def fit(self, X, y):
            super().fit(X, y)
            self.sample_indices_ = np.arange(8 * len(self.given))

    class Data(LightningDataModule):
        def train_dataloader(self):
            return loader(ids=False)

    for reload in (0, 1):
        rows = Rows()
        run = trainer(
            InstanceSelection(selector=Grows(), every_n_epochs=1),
            rows,
            max_epochs=4,
            reload_dataloaders_every_n_epochs=reload,
        )
        run.fit(Classifier(), datamodule=Data())
        assert [sorted(epoch) for epoch in rows.epochs] == [list(range(8 * n)) for n in (1, 2, 3, 4)]


def test_the_selection_is_made_before_the_schedule_asks_for_the_length():
    class Scheduled(Classifier):
        def configure_optimizers(self):
            self.expected = self.trainer.estimated_stepping_batches
            return super().configure_optimizers()

    module, selector = Scheduled(), EverySecond()
    run = trainer(InstanceSelection(selector=selector), max_epochs=3)
    run.fit(module, loader(ids=False))
    assert module.expected == run.global_step == 12
    assert len(selector.given) == 1


def test_no_selection_for_an_epoch_that_is_not_trained():
    class Stops(Classifier):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", 1.0)

    selector = EverySecond()
    callback = InstanceSelection(selector=selector, every_n_epochs=1)
    stop = EarlyStopping("val_loss", patience=1, check_on_train_epoch_end=False)
    trainer(callback, stop, max_epochs=9).fit(Stops(), loader(ids=False), loader(ids=False, shuffle=False))
    assert len(selector.given) == 2
    selector.given = []
    trainer(callback, max_epochs=-1, max_steps=4).fit(Classifier(), loader(ids=False))
    assert len(selector.given) == 1


def test_what_is_kept_is_logged_once_for_every_selection(tmp_path):
    logger = CSVLogger(tmp_path)
    callback = InstanceSelection(selector=Smallest(), warmup_epochs=1, every_n_epochs=1)
    trainer(callback, max_epochs=3, logger=logger, log_every_n_steps=2).fit(Classifier(), loader(ids=False))
    names, *lines = [line.split(",") for line in Path(logger.log_dir, "metrics.csv").read_text().split()]
    table = [dict(zip(names, line, strict=True)) for line in lines]
    kept = [row for row in table if row["instances/kept"]]
    assert [(row["step"], row["instances/kept"], row["instances/kept_fraction"]) for row in kept] == [
        ("9", "16.0", "0.25"),
        ("11", "16.0", "0.25"),
    ]


# ---------------------------------------------------------------------- the command line


def parse(capsys, *arguments):
    from lightning.pytorch.cli import LightningCLI

    with pytest.raises(SystemExit):
        LightningCLI(Classifier, args=["fit", *arguments, "--print_config"], save_config_callback=None)
    (callback,) = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"]
    return callback


def test_a_selector_comes_through_the_command_line(capsys, tmp_path, monkeypatch):
    """A class with no base class, wherever it can be imported."""
    from lightning.pytorch.cli import LightningCLI

    monkeypatch.setattr(curation.instances, "Something", EverySecond, raising=False)
    for path in ("stand_ins.EverySecond", "curation.instances.Something"):
        init = {"selector": {"class_path": path, "init_args": {"start": 1}}, "every_n_epochs": 2}
        callback = {"class_path": "curation.callbacks.InstanceSelection", "init_args": init}
        config = tmp_path / "config.yaml"
        config.write_text(yaml.safe_dump({"trainer": {"callbacks": [callback]}}))
        printed = parse(capsys, f"--config={config}")
        assert printed["init_args"]["selector"] == init["selector"]
        config.write_text(yaml.safe_dump({"trainer": {"callbacks": [printed]}}))
        assert parse(capsys, f"--config={config}") == printed
        cli = LightningCLI(Classifier, args=[f"--config={config}"], run=False, save_config_callback=None)
        (made,) = [c for c in cli.trainer.callbacks if isinstance(c, InstanceSelection)]
        assert (type(made.selector), made.selector.start, made.every_n_epochs) == (EverySecond, 1, 2)
    add = ["--trainer.callbacks+=InstanceSelection", "--trainer.callbacks.selector=stand_ins.EverySecond"]
    printed = parse(capsys, *add, "--trainer.callbacks.selector.start=3")
    assert printed["init_args"]["selector"]["init_args"] == {"start": 3}
