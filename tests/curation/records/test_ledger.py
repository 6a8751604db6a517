"""The audit trail: what is written is read, a killed process loses no file."""

import multiprocessing
import os
import signal

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from curation.records.ledger import Ledger, LedgerWriter


def candidates(step, size=4, n=10):
    g = torch.Generator().manual_seed(step)
    kept = torch.zeros(size, dtype=torch.int64)
    kept[torch.randperm(size, generator=g)[:2]] = 1
    return torch.randperm(n, generator=g)[:size], torch.rand(size, generator=g), kept, kept * 0.5


def write(path, steps, rank=0, close=True, rows_per_file=10):
    writer = LedgerWriter(path, rank, rows_per_file)
    for step in steps:
        writer.append(step, *candidates(step))
    if close:
        writer.close()
    return writer


def test_what_is_written_is_read(tmp_path):
    write(tmp_path, range(7))
    got = Ledger(tmp_path).rows().to_pydict()
    expected = [candidates(step) for step in range(7)]
    assert got["step"] == [step for step in range(7) for _ in range(4)]
    for i, name in enumerate(("sample_id", "score", "kept", "weight")):
        assert got[name] == torch.cat([e[i] for e in expected]).tolist()
    assert len(list(tmp_path.glob("rank=0/*.parquet"))) == 3


def test_other_readers_read_it(tmp_path):
    write(tmp_path, range(3), rank=0)
    write(tmp_path, range(3), rank=1)
    files = str(tmp_path / "*" / "*.parquet")
    rows = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert rows.num_rows == 24


def test_questions_are_answered_as_by_counting(tmp_path):
    write(tmp_path, range(9), rank=0)
    write(tmp_path, range(20, 25), rank=1)
    seen, kept, last = np.zeros(12), np.zeros(12), np.full(12, -1)
    for step in [*range(9), *range(20, 25)]:
        ids, _, was_kept, _ = candidates(step)
        for i, k in zip(ids.tolist(), was_kept.tolist(), strict=True):
            seen[i] += 1
            kept[i] += k
            last[i] = max(last[i], step) if k else last[i]
    ledger = Ledger(tmp_path)
    got = ledger.counts(size=12)
    np.testing.assert_array_equal(got, [seen, kept, last])
    assert ledger.never_kept(12).tolist() == np.flatnonzero(kept == 0).tolist()
    assert ledger.most_kept(3) == [(i, kept[i]) for i in sorted(range(12), key=lambda i: -kept[i])[:3]]


def test_the_history_of_a_sample_is_in_order(tmp_path):
    write(tmp_path, range(1, 20, 2), rank=0)
    write(tmp_path, range(0, 20, 2), rank=1)
    history = Ledger(tmp_path).history(3)
    expected = [(s, float(candidates(s)[1][i])) for s in range(20) for i, j in enumerate(candidates(s)[0]) if j == 3]
    assert list(zip(history["step"].tolist(), history["score"].tolist(), strict=True)) == expected


def kill(path):
    write(path, range(6), close=False)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_loses_the_open_file_only_and_the_reader_says_so(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=kill, args=(tmp_path,))
    process.start()
    process.join()
    ledger = Ledger(tmp_path)
    assert ledger.rows()["step"].to_pylist() == [s for s in range(6) for _ in range(4)][: 2 * 12]
    assert ledger.cut_off() == {"rank=0": 5}
    write(tmp_path, [6])
    assert Ledger(tmp_path).cut_off() == {}


@pytest.mark.parametrize("step", [0, 1, 4, 5, 6, 7])
def test_a_resumed_run_leaves_the_rows_of_an_uninterrupted_one(tmp_path, step):
    write(tmp_path / "whole", range(10))
    write(tmp_path / "resumed", range(7), close=False).flush()
    for unfinished in ("00000099.part", ".00000099.1.parquet"):
        (tmp_path / "resumed/rank=0" / unfinished).touch()
    writer = LedgerWriter(tmp_path / "resumed", 0, 10)
    writer.truncate(step)
    for s in range(step, 10):
        writer.append(s, *candidates(s))
    writer.close()
    whole, resumed = (Ledger(tmp_path / run).rows() for run in ("whole", "resumed"))
    assert whole.equals(resumed)
    assert [file.name for file in (tmp_path / "resumed/rank=0").iterdir() if "00000099" in file.name] == []


