"""Several training data loaders: the one that is named is curated, the others pass."""

from functools import partial
from itertools import chain

import pytest
import torch
import torch.nn.functional as F
from helpers import Classifier, assert_same_weights, data, loader, trainer, weights
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from processes import TwoRanks
from torch.utils.data import DataLoader, Dataset

from curation.callbacks import (
    ExactResume,
    HardSampleSelection,
    InstanceSelection,
    SampleRecord,
    SelectionLedger,
    UniformSelection,
)
from curation.records import Ledger
from curation.sample_ids import SampleIds


class Pairs(Classifier):
    """Learns of both parts; the rows of each are remembered."""

    def __init__(self, curated="a", weight=1.0):
        super().__init__()
        self.rows, self.weight = [], weight
        if curated is not None:
            self.curated_loader = curated

    def training_step(self, batch, batch_idx):
        parts = list(batch.values()) if isinstance(batch, dict) else batch
        self.rows.append([None if part is None else part[0][:, 0].tolist() for part in parts])
        losses = [F.cross_entropy(self(x), y) for x, y in (part for part in parts if part is not None)]
        return losses[0] + self.weight * sum(losses[1:]) if self.weight else losses[0]


class One(Pairs):
    def training_step(self, batch, batch_idx):
        return super().training_step({"a": batch}, batch_idx)


def own_order(n=64, size=8, seed=5):
    return DataLoader(SampleIds(data(n)), size, shuffle=True, generator=torch.Generator().manual_seed(seed))


def other(seed=6):
    """More samples than the record of the curated loader has rows for."""
    return DataLoader(SampleIds(data(100, seed=2)), 4, shuffle=True, generator=torch.Generator().manual_seed(seed))


CONTAINERS = {
    "dict": ("a", lambda: {"a": own_order(), "b": other()}, 0),
    "second of a dict": ("a", lambda: {"b": other(), "a": own_order()}, 1),
    "list": (1, lambda: [other(), own_order()], 1),
    "CombinedLoader": ("a", lambda: CombinedLoader({"a": own_order(), "b": other()}, "min_size"), 0),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_the_named_loader_is_curated_as_if_it_were_alone(tmp_path, container):
    """Rows kept, record and ledger; of the other loader every row is trained on, without its ids."""
    name, make, place = CONTAINERS[container]

    def run(module, batches, folder):
        seed_everything(3, verbose=False)
        callbacks = [HardSampleSelection(keep=0.25), SampleRecord(), SelectionLedger(folder)]
        trainer(*callbacks, max_epochs=1, limit_train_batches=8).fit(module, batches)
        store = {name: repr(value) for name, value in callbacks[1].store.state_dict().items()}
        return module.rows, store, Ledger(folder).rows().to_pylist()

    class Frozen(Pairs):  # scores do not depend on what the other loader trains
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    class FrozenOne(Frozen, One):
        pass

    frozen, alone = Frozen(name), FrozenOne(None)
    for module in (frozen, alone):
        module.net[1].momentum = 0.0  # nor do the statistics of BatchNorm
    both, store, ledger = run(frozen, make(), tmp_path / "both")
    one, expected, rows = run(alone, own_order(), tmp_path / "one")
    assert [step[place] for step in both] == [step[0] for step in one]
    assert {len(step[1 - place]) for step in both} == {4}
    assert store == expected
    assert repr(ledger) == repr(rows)
    assert len(rows) == 64


class Augmented(Dataset):
    """Draws from the stream of the process that loads it."""

    def __init__(self, n):
        self.samples = data(n)

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        x, y = self.samples[i]
        return x + torch.rand(()) * torch.arange(8.0), y  # the first column names the sample


MODES = {"max_size_cycle": 8, "min_size": 3, "max_size": 8}


def fit_of_two(curated, mode, resume=None, folder=None, **options):
    """Rows and weights of two epochs of 8 and of 3 batches in each of one process."""
    alone = "strategy" not in options  # Lightning draws the order of several processes by the seed of the environment
    seed_everything(77 if resume and alone else 1, verbose=False)
    parts = {"a": DataLoader(Augmented(64), 8, shuffle=True), "b": DataLoader(Augmented(9), 3, shuffle=True)}
    module, callbacks = Pairs(curated), [ExactResume()]
    callbacks += [UniformSelection(keep=0.5)] if curated else []
    callbacks += [ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)] if folder else []
    fit = trainer(*callbacks, max_epochs=2, enable_checkpointing=folder is not None, **options)
    fit.fit(module, CombinedLoader(parts, mode), ckpt_path=resume)
    return module.rows, weights(module)


