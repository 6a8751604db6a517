"""The record of a fit, against the logits of its steps."""

import numpy as np
import pytest
import torch
from helpers import Classifier, LanguageModel, data, loader, texts, trainer
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback
from processes import TwoRanks
from torch.utils.data import DataLoader

from curation.batch import SampleIds
from curation.callbacks import (
    DynamicDataPruning,
    HardSampleSelection,
    SampleRecord,
    TrainingDynamics,
    UniformSelection,
    WeightedLoss,
)
from curation.instances.selection_index import fingerprint
from curation.records import SampleDynamics
from curation.samplers import DynamicDataPruningSampler


class Remembers(Classifier):
    """The logits of every row that was trained on, by the row itself."""

    def __init__(self):
        super().__init__()
        self.logits = {}

    def forward(self, x):
        logits = super().forward(x)
        if torch.is_grad_enabled():
            for row, values in zip(x, logits.detach(), strict=True):
                self.logits.setdefault(tuple(row.tolist()), []).append(values)
        return logits


def check(dynamics: SampleDynamics, module: Remembers, samples) -> None:
    """The record equals the moments of the logits of the training steps."""
    for i, (x, y) in enumerate(samples):
        visits = module.logits.get(tuple(x.tolist()), [])
        assert dynamics["visits"][i] == len(visits)
        if not visits:
            continue
        logits = torch.stack(visits)
        others = logits.clone()
        others[:, y] = -torch.inf
        margins = logits[:, y] - others.max(1).values
        losses = -logits.log_softmax(1)[:, y]
        assert dynamics["margin"][i] == pytest.approx(float(margins.mean()), abs=1e-5)
        assert dynamics["margin_deviation"][i] == pytest.approx(float(margins.std(correction=0)), abs=1e-4)
        assert dynamics["loss"][i] == pytest.approx(float(losses.mean()), abs=1e-5)
        assert dynamics["last_loss"][i] == pytest.approx(float(losses[-1]), abs=1e-5)
        assert dynamics["right"][i] == int((margins > 0).sum())
        assert dynamics["label"][i] == int(y)


@pytest.mark.parametrize("selection", [None, *(lambda k=k: HardSampleSelection(keep=k) for k in (0.25, 1.0))])
@pytest.mark.parametrize("first", [True, False])
def test_the_record_is_of_the_rows_that_were_trained_on(selection, first, tmp_path):
    dynamics, module = TrainingDynamics(tmp_path / "record.parquet"), Remembers()
    others = [] if selection is None else [selection()]
    trainer(*([dynamics, *others] if first else [*others, dynamics]), max_epochs=3).fit(module, loader())
    record = SampleDynamics.load(tmp_path / "record.parquet")
    check(record, module, data())
    assert record["visits"].sum() == sum(module.seen)
    assert record.fingerprint == fingerprint(data())


@pytest.mark.parametrize("ids", [True, False])
def test_it_stands_beside_dynamic_pruning_which_knows_the_samples(ids, tmp_path):
    samples = SampleIds(data()) if ids else data()
    rounds = DynamicDataPruningSampler(samples, 8, "random", prune=0.5, anneal=1.0)  # of whole batches
    batches = DataLoader(samples, 8, sampler=rounds)
    dynamics, record, module = TrainingDynamics(tmp_path / "record.parquet"), SampleRecord(), Remembers()
    trainer(DynamicDataPruning(), dynamics, record, max_epochs=3).fit(module, batches)
    check(SampleDynamics.load(dynamics.path), module, data())
    assert torch.equal(dynamics.store.visits, record.store.seen)
    torch.testing.assert_close(dynamics.store.last_loss, record.store.scores)
    assert len(set(dynamics.store.visits.tolist())) > 1


def test_sequences_have_means_and_the_place_of_the_worst_token(tmp_path):
    dynamics, samples = TrainingDynamics(tmp_path / "record.parquet"), texts(16)
    module = LanguageModel()  # learns nothing
    trainer(UniformSelection(keep=0.5), dynamics, max_epochs=4).fit(module, DataLoader(SampleIds(samples), 8))
    record = SampleDynamics.load(dynamics.path)
    assert record.kind == "sequences"
    for i in np.flatnonzero(record["visits"]).tolist():
        labels = samples[i]["labels"][1:]
        with torch.no_grad():
            output = module.model(samples[i]["input_ids"][None], samples[i]["attention_mask"][None])
        chances = output.logits[0, :-1].softmax(1).gather(1, labels.clamp(min=0)[:, None])[:, 0][labels >= 0]
        assert record["probability"][i] == pytest.approx(float(chances.mean()), abs=1e-5)
        assert record["loss"][i] == pytest.approx(float(-chances.log().mean()), abs=1e-4)
        assert record["worst"][i] == int(chances.argmin())


class LeavesLosses(Classifier):
    def __init__(self):
        super().__init__()
        self.sample_losses = None

    def training_step(self, batch, batch_idx):
        self.seen.append(len(batch[0]))
        self.sample_losses = (self(batch[0])[:, 0] - batch[1]).square()
        return self.sample_losses.mean()


def test_of_a_module_that_leaves_its_losses_only_these_are_known(tmp_path):
    dynamics = TrainingDynamics(tmp_path / "record.parquet")
    trainer(dynamics).fit(LeavesLosses(), loader())
    record = SampleDynamics.load(dynamics.path)
    assert record.kind == "losses"
    assert np.isfinite(record["loss"]).all()
    assert np.isnan(record["margin"]).all()