def test_a_file_that_is_being_written_is_not_read(tmp_path):
    write(tmp_path, range(7))
    (tmp_path / "rank=0/.00000000.1.parquet").write_text("half a file")
    ledger = Ledger(tmp_path)
    assert ledger.rows().num_rows == 28
    assert ledger.cut_off() == {}
    write(tmp_path, range(7, 9))
    assert Ledger(tmp_path).rows()["step"].to_pylist() == [step for step in range(9) for _ in range(4)]


def test_a_checkpoint_writes_the_open_file_and_goes_on_with_it(tmp_path):
    writer = write(tmp_path, range(2), close=False)
    assert not list(tmp_path.glob("rank=0/*"))
    writer.flush()
    assert Ledger(tmp_path).rows().num_rows == 8
    writer.append(2, *candidates(2))
    writer.close()
    assert Ledger(tmp_path).rows().num_rows == 12
    assert len(list(tmp_path.glob("rank=0/*.parquet"))) == 1


def test_a_folder_without_a_ledger_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Argument `path` must be the folder of a ledger, but got '.*none'"):
        Ledger(tmp_path / "none")


def test_a_file_in_the_place_of_a_rank_is_named(tmp_path):
    (tmp_path / "rank=0").touch()
    with pytest.raises(ValueError, match=r"must be the folder of a ledger, but '.*rank=0' is a file"):
        LedgerWriter(tmp_path)


def test_columns_that_do_not_fit_are_named(tmp_path):
    writer, two = LedgerWriter(tmp_path), torch.ones(2)
    with pytest.raises(TypeError, match=r"`sample_ids` must be int64, but got torch.float32"):
        writer.append(0, two, two, two, two)
    with pytest.raises(ValueError, match=r"must all be \[B\], but `sample_ids` is \[1\], `scores` is \[2\]"):
        writer.append(0, torch.tensor([1]), two, two, two)


@pytest.mark.parametrize(("sample_id", "size"), [(-1, None), (-1, 9), (9, 9), (2**40, None)])
def test_ids_without_a_place_in_the_table_are_named(tmp_path, sample_id, size):
    writer = LedgerWriter(tmp_path)
    writer.append(0, torch.tensor([3, sample_id]), *torch.ones(3, 2))
    writer.close()
    with pytest.raises(ValueError, match=rf"`size` must be more than every sample id.* got {size} and ids"):
        Ledger(tmp_path).counts(size)


def test_few_candidates_a_step_take_the_memory_of_many(tmp_path):
    """28 bytes a row, in one tensor a column."""
    writer = LedgerWriter(tmp_path, rows_per_file=1 << 12)
    for step in range(1000):
        writer.append(step, *candidates(step, size=2))
    assert sum(column.untyped_storage().nbytes() for column in writer._columns) <= 2 * 28 * 2000
    assert len(writer._columns) == 5


@pytest.mark.parametrize("sizes", [[7, 5], [3, 25], [30], [1] * 23], ids=str)
def test_candidate_batches_may_be_larger_than_a_file(tmp_path, sizes):
    writer, ids = LedgerWriter(tmp_path, rows_per_file=10), torch.arange(100)
    for step, size in enumerate(sizes):
        writer.append(step, ids[:size], *torch.ones(3, size))
    writer.close()
    rows = Ledger(tmp_path).rows()
    assert rows["sample_id"].to_pylist() == [i for size in sizes for i in range(size)]
    assert rows["step"].to_pylist() == [step for step, size in enumerate(sizes) for _ in range(size)]


def test_the_last_file_of_earlier_versions_is_read(tmp_path):
    write(tmp_path, range(3))
    expected = Ledger(tmp_path).rows()
    for file in tmp_path.glob("rank=0/*.parquet"):
        pq.write_table(pq.read_table(file).replace_schema_metadata(None), file, compression="zstd")
    assert Ledger(tmp_path).rows().equals(expected)
