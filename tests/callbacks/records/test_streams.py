"""Selections, records and exact resume on iterable data sets."""

import os

import pytest
import torch
from datasets import Dataset as HuggingFace
from datasets.distributed import split_dataset_by_node
from helpers import AnyBatch, assert_same_weights, data, trainer, weights
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from processes import TwoRanks
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from curation.callbacks import ExactResume, HardSampleSelection, SampleRecord, SelectionLedger, TrainingDynamics
from curation.records import Ledger
from curation.sample_ids import SampleIds
from curation.stream_ids import stream_ids

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
SHARDS, EACH = 6, 8
ROWS = [{"x": x, "y": y} for x, y in data(SHARDS * EACH)]


def streamed(shuffled=True):
    """Shards of eight rows; the id of a row is its position in the shard times six, plus the shard."""
    rows = HuggingFace.from_dict({name: [row[name].tolist() for row in ROWS] for name in ("x", "y")})
    dataset = stream_ids(rows.to_iterable_dataset(num_shards=SHARDS))
    return (dataset.shuffle(seed=3, buffer_size=10) if shuffled else dataset).with_format("torch")


BY_ID = [ROWS[EACH * (i % SHARDS) + i // SHARDS] for i in range(SHARDS * EACH)]


class Of(AnyBatch):
    def __init__(self):
        super().__init__()
        self.rows = []

    def training_step(self, batch, batch_idx):
        self.rows.append(batch["x"][:, 0].tolist())
        return super().training_step(batch, batch_idx)


def trained(loader, folder, epochs=1, **options):
    seed_everything(7, verbose=False)
    module, record = Of(), SampleRecord(size=SHARDS * EACH)
    callbacks = [HardSampleSelection(keep=0.5), record, SelectionLedger(folder)]
    trainer(*callbacks, max_epochs=epochs, **options).fit(module, loader)
    store = {name: value.nan_to_num(-1.0).tolist() for name, value in record.store.state_dict().items()}
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # the ledger has files of both ranks
    ledger = repr(Ledger(folder).rows().to_pylist())
    return {"rows": module.rows, "store": store, "ledger": ledger, "weights": repr(weights(module))}


def of_the_same_order(stream):
    """A map-style data set whose batches are those of a stream."""
    order = [batch["sample_id"].tolist() for batch in stream]
    return DataLoader(SampleIds(BY_ID), batch_sampler=order)


@pytest.mark.parametrize("workers", [0, 2, 3])
@pytest.mark.parametrize("shuffled", [False, True])
def test_a_stream_is_trained_on_as_a_map_style_data_set_of_its_order(tmp_path, workers, shuffled):
    make = lambda: DataLoader(streamed(shuffled), 8, num_workers=workers)  # noqa: E731
    stream = trained(make(), tmp_path / "stream")
    assert stream == trained(of_the_same_order(make()), tmp_path / "map")
    assert sorted(stream["store"]["seen"]) == [1] * SHARDS * EACH


@pytest.mark.parametrize("workers", [0, 2, 3])
@pytest.mark.parametrize("processes", [1, 2, 4])  # the shards are divided by two of them, and the rows by four
def test_an_id_belongs_to_its_row_whoever_reads_it(workers, processes):
    parts = [split_dataset_by_node(streamed(), rank, processes) for rank in range(processes)]
    batches = [batch for part in parts for batch in DataLoader(part, 5, num_workers=workers)]
    ids = [i for batch in batches for i in batch["sample_id"].tolist()]
    assert sorted(ids) == list(range(SHARDS * EACH))
    expected = torch.stack([BY_ID[i]["x"] for i in ids])
    assert torch.equal(torch.cat([batch["x"] for batch in batches]), expected)


def on_a_rank(given):
    folder, kind = given
    loader = DataLoader(split_dataset_by_node(streamed(), int(os.environ["RANK"]), 2), 8)
    loader = of_the_same_order(loader) if kind == "map" else loader
    return trained(loader, f"{folder}/{kind}", strategy="ddp", devices=2, use_distributed_sampler=False)


def test_two_ranks_train_on_a_stream_as_on_a_map_style_data_set(tmp_path):
    ranks = TwoRanks()
    stream, mapped = (ranks.ask(on_a_rank, *[(str(tmp_path), kind)] * 2) for kind in ("stream", "map"))
    ranks.stop()
    assert stream == mapped
    assert stream[0]["store"] == stream[1]["store"]
    assert stream[0]["rows"] != stream[1]["rows"]
    assert sorted(stream[0]["store"]["seen"]) == [1] * SHARDS * EACH


def resumed_on_a_rank(given):
    folder, resume = given
    loader = DataLoader(split_dataset_by_node(streamed(), int(os.environ["RANK"]), 2), 8)
    seed_everything(77 if resume else 1, verbose=False)
    module, save = Of(), ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    callbacks = [HardSampleSelection(keep=0.5), ExactResume(), *([] if resume else [save])]
    run = trainer(*callbacks, strategy="ddp", devices=2, enable_checkpointing=not resume)
    run.fit(module, loader, ckpt_path=resume)
    return module.rows, {name: value.tolist() for name, value in weights(module).items()}


def test_two_ranks_go_on_with_a_stream(tmp_path):
    ranks = TwoRanks()
    whole = ranks.ask(resumed_on_a_rank, *[(tmp_path, None)] * 2)
    resumed = {
        step: ranks.ask(resumed_on_a_rank, *[(tmp_path, tmp_path / f"step={step}.ckpt")] * 2) for step in (2, 3)
    }
    ranks.stop()
    for step, both in resumed.items():  # of three in each of two epochs
        for (rows, expected), (again, got) in zip(whole, both, strict=True):
            assert len(rows) == 6
            assert again == rows[step:]
            assert got == expected


class Generated(IterableDataset):
    """Draws its order and its noise from the stream of the process, as it is read."""

    def __iter__(self):
        info = get_worker_info()
        part = range(0, 40) if info is None else range(info.id, 40, info.num_workers)
        for i in [part[j] for j in torch.randperm(len(part)).tolist()]:
            x, y = data(40)[i]
            yield {"x": x + torch.rand(()), "y": y, "sample_id": i}


STREAMS = {"Hugging Face": streamed, "generated": Generated}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_goes_on_where_it_was(tmp_path, name, workers):
    """At steps of two epochs, of which each has an order of its own."""

    def run(resume=None, folder=None):
        seed_everything(1 if resume is None else 77, verbose=False)
        module, callbacks = Of(), [HardSampleSelection(keep=0.5), ExactResume()]
        callbacks += [ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)] if folder else []
        fit = trainer(*callbacks, max_epochs=2, enable_checkpointing=folder is not None)
        fit.fit(module, DataLoader(STREAMS[name](), 8, num_workers=workers), ckpt_path=resume)
        return module.rows, weights(module)

    whole, expected = run(folder=tmp_path)
    epoch = len(whole) // 2
    assert whole[:epoch] != whole[epoch:]
    for step in (1, epoch - 1, epoch, epoch + 2):
        rows, got = run(tmp_path / f"step={step}.ckpt")
        assert rows == whole[step:]
        assert_same_weights(expected, got)


@pytest.mark.parametrize("record", [SampleRecord, lambda: TrainingDynamics("x.parquet")])
def test_a_record_of_a_stream_needs_its_size(record, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = Of()
    with pytest.raises(ValueError, match="Argument `size` must be given for a Generated, which has no length"):
        trainer(HardSampleSelection(keep=0.5), record()).fit(module, DataLoader(Generated(), 8))
    assert not module.rows


def test_hashed_ids_keep_a_record_in_its_bound(tmp_path):
    class Pages(IterableDataset):
        def __iter__(self):
            return ({"x": x, "y": y, "url": f"page {i}"} for i, (x, y) in enumerate(data(40)))

    class WithoutUrl(Of):
        def training_step(self, batch, batch_idx):
            del batch["url"]
            return super().training_step(batch, batch_idx)

    record = SampleRecord(size=1000)
    loader = DataLoader(stream_ids(Pages(), "url", buckets=1000), 8)
    trainer(HardSampleSelection(keep=0.5), record, max_epochs=2).fit(WithoutUrl(), loader)
    rows = stream_ids(Pages(), "url", buckets=1000)
    expected = torch.bincount(torch.tensor([row["sample_id"] for row in rows]), minlength=1000)
    assert torch.equal(record.store.seen.long(), 2 * expected)
    assert int(expected.sum()) == 40