class NoLogits(Classifier):
    def training_step(self, batch, batch_idx):
        self.seen.append(len(batch[0]))
        return self.net(batch[0]).square().mean()


@pytest.mark.parametrize("selection", [[], [UniformSelection(keep=0.5)]])
def test_steps_that_show_no_logits_are_refused(selection, tmp_path):
    with pytest.raises(TypeError, match=r"`NoLogits.training_step` shows no losses .* attribute `sample_losses`"):
        trainer(*selection, TrainingDynamics(tmp_path / "record.parquet")).fit(NoLogits(), loader())


class Skips(Remembers):
    def training_step(self, batch, batch_idx):
        return None if batch_idx == 1 else super().training_step(batch, batch_idx)


def test_a_step_that_skips_its_batch_enters_nothing(tmp_path):
    dynamics, module = TrainingDynamics(tmp_path / "record.parquet"), Skips()
    trainer(dynamics, max_epochs=1).fit(module, loader(shuffle=False))
    check(SampleDynamics.load(dynamics.path), module, data())
    assert dynamics.store.visits[8:16].tolist() == [0] * 8


class Stop(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 5:
            raise InterruptedError


def test_an_interruption_writes_what_is_known(tmp_path):
    dynamics, module = TrainingDynamics(tmp_path / "folder" / "record.parquet"), Remembers()
    with pytest.raises(InterruptedError):
        trainer(Stop(), dynamics).fit(module, loader())
    record = SampleDynamics.load(dynamics.path)
    assert record["visits"].sum() == 40
    check(record, module, data())


def test_every_epoch_is_written_where_asked_for(tmp_path):
    dynamics = TrainingDynamics(tmp_path / "record.parquet", every_epoch=True)
    trainer(dynamics, max_epochs=3).fit(Classifier(), loader())
    files = sorted(file.name for file in tmp_path.iterdir())
    assert files == ["record-epoch=0.parquet", "record-epoch=1.parquet", "record-epoch=2.parquet", "record.parquet"]
    for epoch, file in enumerate(files[:3]):
        assert SampleDynamics.load(tmp_path / file)["visits"].tolist() == [epoch + 1] * 64


def test_without_ids_or_a_file_to_write_the_fit_does_not_begin(tmp_path):
    module = Classifier()
    for ids, path, error, message in (
        (False, tmp_path / "record.parquet", TypeError, "TrainingDynamics needs sample ids: wrap the training data"),
        (True, tmp_path, ValueError, "Argument `path` must name a file, but got .*: that is a folder"),
    ):
        with pytest.raises(error, match=message):
            trainer(TrainingDynamics(path)).fit(module, loader(ids=ids))
    with pytest.raises(ValueError, match=r"Argument `size` must be more than every sample id, but \d+ >= 2"):
        trainer(TrainingDynamics(tmp_path / "record.parquet", size=2)).fit(module, loader())
    assert not (tmp_path / "record.parquet").exists()


def test_it_changes_nothing_in_training(tmp_path):
    weights = []
    for callbacks in ([], [TrainingDynamics(tmp_path / "record.parquet")]):
        torch.manual_seed(3)
        module = Classifier()
        trainer(*callbacks).fit(module, loader(ids=bool(callbacks)))
        weights.append(module.state_dict())
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name])


class WithWeights(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, i):
        return (*data()[i], float(i % 3))


def test_weights_of_rows_do_not_change_the_record(tmp_path):
    dynamics, module = TrainingDynamics(tmp_path / "record.parquet"), Remembers()
    batches = DataLoader(SampleIds(WithWeights()), 8)
    trainer(WeightedLoss(2), dynamics).fit(module, batches)
    check(SampleDynamics.load(dynamics.path), module, data())


def fit_ranks(arguments):
    """Batches of each rank of its own; the record and what the rank's module saw."""
    path, batches = arguments
    dynamics, module = TrainingDynamics(path), Remembers()
    mine = DataLoader(SampleIds(data()), batch_sampler=batches)
    run = trainer(dynamics, strategy="ddp", devices=2, max_epochs=1, use_distributed_sampler=False)
    run.fit(module, mine)
    return dynamics.store.state_dict(), module.logits


@pytest.fixture(scope="module")
def ranks():
    ranks = TwoRanks()
    yield ranks
    ranks.stop()


batch = st.lists(st.integers(0, 63), min_size=2, max_size=5, unique=True)


@settings(max_examples=8, deadline=None)
@given(steps=st.lists(st.tuples(batch, batch), min_size=1, max_size=5))
def test_two_ranks_have_the_record_of_all_rows(ranks, steps, tmp_path_factory):
    path = tmp_path_factory.mktemp("ranks") / "record.parquet"
    (one, seen), (other, also) = ranks.ask(fit_ranks, *[(path, [step[rank] for step in steps]) for rank in (0, 1)])
    assert repr(one) == repr(other)
    module = Remembers()
    for i, (x, _) in enumerate(data()):  # a sample of both ranks in one step is entered once, from the first
        key = tuple(x.tolist())
        queues = [list(seen.get(key, [])), list(also.get(key, []))]
        for step in steps:
            drawn = [queues[rank].pop(0) for rank in (0, 1) if i in step[rank]]
            if drawn:
                module.logits.setdefault(key, []).append(drawn[0])
    check(SampleDynamics.load(path), module, data())
