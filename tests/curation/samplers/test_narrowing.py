"""Batches from fewer and fewer of the best: which rows, on which process, and what is refused."""

import numpy as np
import pytest
import torch
from helpers import Classifier, data, trainer
from torch.utils.data import DataLoader

from curation.batch import SampleIds
from curation.callbacks import ExactResume, SampleRecord, UniformSelection
from curation.samplers import NarrowingSampler

RANKING = np.random.default_rng(0).permutation(1000)[:400]


def batches(sampler):
    return [batch.tolist() for batch in torch.tensor(list(sampler)).split(sampler.batch_size)]


def test_each_batch_is_of_the_best_that_count_at_its_step():
    sampler = NarrowingSampler(RANKING, batch_size=4, steps=200, first=0.5, last=0.05, seed=1)
    places = {row: place for place, row in enumerate(RANKING.tolist())}
    found = batches(sampler)
    assert len(found) == 200
    assert len(sampler) == 800
    seen = np.array([[places[row] for row in batch] for batch in found])
    for step, batch in enumerate(seen):
        assert len(set(batch)) == 4
        assert max(batch) < round(400 * 0.5 * 0.1 ** (step / 199))
    assert seen[:20].max() > 150  # of 200 to 159


def test_a_batch_is_never_of_fewer_rows_than_it_has():
    assert sorted(list(NarrowingSampler(RANKING, 8, 1, first=0.001, last=0.001))) == sorted(RANKING[:8].tolist())


def test_it_may_grow():
    sampler = NarrowingSampler(RANKING, batch_size=2, steps=50, first=0.01, last=1.0)
    assert [sampler.share(step) for step in (0, 49)] == pytest.approx([0.01, 1.0])


def test_seed_and_epoch_decide():
    def drawn(seed, epoch):
        sampler = NarrowingSampler(RANKING, batch_size=2, steps=20, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert drawn(0, 3) == drawn(0, 3)
    assert drawn(0, 3) != drawn(0, 4)
    assert drawn(0, 3) != drawn(1, 3)


def test_processes_share_the_global_batch(monkeypatch):
    whole = batches(NarrowingSampler(RANKING, batch_size=6, steps=20))
    parts = []
    for rank in range(3):
        monkeypatch.setattr(NarrowingSampler, "_place", property(lambda self, rank=rank: (rank, 3)))
        parts.append(batches(NarrowingSampler(RANKING, batch_size=2, steps=20)))
    for step, batch in enumerate(whole):
        assert [part[step] for part in parts] == [batch[rank::3] for rank in range(3)]
    with pytest.raises(
        ValueError, match="`ranking` must have 1200 samples for the batch of 3 processes, but has 400"
    ):
        list(NarrowingSampler(RANKING, batch_size=400, steps=1))


def test_a_resumed_fit_goes_on_with_the_same_batches(tmp_path):
    def fit(steps, ckpt_path=None):
        torch.manual_seed(0)
        sampler = NarrowingSampler(np.arange(64)[::-1].copy(), batch_size=4, steps=12)
        record = SampleRecord(64)
        callbacks = [UniformSelection(keep=1.0), record, ExactResume()]
        run = trainer(*callbacks, max_steps=steps, max_epochs=-1)
        module = Classifier()
        run.fit(module, DataLoader(SampleIds(data(64)), 4, sampler=sampler), ckpt_path=ckpt_path)
        run.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return [parameter.clone() for parameter in module.parameters()]

    whole = fit(12)
    fit(5)
    torch.testing.assert_close(fit(12, tmp_path / "5.ckpt"), whole, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 1], 1, 1), "`ranking` must be different samples"),
        (([0.5], 1, 1), "`ranking` must be different samples"),
        (([], 1, 1), "`ranking` must be different samples"),
        (([1, 2], 3, 1), r"`batch_size` must be in \[1, 2 samples\], but got 3"),
        (([1, 2], 1, 0), "`steps` must be"),
        (([1, 2], 1, 1, 0.0), "`first` must be"),
        (([1, 2], 1, 1, 0.5, 1.5), "`last` must be"),
        (([1, 2], 1, 1, 0.5, 0.5, -1), "`seed` must be"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        NarrowingSampler(*arguments)
