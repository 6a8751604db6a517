"""An index comes back from its file, and a fingerprint tells data sets apart."""

import json
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Dataset

from curation.instances.selection_index import SelectionIndex, fingerprint
from curation.sample_ids import SampleIds


def index(**changes):
    parts = {"indices": [1, 4, 6, 9], "scores": [0.1, 0.4, 0.3, 0.2], "ranks": [3, 0, 1, 2], "size": 10}
    return SelectionIndex(**{**parts, **changes})


def test_a_smaller_selection_is_the_best_of_it():
    assert [index().first(m).tolist() for m in (1, 2, 3, 4)] == [[4], [4, 6], [4, 6, 9], [1, 4, 6, 9]]
    for m in (0, 5):
        with pytest.raises(ValueError, match=rf"Argument `m` must be an integer in \[1, 5\), but got {m}"):
            index().first(m)


def test_it_comes_back_from_its_file(tmp_path):
    made = index(fingerprint="abc", config=json.dumps({"budget": 0.4}))
    path = tmp_path / "new folder" / "kept.parquet"
    made.save(path)
    again = SelectionIndex.load(path)
    for name in ("indices", "scores", "ranks"):
        one, other = getattr(made, name), getattr(again, name)
        assert one.dtype == other.dtype
        assert one.tolist() == other.tolist()
    assert (again.size, again.fingerprint, again.config, len(again)) == (10, "abc", '{"budget": 0.4}', 4)
    assert [made.indices.dtype, made.scores.dtype, made.ranks.dtype] == ["int64", "float32", "int64"]
    assert pq.read_table(path).column_names == ["index", "score", "rank"]
    assert os.listdir(path.parent) == ["kept.parquet"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "kept.parquet"
    index().save(path)

    def fails(table, part, **options):
        open(part, "w").close()
        raise OSError("disk full")

    monkeypatch.setattr(pq, "write_table", fails)
    with pytest.raises(OSError, match="disk full"):
        index(fingerprint="new").save(path)
    assert SelectionIndex.load(path).fingerprint == ""
    assert os.listdir(tmp_path) == ["kept.parquet"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"indices": [4, 1, 6, 9]}, "`indices` must rise strictly"),
        ({"indices": [1, 4, 4, 9]}, "`indices` must rise strictly"),
        ({"indices": [1, 4, 6, 10]}, r"must be in \[0, 10\), .* but got 1 to 10"),
        ({"indices": [-1, 4, 6, 9]}, r"must be in \[0, 10\), .* but got -1 to 9"),
        ({"indices": [1.0, 4.0, 6.0, 9.0]}, r"`indices` must be int64 \[4\].* but got float64"),
        ({"scores": [0.1]}, r"`scores` must be float32 \[4\], one for each index, but got float64 \[1\]"),
        ({"ranks": [0, 1, 2]}, r"`ranks` must be int64 \[4\].* but got int64 \[3\]"),
        ({"ranks": [0, 1, 1, 2]}, "each of 0 to 3 once"),
        ({"indices": np.zeros(0, int), "scores": [], "ranks": np.zeros(0, int)}, "not be empty"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        index(**changes)


def test_missing_and_foreign_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"SelectionIndex.save.*there is no such file: '.*nowhere"):
        SelectionIndex.load(tmp_path / "nowhere")
    (tmp_path / "text").write_text("not Parquet")
    pq.write_table(pa.table({"index": [1], "score": [0.1], "rank": [0]}), tmp_path / "bare")
    pq.write_table(pa.table({"x": [1]}), tmp_path / "other")
    for name in ("text", "bare", "other"):
        with pytest.raises(ValueError, match=f"SelectionIndex.save.*that is another: '.*{name}"):
            SelectionIndex.load(tmp_path / name)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """An index, the bytes of its file, and a path for damaged ones."""
    draw = np.random.default_rng(0)
    made = SelectionIndex(
        np.sort(draw.permutation(900)[:200]), draw.random(200), draw.permutation(200), 900, "abc", '{"budget": 0.2}'
    )
    path = tmp_path_factory.mktemp("index") / "damaged.parquet"
    made.save(path)
    return made, path.read_bytes(), path


