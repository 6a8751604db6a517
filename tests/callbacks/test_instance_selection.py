"""A fit on a part of the samples: which, when, and that nothing else changes."""

import copy
import io
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from curation.callbacks import ExactResume, InstanceSelection, SelectedDataModule, SelectionLedger, UniformSelection
from helpers import Classifier, LanguageModel, Watch, assert_same_weights, data, loader, texts, trainer, weights
from lightning.pytorch import Callback, LightningDataModule, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.model_helpers import is_overridden
from stand_ins import EverySecond, Everything, Fails, Smallest
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    default_collate,
)

import curation.instances
from curation.batch import SampleIds
from curation.instances.selection_index import SelectionIndex, fingerprint
from curation.records.ledger import Ledger
from curation.samplers.hard_batches import HardBatchSampler
from curation.samplers.subset import SubsetSampler

X, Y = data().tensors


class Rows(Watch):
    """Which samples every epoch was trained on, and how many batches were validated."""

    def __init__(self):
        super().__init__()
        self.epochs: list[list[int]] = []
        self.validated: list[int] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0 or not self.epochs:  # or resumed within one
            self.epochs.append([])
            self.validated.append(0)
        self.epochs[-1] += which(batch[0])

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if not trainer.sanity_checking:
            self.validated[-1] += 1


def which(x):
    return [int((X[:, 0] == value).nonzero()) for value in x[:, 0].cpu()]


def saved(path="kept.parquet", indices=range(3, 64, 3), of=64, **changes):
    indices = np.asarray(indices)
    SelectionIndex(indices, np.zeros(len(indices)), np.arange(len(indices)), of, **changes).save(path)
    return str(path)


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


@pytest.mark.parametrize("sampler", ["sequential", "distributed"])
def test_an_order_that_was_not_shuffled_is_not(sampler):
    how = None if sampler == "sequential" else DistributedSampler(data(), 1, 0, shuffle=False)
    rows = Rows()
    run = trainer(InstanceSelection(saved()), rows, max_epochs=1)
    run.fit(Classifier(), DataLoader(data(), 8, sampler=how))
    assert rows.epochs == [list(range(3, 64, 3))]


def test_a_batch_sampler_of_the_users_own_may_be_given():
    rows, own = Rows(), BatchSampler(RandomSampler(data()), 5, drop_last=True)
    batches = DataLoader(data(), batch_sampler=own)
    before = own.sampler, batches.sampler
    trainer(InstanceSelection(selector=EverySecond()), rows, max_epochs=1).fit(Classifier(), batches)
    assert len(rows.epochs[0]) == 30
    assert not [i for i in rows.epochs[0] if i % 2]
    assert (own.sampler, batches.sampler) == before


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
    own, rows = SubsetSampler(data(), range(40, 10, -1), seed=3), Rows()
    batches = DataLoader(data(), 8, sampler=own)
    selector = EverySecond(start=1)
    trainer(InstanceSelection(selector=selector, warmup_epochs=1), rows).fit(Classifier(), batches)
    np.testing.assert_array_equal(selector.given[0][0], X[11:41])
    assert [sorted(epoch) for epoch in rows.epochs] == [list(range(11, 41)), list(range(12, 41, 2))]
    assert batches.sampler is batches.batch_sampler.sampler is own
    assert own.indices.tolist() == list(range(40, 10, -1))
    with pytest.raises(ValueError, match="`index` must hold samples of the loader's SubsetSampler only"):
        trainer(InstanceSelection(saved())).fit(Classifier(), batches)


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
    found = [dict(zip(names, line, strict=True)) for line in lines]
    kept = [row for row in found if row["instances/kept"]]
    assert [(row["step"], row["instances/kept"], row["instances/kept_fraction"]) for row in kept] == [
        ("9", "16.0", "0.25"),
        ("11", "16.0", "0.25"),
    ]


