"""Batches of samples of like length."""

from itertools import chain

import numpy as np
import pytest
import torch
from helpers import Watch, assert_same_weights, trainer, weights
from lightning.pytorch import LightningDataModule, LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities import CombinedLoader
from processes import TwoRanks
from torch import nn
from torch.utils.data import DataLoader, Dataset

from curation.callbacks import ExactResume
from curation.samplers import LengthGroupedSampler, TokenBudgetSampler, lengths_of
from curation.samplers.length_grouped import sorted_windows


def draw_lengths(n, seed=0):
    return np.minimum(np.random.default_rng(seed).geometric(0.03, n) + 3, 200).astype(np.int32)


@pytest.fixture
def of_ranks(monkeypatch):
    """What a sampler yields on each of so many processes."""

    def ask(made, processes, epoch=0):
        parts, sizes = [], []
        for rank in range(processes):
            monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
            monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
            monkeypatch.setattr(torch.distributed, "get_world_size", lambda: processes)
            sampler = made()
            sampler.set_epoch(epoch)
            sizes.append(len(sampler))
            parts.append(list(sampler))
        assert [len(part) for part in parts] == sizes == sizes[:1] * processes
        return parts

    return ask


def slow_windows(lengths, rng, window):
    order = np.arange(len(lengths), dtype=np.int32)
    rng.shuffle(order)
    result = []
    for start in range(0, len(order), window):
        result += sorted(order[start : start + window].tolist(), key=lambda i: -lengths[i])
    return result


@pytest.mark.parametrize("n", [1, 7, 50, 333])
@pytest.mark.parametrize("window", [1, 5, 64, 400])
def test_windows_are_those_of_a_loop(n, window):
    lengths = draw_lengths(n)
    got = sorted_windows(lengths, np.random.default_rng(3), window)
    assert got.tolist() == slow_windows(lengths, np.random.default_rng(3), window)


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
@pytest.mark.parametrize("n", [64, 131, 1000])
def test_every_sample_once_and_as_many_on_every_process(of_ranks, n, processes):
    lengths = draw_lengths(n)
    parts = of_ranks(lambda: LengthGroupedSampler(lengths, 8, window=4), processes)
    drawn = list(chain(*parts))
    assert set(drawn) == set(range(n))
    assert len(drawn) - n < processes  # repeated to fill the last batch up
    assert lengths[parts[0][0]] == lengths.max() or lengths[: n // (8 * processes) * 8 * processes].size == 0


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_processes_have_as_many_tokens_in_every_step(of_ranks, processes):
    lengths = draw_lengths(20_000)
    parts = np.array(of_ranks(lambda: LengthGroupedSampler(lengths, 32), processes))[
        :, : 20_000 // processes // 32 * 32
    ]
    tokens = lengths[parts.reshape(processes, -1, 32)].sum(2)
    assert np.median(tokens.max(0) / tokens.min(0)) < 1.01
    assert (tokens.max(0) / tokens.min(0)).mean() < 1.01


@pytest.mark.parametrize("batch_size", [8, 16, 32])
def test_little_is_padding(batch_size):
    lengths = np.clip(np.random.default_rng(0).normal(90, 25, 40_000), 10, 128).astype(np.int32)
    batches = np.array(list(LengthGroupedSampler(lengths, batch_size))).reshape(-1, batch_size)
    assert lengths[batches].max(1).sum() * batch_size / lengths.sum() < 1.02
    middle = lengths[batches].mean(1)
    assert abs(np.corrcoef(middle[1:-1], middle[2:])[0, 1]) < 0.05  # batches are in random order


def test_epochs_differ_and_repeat():
    lengths = draw_lengths(400)
    orders = []
    for epoch in (0, 1, 0):
        sampler = LengthGroupedSampler(lengths, 8)
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] == orders[2] != orders[1]
    assert list(LengthGroupedSampler(lengths, 8, seed=1)) != orders[0]


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("n", [9, 500, 3000])
def test_batches_stay_within_the_budget(of_ranks, n, processes):
    lengths = draw_lengths(n)
    counts = set()
    for epoch in range(4):
        parts = of_ranks(lambda: TokenBudgetSampler(lengths, 400, window=5), processes, epoch)
        counts.add(len(parts[0]))
        for batches in zip(*parts, strict=True):
            assert len({len(batch) for batch in batches}) == 1
            assert all(0 < len(batch) * lengths[batch].max() <= 400 for batch in batches)
        drawn = [i for part in parts for batch in part for i in batch]
        assert set(drawn) == set(range(n))
        assert len(drawn) - n < processes
    assert len(counts) == 1


def test_work_is_constant():
    lengths = draw_lengths(5000)
    work = [len(batch) * lengths[batch].max() for batch in TokenBudgetSampler(lengths, 2000)]
    assert np.mean(work) > 0.85 * 2000


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: LengthGroupedSampler([3, 0], 1), "`lengths` must be in .*, but sample 1 has 0"),
        (lambda: LengthGroupedSampler([], 1), "`lengths` must hold an integer for each sample"),
        (lambda: LengthGroupedSampler([1.5], 1), "`lengths` must hold|`length` must name"),
        (lambda: LengthGroupedSampler([1], 0), "`batch_size` must be"),
        (lambda: LengthGroupedSampler([1], 1, window=0), "`window` must be"),
        (lambda: LengthGroupedSampler([1], 1, seed=-1), "`seed` must be"),
        (lambda: TokenBudgetSampler([5, 9], 8), "`max_tokens` must be at least .* got 8 and sample 1 has 9"),
        (lambda: TokenBudgetSampler([5], 8, window=0), "`window` must be"),
    ],
)
def test_bad_arguments(made, message):
    with pytest.raises(ValueError, match=message):
        made()


