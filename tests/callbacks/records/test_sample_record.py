"""The record of a fit, and that the ledger agrees with it."""

import itertools
import os
import sys
from pathlib import Path

import pytest
import torch
from helpers import Classifier, data, loader, trainer
from processes import on_two_ranks
from torch.utils.data import DataLoader

from curation.batch import SampleIds
from curation.callbacks import HardSampleSelection, SampleRecord, SelectionLedger, UniformSelection
from curation.records.ledger import Ledger


def test_record_and_ledger_agree_with_what_was_trained_on(tmp_path):
    record, ledger = SampleRecord(), SelectionLedger(str(tmp_path / "ledger"))
    run = trainer(HardSampleSelection(keep=0.25), record, ledger, max_epochs=3)
    run.fit(Classifier(), loader())
    seen, kept, last = Ledger(tmp_path / "ledger").counts(64)
    assert seen.tolist() == record.store.seen.tolist() == [3] * 64
    assert kept.tolist() == record.store.kept.tolist()
    assert kept.sum() == 3 * 8 * 2
    assert float(run.callback_metrics["curation/never_kept_fraction"]) == pytest.approx((kept == 0).mean())
    for i in (0, 17):
        history = Ledger(tmp_path / "ledger").history(i)
        assert history["score"][-1] == record.store.scores[i]
        assert history["step"][-1] == record.store.steps[i]
        assert last[i] == max([s for s, k in zip(history["step"], history["kept"], strict=True) if k], default=-1)


def test_keeping_everything_is_recorded_too(tmp_path):
    record = SampleRecord()
    callbacks = [UniformSelection(keep=1.0), record, SelectionLedger(str(tmp_path))]
    trainer(*callbacks, max_epochs=1).fit(Classifier(), loader())
    assert record.store.kept.tolist() == [1] * 64
    assert Ledger(tmp_path).counts()[1].tolist() == [1] * 64


@pytest.mark.parametrize("make", [SampleRecord, lambda: SelectionLedger("ledger")])
def test_samples_without_ids_and_runs_without_selection_are_refused(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        TypeError, match=r"needs sample ids: wrap the training data set in `curation.sample_ids.SampleIds`"
    ):
        trainer(make(), UniformSelection(keep=0.5)).fit(Classifier(), loader(ids=False))
    with pytest.raises(
        ValueError, match="records an online selection or dynamic pruning, but the trainer has neither"
    ):
        trainer(make()).fit(Classifier(), loader())


def test_a_record_that_is_too_small_is_refused():
    for size in (0, 2.5, True):
        with pytest.raises(ValueError, match=f"Argument `size` must be an integer >= 1 or None, but got {size}"):
            SampleRecord(size=size)
    with pytest.raises(ValueError, match=r"Argument `size` must be more than every sample id, but \d+ >= 2"):
        trainer(UniformSelection(keep=0.5), SampleRecord(size=2)).fit(Classifier(), loader())
    record = SampleRecord(size=100)
    trainer(UniformSelection(keep=0.5), record, max_epochs=1).fit(Classifier(), loader())
    assert record.store.seen.tolist() == [1] * 64 + [0] * 36


def test_a_full_step_leaves_the_score_of_the_last_one_that_scored():
    record = SampleRecord()
    selection = HardSampleSelection(keep=0.5, when="pays")
    trainer(selection, record, max_epochs=1).fit(Classifier(), loader())
    steps = record.store.steps
    assert torch.equal(record.store.scores.isnan(), steps == -1)
    assert set(steps.tolist()) == {-1, 0, 2, 4, 6}
    uniform = SampleRecord()
    trainer(UniformSelection(keep=0.5), uniform, max_epochs=1).fit(Classifier(), loader())
    assert uniform.store.scores.isnan().all()


def fit_two_ranks(folder):
    """Each rank has batches of its own, which grow: 4, 8 and 16 candidates on rank 0, one more on rank 1."""
    rank = int(os.environ["RANK"])
    sizes = [4 + rank, 8 + rank, 16 + rank]
    starts = [0, *itertools.accumulate(sizes)]
    batches = [[2 * row + rank for row in range(starts[i], starts[i + 1])] for i in range(3)]
    record, module = SampleRecord(), Classifier()
    run = trainer(
        UniformSelection(keep=0.5), record, devices=2, strategy="ddp", max_epochs=1, use_distributed_sampler=False
    )
    run.fit(module, DataLoader(SampleIds(data()), batch_sampler=batches))
    torch.save((record.store.seen, record.store.kept, sum(module.seen)), Path(folder) / f"{rank}.pt")


def test_ranks_with_unequal_batches_record_every_candidate(tmp_path):
    on_two_ranks(__file__, tmp_path)
    (seen, kept, rows), (other_seen, other_kept, other_rows) = (torch.load(tmp_path / f"{i}.pt") for i in (0, 1))
    assert torch.equal(seen, other_seen)
    assert torch.equal(kept, other_kept)
    expected = torch.zeros(64, dtype=torch.int32)
    expected[0:56:2] = expected[1:62:2] = 1  # 28 samples of rank 0, 31 of rank 1
    assert seen.tolist() == expected.tolist()
    assert kept.sum() == rows + other_rows


if __name__ == "__main__":
    fit_two_ranks(sys.argv[1])
