"""A selection that is made in one run and trained on in another."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers import (
    CLASSES,
    FEATURES,
    Classifier,
    ManualClassifier,
    Watch,
    assert_same_weights,
    loader,
    trainer,
    weights,
)
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from processes import TwoRanks
from torch import nn
from torch.utils.data import default_collate

from curation.callbacks import (
    ExactResume,
    HardSampleSelection,
    ProxySelection,
    ReplaySelection,
    SampleRecord,
    SelectionLedger,
    SelectionRehearsal,
)
from curation.records import Ledger
from curation.samplers import ConceptAwareSampler, ConceptIndex


class Small(Classifier):
    """Draws no random numbers, so its steps are the same beside another fit and in one of its own."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.net = nn.Linear(FEATURES, CLASSES)


def fit(module, *callbacks, n=60, resume=None, **options):
    seed_everything(7, verbose=False)
    watch = Watch()
    trainer(*callbacks, ExactResume(), watch, **options).fit(module, loader(n, num_workers=0), ckpt_path=resume)
    return [batch[0] for batch in watch.batches]


@pytest.fixture(scope="module")
def choices(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rehearsal") / "choices"
    rows = fit(Small(), SelectionRehearsal(keep=0.5), SelectionLedger(folder))
    assert [len(x) for x in rows] == 2 * [*[8] * 7, 4]  # the rehearsal trains on everything
    return folder


def test_a_replay_trains_as_beside_the_proxy(choices):
    """Bit for bit, with the last batch of an epoch as short as the budget."""
    replayed, beside = Classifier(), Classifier()
    record = SampleRecord()
    rows = fit(replayed, ReplaySelection(choices), record)
    same = fit(beside, ProxySelection(0.5, Small(), update_every=1))
    assert all(map(torch.equal, rows, same))
    assert_same_weights(weights(replayed), weights(beside))
    assert int(record.store.kept.sum()) == 16 * 4
    assert not record.store.scores.isfinite().any()


def test_a_rehearsal_is_plain_training(choices, tmp_path):
    plain, rehearsed = Classifier(), Classifier()
    fit(plain)
    fit(rehearsed, SelectionRehearsal(keep=0.5), SelectionLedger(tmp_path / "again"))
    assert_same_weights(weights(plain), weights(rehearsed))
    with pytest.raises(ValueError, match="Argument `rule` must be one without weights, but got 'importance'"):
        SelectionRehearsal(keep=0.5, rule="importance")


@pytest.mark.parametrize(
    "options",
    [{"precision": "bf16-mixed"}, {"accumulate_grad_batches": 3}, {"module": ManualClassifier}, {"max_steps": 5}],
    ids=str,
)
def test_other_kinds_of_runs(choices, options):
    module = options.pop("module", Classifier)()
    rows = fit(module, ReplaySelection(choices), **options)
    assert {len(x) for x in rows} == {4}


def test_a_killed_replay_goes_on(choices, tmp_path):
    whole, resumed = Classifier(), Classifier()
    save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=5, save_top_k=-1)
    saves = {"enable_checkpointing": True, "default_root_dir": tmp_path}
    rows = fit(whole, ReplaySelection(choices), save, **saves)
    for step in (5, 10):
        rest = fit(resumed, ReplaySelection(choices), resume=tmp_path / f"step={step}.ckpt")
        assert all(map(torch.equal, rest, rows[step:]))
        assert len(rest) == 16 - step
        assert_same_weights(weights(whole), weights(resumed))


def run_of_a_rank(folder):
    seed_everything(7, verbose=False)
    two = {"strategy": "ddp", "devices": 2}
    fit(Small(), SelectionRehearsal(keep=0.5), SelectionLedger(f"{folder}/choices"), **two)
    module = Classifier()
    rows = fit(module, ReplaySelection(f"{folder}/choices"), **two)
    same = fit(Classifier(), ProxySelection(0.5, Small(), update_every=1), **two)
    return all(map(torch.equal, rows, same)), [x.tolist() for x in rows]


def test_two_ranks_replay_their_own_choices(tmp_path, choices):
    ranks = TwoRanks()
    try:
        (one, rows), (other, rest) = ranks.ask(run_of_a_rank, *[str(tmp_path)] * 2)
    finally:
        ranks.stop()
    assert one
    assert other
    assert rows != rest
    with pytest.raises(ValueError, match=r"must be the ledger of 1 processes, but that in .* is of 2"):
        fit(Classifier(), ReplaySelection(tmp_path / "choices"))