@given(st.data())
def test_a_damaged_file_is_refused_by_its_name_or_holds_the_same(written, d):
    """Flipped bits and files cut short; what nobody reads, such as the name of the writer, may change."""
    made, whole, path = written
    content = bytearray(whole)
    for place in d.draw(st.lists(st.integers(0, len(whole) - 1), max_size=3)):
        content[place] ^= 1 << d.draw(st.integers(0, 7))
    path.write_bytes(content[: d.draw(st.sampled_from([len(whole), len(whole) - 1, len(whole) // 2, 9, 0]))])
    try:
        same = all(
            np.array_equal(getattr(SelectionIndex.load(path), part), getattr(made, part))
            for part in ("indices", "scores", "ranks", "size", "fingerprint", "config")
        )
    except ValueError as error:
        same = "damaged.parquet" in str(error)
    assert same


def test_files_of_earlier_versions_load_and_what_does_not_fit_is_named(tmp_path):
    table = pa.table({"index": [1, 4], "score": [0.1, 0.4], "rank": [1, 0]})
    metadata = {"size": "5", "fingerprint": "", "config": "{}"}
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "old")
    assert SelectionIndex.load(tmp_path / "old").first(1).tolist() == [4]
    pq.write_table(table.replace_schema_metadata({**metadata, "size": "3"}), tmp_path / "small")
    with pytest.raises(ValueError, match=r"that is another: '.*small"):
        SelectionIndex.load(tmp_path / "small")


class Rows(Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


class Picture:
    """Like one of PIL: an array, with an address in its representation."""

    def __init__(self, value):
        self.value = np.full((2, 2), value)
        self.__array_interface__ = self.value.__array_interface__


class Thing:
    pass


SAMPLES = {
    "tensors": lambda v: (torch.full((200, 10), float(v)), 3),
    "half precision": lambda v: {"x": torch.tensor(v, dtype=torch.bfloat16)},
    "arrays": lambda v: (np.r_[np.zeros(5000), v, np.zeros(5000)], "name"),
    "objects": lambda v: {"names": np.array([v, "b"], object)},
    "pictures": lambda v: (Picture(v), 0),
    "text": lambda v: {"text": f"number {v}", "thing": Thing()},
    "lists": lambda v: {"ids": [1, 2, v], "label": 0},
}


@pytest.mark.parametrize("kind", SAMPLES)
def test_a_fingerprint_sees_the_values(kind):
    def rows(*values):
        return Rows([SAMPLES[kind](value) for value in values])

    assert fingerprint(rows(1, 2, 3)) == fingerprint(rows(1, 2, 3))
    others = [rows(1, 2, 4), rows(1, 2), rows(2, 1, 3), rows(1, 2, 3, 3)]
    assert len({fingerprint(other) for other in [rows(1, 2, 3), *others]}) == 5


def test_dtype_and_shape_count():
    values = [torch.zeros(4), torch.zeros(2, 2), torch.zeros(4, dtype=torch.int32), np.zeros(4, np.float32)]
    found = {fingerprint([(torch.zeros(1), value)]) for value in values}
    assert len(found) == 4


def test_sample_ids_do_not_count():
    for kind in ("tensors", "text"):
        rows = Rows([SAMPLES[kind](value) for value in range(5)])
        assert fingerprint(SampleIds(rows)) == fingerprint(rows)


def test_few_samples_of_a_long_data_set_are_looked_at_and_no_stream_moves():
    seen = []

    class Noisy(Rows):
        def __getitem__(self, i):
            seen.append(i)
            return torch.rand(3) + np.random.rand()

    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    one, other = fingerprint(Noisy(range(100_000))), fingerprint(Noisy(range(100_000)))
    assert one == other
    assert len(seen) == 128
    assert (seen[0], seen[63]) == (0, 99_999)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()


def test_a_fingerprint_is_the_same_in_another_process():
    code = (
        "import numpy as np, torch\n"
        "from curation.instances.selection_index import fingerprint\n"
        "class Thing: pass\n"
        "print(fingerprint([{'x': torch.ones(2), 'y': np.ones(2), 'z': {'a'}, 't': Thing()}]))\n"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
        for _ in range(2)
    ]
    assert runs[0] == runs[1]


def test_neither_lightning_nor_scikit_learn_is_needed():
    code = (
        "import sys, curation.instances, curation.instances.selection_index, curation.samplers.subset\n"
        "assert not {'lightning', 'sklearn'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
