"""A file is replaced as a whole or not at all."""

import errno
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from curation.files import replacing
from curation.instances import SelectionIndex
from curation.records import LedgerWriter
from curation.samplers import ConceptIndex


def test_a_url_is_no_folder_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("s3://bucket/run.json", Path("memory://run.json")):
        url = "Argument `path` must be a path on this machine, but got the URL"
        with pytest.raises(ValueError, match=url), replacing(path):
            pass
        with pytest.raises(ValueError, match="Argument `path` must be a path on this machine"):
            LedgerWriter(path)
    assert list(tmp_path.iterdir()) == []


def test_a_new_file_and_its_folders_are_made(tmp_path):
    path = tmp_path / "a" / "b" / "kept.txt"
    with replacing(str(path)) as new:
        new.write_text("whole")
        assert new.parent == path.parent
        assert new.suffix == ".txt"
        assert not path.exists()
    assert path.read_text() == "whole"
    assert os.listdir(path.parent) == ["kept.txt"]


@pytest.mark.parametrize("error", [KeyError("x"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_an_error_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "kept.txt"
    path.write_text("old")

    def fail():
        with replacing(path) as new:
            new.write_text("ha")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["kept.txt"]


def test_a_full_disk_names_the_path(tmp_path, monkeypatch):
    def write_text(self, text):
        self.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail():
        with replacing(tmp_path / "kept.txt") as new:
            new.write_text("whole")

    monkeypatch.setattr(Path, "write_text", write_text)
    with pytest.raises(OSError, match=r"No space left.*kept\.txt") as caught:
        fail()
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path / "kept.txt")
    assert os.listdir(tmp_path) == []


def test_an_error_without_a_number_keeps_its_message(tmp_path):
    with pytest.raises(OSError, match=r"the disk is full.*kept\.txt"), replacing(tmp_path / "kept.txt"):
        raise OSError("the disk is full")


def test_an_error_of_another_file_is_left_alone(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, replacing(tmp_path / "kept.txt"):
        (tmp_path / "missing.txt").read_text()
    assert caught.value.filename == str(tmp_path / "missing.txt")


def test_a_block_that_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"kept\.txt"), replacing(tmp_path / "kept.txt"):
        pass


def test_a_folder_that_cannot_be_made_names_the_path(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"), replacing(tmp_path / "file" / "kept.txt") as new:
        new.write_text("whole")


def test_the_target_of_a_link_is_replaced(tmp_path):
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "kept.txt", tmp_path / "link.txt"
    target.write_text("old")
    link.symlink_to(target)
    with replacing(link) as new:
        new.write_text("whole")
    assert link.is_symlink()
    assert target.read_text() == link.read_text() == "whole"


def killed(path):
    with replacing(path) as new:
        new.write_text("ha")
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_leaves_the_old_file(tmp_path):
    path = tmp_path / "kept.txt"
    path.write_text("old")
    process = multiprocessing.get_context("fork").Process(target=killed, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert path.read_text() == "old"
    (unfinished,) = set(os.listdir(tmp_path)) - {"kept.txt"}
    assert unfinished.startswith(".")


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_files_of_the_package_survive_a_full_disk(tmp_path, monkeypatch):
    selection, concepts = tmp_path / "kept.parquet", tmp_path / "tags.arrow"
    SelectionIndex(np.arange(2), np.zeros(2), np.arange(2), size=3).save(selection)
    ConceptIndex.from_lists([["a"], ["b"]]).save(concepts)
    writer = LedgerWriter(tmp_path / "ledger")
    writer.append(0, torch.tensor([1]), *torch.ones(3, 1))
    writer.flush()
    writer.append(1, torch.tensor([2]), *torch.ones(3, 1))
    files = {file: file.read_bytes() for file in tmp_path.rglob("*.*") if file.is_file()}
    assert len(files) == 3
    monkeypatch.setattr(pq, "write_table", full)
    monkeypatch.setattr("pyarrow.ipc.new_file", full)
    for write, name in (
        (lambda: SelectionIndex(np.arange(3), np.zeros(3), np.arange(3), size=3).save(selection), "kept.parquet"),
        (lambda: ConceptIndex.from_lists([["c"]]).save(concepts), "tags.arrow"),
        (writer.flush, "00000000.parquet"),
    ):
        with pytest.raises(OSError, match=f"No space left.*{name}"):
            write()
    assert {file: file.read_bytes() for file in tmp_path.rglob("*.*") if file.is_file()} == files


def test_an_index_can_be_saved_to_the_file_that_it_lies_in(tmp_path):
    path = tmp_path / "tags.arrow"
    ConceptIndex.from_lists([["a"], ["b", "a"]]).save(path)
    mapped = ConceptIndex.load(path)
    mapped.save(path)
    assert mapped[1].tolist() == ConceptIndex.load(path)[1].tolist() == [0, 1]