def first_batch_of_four(samples):
    """The first batch of rank 1 is as short as the budget."""
    return default_collate(
        samples[:4] if os.environ["RANK"] == "1" and 1 in [s[-1]["sample_id"] for s in samples] else samples
    )


def unequal_on_a_rank(folder):
    def run(module, *callbacks):
        seed_everything(7, verbose=False)
        watch, batches = Watch(), loader(64, shuffle=False, collate_fn=first_batch_of_four)
        trainer(*callbacks, ExactResume(), watch, strategy="ddp", devices=2, max_epochs=1).fit(module, batches)
        return [len(batch[0]) for batch in watch.batches]

    run(Small(), SelectionRehearsal(keep=0.5), SelectionLedger(f"{folder}/choices"))
    return run(Classifier(), ReplaySelection(f"{folder}/choices"))


def test_a_rank_may_begin_with_a_short_batch(tmp_path):
    ranks = TwoRanks()
    try:
        assert ranks.ask(unequal_on_a_rank, *[str(tmp_path)] * 2) == [[4] * 4, [4] * 4]
    finally:
        ranks.stop()


def test_other_candidates_are_refused(choices):
    def refused(message, seed=7, callbacks=(), batches=None, **options):
        seed_everything(seed, verbose=False)
        run = trainer(ReplaySelection(choices), *callbacks, **options)
        module = Classifier()
        before = weights(module)
        with pytest.raises((ValueError, RuntimeError, TypeError), match=message):
            run.fit(module, loader(60) if batches is None else batches)
        assert_same_weights(before, weights(module))

    resumer = [ExactResume()]
    refused("candidates after 0 batches are not those of the ledger", seed=8, callbacks=resumer)
    refused("candidates after 0 batches are not those of the ledger", callbacks=resumer, batches=loader(64))
    refused("candidates after 0 batches are not", callbacks=resumer, batches=loader(60, batch_size=12))
    refused("at least 30 batches, but that in .* has 16", callbacks=resumer, batches=loader(60, batch_size=4))
    refused("at least 24 batches, but that in .* has 16", callbacks=resumer, max_epochs=3)
    refused("needs batches in a fixed order: add `ExactResume`")
    refused("needs sample ids", callbacks=resumer, batches=loader(60, ids=False))


def test_a_sampler_of_this_package_fixes_the_order(tmp_path):
    concepts = ConceptIndex.from_labels(torch.arange(64) % 4, range(4))

    def batches():
        return loader(64, shuffle=False, sampler=ConceptAwareSampler(concepts, 8, 16, seed=3))

    class Batches(Watch):
        pass

    trainer(SelectionRehearsal(keep=0.5), SelectionLedger(tmp_path / "choices")).fit(Small(), batches())
    watch = Batches()
    trainer(ReplaySelection(tmp_path / "choices"), watch).fit(Classifier(), batches())
    assert [len(batch[0]) for batch in watch.batches] == [4] * 8


def test_a_ledger_that_is_none_or_has_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"Argument `choices` must .* but .* 'no/ledger'"):
        fit(Classifier(), ReplaySelection("no/ledger"))
    weighted = HardSampleSelection(keep=0.5, rule="importance", score="grad_norm")
    fit(Classifier(), weighted, SelectionLedger(tmp_path / "weighted"))
    with pytest.raises(ValueError, match="Argument `choices` must be a ledger without weights"):
        fit(Classifier(), ReplaySelection(tmp_path / "weighted"))


def test_a_ledger_of_other_counts_is_refused(choices, tmp_path):
    """As of a run with `when="pays"`, some steps of which train on everything."""
    from curation.tables import read_table, write_table

    shutil.copytree(choices, tmp_path / "mixed")
    (file,) = Path(tmp_path, "mixed").glob("rank=0/*.parquet")
    table = read_table(file, ["step", "sample_id", "score", "kept", "weight"])
    columns = {name: table[name].to_numpy().copy() for name in table.column_names}
    later = columns["step"] == 2
    columns["kept"][later], columns["weight"][later] = 1, 1.0
    write_table(file, columns)
    with pytest.raises(
        ValueError, match=r"must be a ledger of 4 rows for a batch of 8, but .* has 8 after 2 batches"
    ):
        fit(Classifier(), ReplaySelection(tmp_path / "mixed"))


def test_steps_of_a_ledger(choices):
    steps = list(Ledger(choices).steps(first=5))
    assert [step for step, _ in steps] == list(range(5, 16))
    assert [len(columns["sample_id"]) for _, columns in steps] == [8, 8, 4, *[8] * 7, 4]
    assert (Ledger(choices).last_step(), Ledger(choices).last_step(rank=3)) == (15, -1)