class Texts(Dataset):
    def __init__(self, n=60):
        self.lengths = draw_lengths(n)

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, i):
        return {"input_ids": torch.full((int(self.lengths[i]),), i)}


def pad(samples):
    return nn.utils.rnn.pad_sequence([s["input_ids"] for s in samples], batch_first=True, padding_value=-1)


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        return (self.net(batch[:, :1].float()) + torch.rand(1)).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-4)


class Data(LightningDataModule):
    def __init__(self, budget, workers=0):
        super().__init__()
        self.budget, self.workers, self.texts, self.batch_size = budget, workers, Texts(), 4

    def train_dataloader(self):
        lengths = lengths_of(self.texts)
        how = (
            {"batch_sampler": TokenBudgetSampler(lengths, 300, window=2)}
            if self.budget
            else {"batch_size": self.batch_size, "sampler": LengthGroupedSampler(lengths, self.batch_size, window=2)}
        )
        return DataLoader(self.texts, collate_fn=pad, num_workers=self.workers, **how)


def fit(budget, *callbacks, resume=None, workers=0, **options):
    """The samples of each batch, and the weights."""
    seed_everything(1, verbose=False)
    module, watch = Net(), Watch()
    run = trainer(*callbacks, watch, **options)
    run.fit(module, Data(budget, workers), ckpt_path=resume)
    return [batch[:, 0].tolist() for batch in watch.batches], weights(module), run


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("budget", [False, True])
def test_an_epoch_of_a_fit_resumes_bit_for_bit(budget, workers, tmp_path):
    save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=7, save_top_k=-1)
    rows, whole, run = fit(budget, ExactResume(), save, workers=workers, enable_checkpointing=True)
    for epoch in (0, 1):
        length = len(rows) // 2
        assert sorted(chain(*rows[epoch * length : (epoch + 1) * length])) == list(range(60))
    assert run.num_training_batches == len(rows) // 2
    after, resumed, _ = fit(budget, ExactResume(), resume=tmp_path / "step=7.ckpt", workers=workers)
    assert after == rows[7:]
    assert_same_weights(whole, resumed)


@pytest.mark.parametrize("options", [{"fast_dev_run": True}, {"limit_train_batches": 3, "max_epochs": 1}])
@pytest.mark.parametrize("budget", [False, True])
def test_short_runs(budget, options):
    rows, _, _ = fit(budget, **options)
    assert len(rows) == (1 if "fast_dev_run" in options else 3)


@pytest.mark.parametrize("budget", [False, True])
def test_overfitting_repeats_the_same_batches(budget):
    rows, _, _ = fit(budget, overfit_batches=2, max_epochs=3)
    assert rows == 3 * rows[:2]


@pytest.mark.parametrize("budget", [False, True])
def test_each_of_two_loaders_has_an_epoch(budget):
    class Two(Data):
        def train_dataloader(self):
            return CombinedLoader({"a": super().train_dataloader(), "b": super().train_dataloader()})

    class OfTwo(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["a"], batch_idx)

    watch = Watch()
    trainer(watch, max_epochs=2).fit(OfTwo(), Two(budget))
    rows = [[batch[key][:, 0].tolist() for batch in watch.batches] for key in ("a", "b")]
    assert rows[0] == rows[1]
    epoch = len(rows[0]) // 2
    for part in (rows[0][:epoch], rows[0][epoch:]):
        assert sorted(chain(*part)) == list(range(60))
    assert rows[0][:epoch] != rows[0][epoch:]


def test_the_batch_size_finder_tells_the_sampler():
    texts = Data(False)
    Tuner(trainer()).scale_batch_size(Net(), datamodule=texts, max_trials=3, steps_per_trial=2)
    assert texts.batch_size == texts.train_dataloader().sampler.batch_size == 8


def rank(budget):
    results = []
    for uses in (True, False):
        rows, _, _ = fit(budget, devices=2, strategy="ddp", use_distributed_sampler=uses)
        results.append(rows)
    return results


@pytest.fixture(scope="module")
def ranks():
    ranks = TwoRanks()
    yield ranks
    ranks.stop()


@pytest.mark.parametrize("budget", [False, True])
def test_two_processes_share_every_batch(ranks, budget):
    one, other = ranks.ask(rank, budget, budget)
    assert one[0] == one[1]  # whatever Lightning would set
    assert other[0] == other[1]
    epoch = len(one[0]) // 2
    for part in (slice(0, epoch), slice(epoch, None)):
        assert sorted(chain(*one[0][part], *other[0][part])) == list(range(60))
    assert one[0][:epoch] != one[0][epoch:]  # Lightning sets the epoch