def on_a_rank(given):
    rows, values = fit_of_two("a", "max_size_cycle", *given, strategy="ddp", devices=2)
    return rows, {name: value.tolist() for name, value in values.items()}


def test_two_ranks_go_on_where_they_were(tmp_path):
    ranks = TwoRanks()
    whole = ranks.ask(on_a_rank, *[(None, tmp_path)] * 2)
    resumed = ranks.ask(on_a_rank, *[(tmp_path / "step=3.ckpt", None)] * 2)  # the shorter ended after 2
    ranks.stop()
    for (rows, values), (again, got) in zip(whole, resumed, strict=True):
        assert len(rows) == 8
        assert again == rows[3:]
        assert got == values
    assert whole[0][0] != whole[1][0]


@pytest.mark.parametrize("curated", [None, "a", "b"])
@pytest.mark.parametrize("mode", MODES)
def test_every_loader_goes_on_where_it_was(tmp_path, mode, curated):
    """Of 8 and of 3 batches, at every step of two epochs; the shorter begins again with another order."""

    run = partial(fit_of_two, curated, mode)
    whole, expected = run(folder=tmp_path)
    assert len(whole) == 2 * MODES[mode]
    a, b = ([step[part] for step in whole] for part in (0, 1))
    assert a[:3] != b[:3]
    if mode == "max_size_cycle" and curated != "b":  # which trains on half of each batch
        assert set(chain(*b[:3])) == set(chain(*b[3:6]))
        assert b[:3] != b[3:6]
    for step in range(1, len(whole)):
        rows, got = run(tmp_path / f"step={step}.ckpt")
        assert rows == whole[step:]
        assert_same_weights(expected, got)


def test_instances_are_selected_of_the_named_loader(tmp_path):
    module = Pairs("b", weight=1.0)
    selection = InstanceSelection(index=list(range(8)))
    fit = trainer(selection, ExactResume(), max_epochs=1)
    fit.fit(module, {"a": loader(ids=False), "b": DataLoader(data(24, seed=2), 4, shuffle=True)})
    kept = {float(x) for x in data(24, seed=2).tensors[0][:8, 0]}
    assert {x for step in module.rows for x in step[1]} == kept
    assert len({x for step in module.rows for x in step[0]}) == 64


@pytest.mark.parametrize(
    ("curated", "error", "message"),
    [
        (None, TypeError, "UniformSelection needs one training data loader, but got 2. Name the one"),
        ("c", ValueError, r"`curated_loader` must name one of the training data loaders, \['a', 'b'\], but is 'c'"),
    ],
)
def test_a_loader_that_is_not_named_is_no_guess(curated, error, message):
    with pytest.raises(error, match=message):
        trainer(UniformSelection(keep=0.5)).fit(Pairs(curated), {"a": loader(), "b": loader()})


def test_weights_reach_the_loss_of_one_loader_alone():
    rule = HardSampleSelection(keep=0.5, rule="importance")
    with pytest.raises(TypeError, match="HardSampleSelection needs one training data loader, but got 2"):
        trainer(rule).fit(Pairs("a"), {"a": loader(), "b": loader()})


def test_several_loaders_are_not_divided_anew(tmp_path):
    fit = trainer(ExactResume(), max_epochs=1)
    fit.fit(Pairs("a"), {"a": loader(), "b": loader()})
    fit.save_checkpoint(tmp_path / "x.ckpt")
    file = torch.load(tmp_path / "x.ckpt", weights_only=False)
    file["callbacks"]["ExactResume"]["processes"] = 2
    torch.save(file, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="the order of 2 data loaders cannot be divided anew"):
        trainer(ExactResume(), max_epochs=2).fit(
            Pairs("a"), {"a": loader(), "b": loader()}, ckpt_path=tmp_path / "x.ckpt"
        )