# ---------------------------------------------------------------------- resuming


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
        resumed, _, again, other, selected = fit(tmp_path / "again", file, seed=77, first=first, **place)
        assert again == seen[8 * step :]
        assert_same_weights(whole, resumed)
        assert repr(other.state_dict()) == repr(callback.state_dict())
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


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Argument `index` must be given or else `selector`, but got None and None"),
        ({"index": "a", "selector": EverySecond()}, "Argument `index` must be given or else `selector`, but got 'a'"),
        ({"index": "a", "warmup_epochs": 1}, "Argument `selector` must be given for `layer`"),
        ({"index": "a", "layer": "net"}, "Argument `selector` must be given for `layer`"),
        ({"selector": EverySecond(), "warmup_epochs": -1}, "`warmup_epochs` must be an integer >= 0, but got -1"),
        ({"selector": EverySecond(), "warmup_epochs": 0.5}, "`warmup_epochs` must be an integer >= 0, but got 0.5"),
        ({"selector": EverySecond(), "every_n_epochs": 0}, "`every_n_epochs` must be .* or None, but got 0"),
    ],
)
def test_a_bad_argument_is_named_with_its_value(arguments, message):
    with pytest.raises(ValueError, match=message):
        InstanceSelection(**arguments)


def test_an_index_of_other_data_is_refused_or_warned_of():
    for of, path in ((65, saved("other", of=65)), (128, saved("double", of=128))):
        with pytest.raises(ValueError, match=f"`index` must be of the 64 training samples, but got '.*' of {of}"):
            trainer(InstanceSelection(path)).fit(Classifier(), loader())
    with pytest.raises(ValueError, match="there is no such file: 'nowhere'"):
        trainer(InstanceSelection("nowhere")).fit(Classifier(), loader())
    path = saved(fingerprint=fingerprint(data(seed=2)))
    with pytest.warns(UserWarning, match="The index was made of other samples"):
        trainer(InstanceSelection(path), max_epochs=1).fit(Classifier(), loader())


class Stream(IterableDataset):
    def __iter__(self):
        return iter([data()[i] for i in range(64)])


class Own(BatchSampler):
    pass


