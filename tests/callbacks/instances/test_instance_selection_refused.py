"""What cannot be selected from is named, and nothing is left behind."""

import numpy as np
import pytest
from helpers import Classifier, data, loader, trainer
from instance_runs import Stream, Unlabelled, X, Y, saved, unlike
from lightning.pytorch import LightningDataModule
from stand_ins import EverySecond, Fails
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
)

from curation.callbacks import ExactResume, InstanceSelection, SelectedDataModule
from curation.instances.selection_index import fingerprint
from curation.samplers.hard_batches import HardBatchSampler


@pytest.fixture(autouse=True)
def folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Argument `index` must be given or else `selector`, but got None and None"),
        ({"index": "a", "selector": EverySecond()}, "Argument `index` must be given or else `selector`, but got 'a'"),
        ({"index": "a", "warmup_epochs": 1}, "Argument `selector` must be given for `layer`"),
        ({"index": "a", "layer": "net"}, "Argument `selector` must be given for `layer`"),
        ({"selector": EverySecond(), "warmup_epochs": -1}, "`warmup_epochs` must be an integer >= 0, but got -1"),
        ({"selector": EverySecond(), "warmup_epochs": 0.5}, "`warmup_epochs` must be an integer >= 0, but got 0.5"),
        ({"selector": EverySecond(), "warmup_epochs": True}, "`warmup_epochs` must be an integer >= 0, but got True"),
        ({"selector": EverySecond(), "every_n_epochs": 0}, "`every_n_epochs` must be .* or None, but got 0"),
        ({"selector": EverySecond(), "every_n_epochs": True}, "`every_n_epochs` must be .* or None, but got True"),
        ({"selector": EverySecond(), "layer": 3}, "`layer` must be a string or None, but got 3"),
        ({"index": 3}, "`index` must be a path, integers, a mask, a fitted selector or an index, but got 3"),
        ({"index": EverySecond()}, "`index` must be fitted, with `sample_indices_`, but got"),
    ],
)
def test_a_bad_argument_is_named_with_its_value(arguments, message):
    with pytest.raises(ValueError, match=message):
        InstanceSelection(**arguments)


def test_an_index_of_other_data_is_refused_or_warned_of():
    for size, path in ((65, saved("other", of=65)), (128, saved("double", of=128))):
        with pytest.raises(ValueError, match=f"`index` must be of the 64 training samples, but got '.*' of {size}"):
            trainer(InstanceSelection(path)).fit(Classifier(), loader())
    with pytest.raises(ValueError, match="there is no such file: 'nowhere'"):
        trainer(InstanceSelection("nowhere")).fit(Classifier(), loader())
    path = saved(fingerprint=fingerprint(data(seed=2)))
    with pytest.warns(UserWarning, match="The index was made of other samples"):
        trainer(InstanceSelection(path), max_epochs=1).fit(Classifier(), loader())


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
    with pytest.raises(TypeError, match="Name the one that it is for in the attribute `curated_loader`"):
        trainer(InstanceSelection(saved())).fit(Classifier(), {"a": loader(), "b": loader(n=32)})


def test_a_data_loader_of_fewer_samples_in_the_next_epoch_is_refused():
    class Shrinks(Classifier):
        def train_dataloader(self):
            return loader(n=64 if self.trainer.current_epoch == 0 else 32)

    with pytest.raises(ValueError, match=r"one training data loader, .*: 64 before, and now 32"):
        trainer(InstanceSelection(saved()), reload_dataloaders_every_n_epochs=1, max_epochs=2).fit(Shrinks())


def test_overfitting_batches_is_refused():
    with pytest.raises(ValueError, match="overfit_batches"):
        trainer(InstanceSelection(saved()), overfit_batches=2).fit(Classifier(), loader(shuffle=False))


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


def test_a_selection_that_makes_no_batch_is_named():
    with pytest.raises(ValueError, match="keeps 32 samples, which with `drop_last` make no batch of 40"):
        trainer(InstanceSelection(selector=EverySecond())).fit(
            Classifier(), DataLoader(data(), 40, shuffle=True, drop_last=True)
        )


def test_a_selector_without_an_outcome_is_named():
    class Sampler:
        def fit(self, X, y):
            pass

    with pytest.raises(TypeError, match="`selector` must have `sample_indices_` after `fit`, but Sampler has not"):
        trainer(InstanceSelection(selector=Sampler())).fit(Classifier(), loader(ids=False))


def test_a_layer_that_is_not_there_is_an_error():
    with pytest.raises(AttributeError, match="nowhere"):
        trainer(InstanceSelection(selector=EverySecond(), layer="nowhere")).fit(Unlabelled(), loader())