REFUSED = {
    "stream": (lambda: DataLoader(Stream(), 8), "map-style `DataLoader`, but not of Stream"),
    "list": (lambda: range(3), "map-style `DataLoader`, but not of range"),
    "custom": (
        lambda: DataLoader(data(), 8, sampler=HardBatchSampler(data(), 8)),
        "HardBatchSampler in BatchSampler",
    ),
    "subset": (lambda: DataLoader(data(), 8, sampler=SubsetRandomSampler([1, 2])), "SubsetRandomSampler in Batch"),
    "replaced": (lambda: DataLoader(data(), 8, sampler=RandomSampler(data(), replacement=True)), "RandomSampler in"),
    "some": (lambda: DataLoader(data(), 8, sampler=RandomSampler(data(), num_samples=9)), "RandomSampler in Batch"),
    "batches": (lambda: DataLoader(data(), batch_sampler=Own(SequentialSampler(data()), 8, False)), "in Own"),
    "no batching": (lambda: DataLoader([tuple(t[:8] for t in (X, Y))], None), "in NoneType"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_data_loaders_are_refused(kind):
    make, message = REFUSED[kind]
    with pytest.raises(TypeError, match=message):
        trainer(InstanceSelection(saved())).fit(Classifier(), make())

    inner = LightningDataModule()
    inner.train_dataloader = make
    with pytest.raises(TypeError, match=message):  # not in a fit: Lightning leaves DataLoader patched after an error
        SelectedDataModule(inner, saved()).train_dataloader()


def test_several_data_loaders_are_refused():
    with pytest.raises(TypeError, match="one training data loader, but got 2"):
        trainer(InstanceSelection(saved())).fit(Classifier(), {"a": loader(), "b": loader()})
    with pytest.raises(ValueError, match=r"one training data loader, .*: 64 before, and now 32"):
        trainer(InstanceSelection(saved())).fit(Classifier(), {"a": loader(), "b": loader(n=32)})


def test_overfitting_batches_is_refused():
    with pytest.raises(ValueError, match="overfit_batches"):
        trainer(InstanceSelection(saved()), overfit_batches=2).fit(Classifier(), loader(shuffle=False))


class Unlabelled(Classifier):
    def training_step(self, batch, batch_idx):
        raise AssertionError("trained")


def unlike(change):
    return DataLoader(data(), 8, collate_fn=lambda samples: change(*default_collate(samples)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: x, "the labels of a Tensor are NoneType"),
        (lambda x, y: {"x": x}, "the labels of a dict are NoneType"),
        (lambda x, y: (x, y.float()), r"the labels of a tuple are torch.float32 \[8\]"),
        (lambda x, y: {"x": x, "labels": y[:, None]}, r"the labels of a dict are torch.int64 \[8, 1\]"),
        (lambda x, y: (x, y, y), "the labels of a tuple are NoneType"),
        (lambda x, y: {"x": x, "mask": x > 0, "y": y}, "`layer` must be given where the inputs"),
        (lambda x, y: ({"x": x}, y), "`layer` must be given where the inputs"),
    ],
)
def test_batches_without_labels_or_inputs_are_named(change, message):
    with pytest.raises(TypeError, match=message):
        trainer(InstanceSelection(selector=EverySecond())).fit(Unlabelled(), unlike(change))


def test_a_collate_function_that_drops_rows_is_named():
    with pytest.raises(ValueError, match=r"batch of 8 samples must have as many features and labels .* has 5 and 5"):
        trainer(InstanceSelection(selector=EverySecond())).fit(Unlabelled(), unlike(lambda x, y: (x[:5], y[:5])))


class Odd(EverySecond):
    def __init__(self, indices):
        super().__init__()
        self.indices = indices

    def fit(self, X, y):
        self.sample_indices_ = np.asarray(self.indices)


@pytest.mark.parametrize("indices", [[], [64], [-1, 3], [0.5], [True]])
def test_a_selector_that_gives_rubbish_is_named(indices):
    with pytest.raises(ValueError, match=r"`Odd.sample_indices_` must hold integers in \[0, 64\), but holds"):
        trainer(InstanceSelection(selector=Odd(indices))).fit(Unlabelled(), loader())


def test_nothing_is_left_behind_by_a_selector_that_fails():
    batches, module = loader(), Classifier()
    before = batches.sampler, batches.batch_sampler
    run = trainer(InstanceSelection(selector=Fails(), layer="net.0"), ExactResume())
    with pytest.raises(ArithmeticError, match="no selection"):
        run.fit(module, batches)
    assert (batches.sampler, batches.batch_sampler) == before
    assert batches.batch_sampler.sampler is batches.sampler
    assert not module.net[0]._forward_hooks
    assert module.net[1].training
    assert not {"log", "log_dict"} & set(vars(module))
    assert "batch_to_device" not in vars(run.strategy)
    assert not run.validating


def test_a_layer_that_is_not_there_is_an_error():
    with pytest.raises(AttributeError, match="nowhere"):
        trainer(InstanceSelection(selector=EverySecond(), layer="nowhere")).fit(Unlabelled(), loader())


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


# ---------------------------------------------------------------------- a data module


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
    with pytest.raises(ValueError, match="there is no such file: 'nowhere'"):
        SelectedDataModule(Data(), "nowhere")
    with pytest.raises(ValueError, match="`index` must be of the 64 training samples, but got 'other' of 65"):
        SelectedDataModule(Data(), saved("other", of=65)).train_dataloader()
    with pytest.warns(UserWarning, match="The index was made of other samples"):
        SelectedDataModule(Data(), saved(fingerprint="other")).train_dataloader()
    module = SelectedDataModule(Data(), saved())
    module.trainer = trainer(overfit_batches=2)
    with pytest.raises(ValueError, match="overfit_batches"):
        module.train_dataloader()


def test_a_data_module_comes_through_the_command_line():
    from lightning.pytorch.cli import LightningCLI

    inner = {"class_path": "lightning.pytorch.demos.boring_classes.BoringDataModule"}
    init = {"datamodule": inner, "index": saved()}
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


# ---------------------------------------------------------------------- two processes

RANKS = ("ddp", "fsdp2")


class Ranked(Classifier):
    """Learns nothing: a sample that fills up the last batch would make the ranks differ from one process."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Sharded(Ranked):
    """The root is sharded, so that its layers must not run without it."""

    def configure_model(self):
        from torch.distributed.fsdp import fully_shard

        mesh = self.device_mesh["data_parallel"]
        fully_shard(self.net, mesh=mesh)
        fully_shard(self, mesh=mesh)


def select_on(rank_or_none, strategy):
    seed_everything(7, verbose=False)
    rows, selector = Rows(), Smallest()
    module = (Sharded if strategy == "fsdp2" else Ranked)()
    callback = InstanceSelection(selector=selector, layer="net.0", warmup_epochs=1, every_n_epochs=1)
    options = {} if rank_or_none is None else {"devices": 2, "strategy": strategy}
    if strategy == "fsdp2":
        from lightning.pytorch.strategies import ModelParallelStrategy

        options["strategy"] = ModelParallelStrategy(2, 1)
    size = 16 if rank_or_none is None else 8
    run = trainer(callback, ExactResume(), rows, max_epochs=3, **options)
    run.fit(module, DataLoader(Subset(data(), range(63)), size, shuffle=True))
    return {"epochs": rows.epochs, "given": selector.given, "state": callback.state_dict()}


def main(folder):
    """One of two processes."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    for strategy in RANKS:
        torch.save(select_on(rank, strategy), Path(folder, f"{strategy}-{rank}.pt"))
    errors = {}
    for name, callback, options in (
        ("selector", InstanceSelection(selector=Fails()), {}),
        ("sampler", InstanceSelection(selector=EverySecond()), {"use_distributed_sampler": False}),
        ("stream", InstanceSelection(selector=EverySecond()), {}),
    ):
        run = trainer(callback, devices=2, strategy="ddp", **options)
        try:
            run.fit(Ranked(), DataLoader(Stream(), 8) if name == "stream" else loader(ids=False))
        except (ArithmeticError, RuntimeError, TypeError) as error:
            errors[name] = repr(error)

    class Labels(Unlabelled):
        """Only the second process meets a bad label."""

        def on_before_batch_transfer(self, batch, dataloader_idx):
            return batch if rank == 0 else (batch[0], batch[1].float())

    try:
        trainer(InstanceSelection(selector=EverySecond()), devices=2, strategy="ddp").fit(Labels(), loader(ids=False))
    except (RuntimeError, TypeError) as error:
        errors["pass"] = repr(error)
    torch.save(errors, Path(folder, f"errors-{rank}.pt"))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    environment = {**os.environ, "TORCHELASTIC_RUN_ID": "instances", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    environment |= {"GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parent.parent)
    started = [
        subprocess.Popen(
            [sys.executable, __file__, folder], env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        )
        for rank in (0, 1)
    ]
    try:
        assert [process.wait(120) for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()
    return folder


@pytest.mark.parametrize("strategy", RANKS)
def test_two_ranks_select_and_train_as_one_process(ranks, strategy):
    one, other = (torch.load(ranks / f"{strategy}-{rank}.pt", weights_only=False) for rank in (0, 1))
    expected = select_on(None, "auto")
    assert len(one["given"]) == 2
    assert other["given"] == []  # only the first process selects
    for (features, labels), (theirs, same) in zip(one["given"], expected["given"], strict=True):
        np.testing.assert_allclose(features, theirs, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(labels, same)
    assert repr(one["state"]) == repr(other["state"])
    for key in ("indices", "selected_for", "samples"):
        assert repr(one["state"][key]) == repr(expected["state"][key])
    assert [len(epoch) for epoch in one["epochs"]] == [32, 8, 8]  # of 63 and 15
    for mine, theirs, whole in zip(one["epochs"], other["epochs"], expected["epochs"], strict=True):
        both = [i for pair in zip(mine, theirs, strict=True) for i in pair]
        assert both == [*whole, whole[0]]


def test_an_error_on_one_rank_is_raised_on_all(ranks):
    one, other = (torch.load(ranks / f"errors-{rank}.pt") for rank in (0, 1))
    elsewhere = "failed on another process"
    assert "ArithmeticError('no selection')" in one["selector"]
    assert elsewhere in other["selector"]
    assert elsewhere in one["pass"]
    assert "the labels of a" in other["pass"]
    for errors in (one, other):
        assert "divided between all 2 processes" in errors["sampler"]
        assert "but not of Stream" in errors["stream"]


if __name__ == "__main__":
    main(sys.argv[1])
