import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from curation.sample_ids import SampleIds
from curation.samplers import lengths_of

ROWS = [[1, 2, 3], [4], [5, 6]]


class Texts(Dataset):
    read = 0

    def __len__(self):
        return 9000

    def __getitem__(self, i):
        type(self).read += 1
        return {"input_ids": torch.zeros(i % 7 + 1)}


def test_a_column_of_lengths_or_of_lists():
    rows = datasets.Dataset.from_dict({"input_ids": ROWS})
    assert lengths_of(rows).tolist() == lengths_of(SampleIds(rows)).tolist() == [3, 1, 2]
    assert lengths_of(rows.select([2, 0])).tolist() == [2, 3]
    assert lengths_of(rows.add_column("length", [7, 8, 9])).tolist() == [7, 8, 9]
    assert lengths_of(rows.rename_column("input_ids", "tokens"), "tokens").tolist() == [3, 1, 2]


@pytest.mark.parametrize("workers", [0, 2])
def test_any_data_set_is_read_once(workers):
    Texts.read = 0
    lengths = lengths_of(Texts(), num_workers=workers)
    assert lengths.dtype == np.int32
    assert lengths.tolist() == [i % 7 + 1 for i in range(9000)]
    assert Texts.read == (0 if workers else 9000)  # of this process


def test_a_function_of_a_sample():
    assert lengths_of([("a b", 0), ("c", 1)], lambda sample: len(sample[0].split())).tolist() == [2, 1]


def test_a_file_keeps_them(tmp_path):
    file = tmp_path / "lengths.arrow"
    first = lengths_of(Texts(), cache=file)
    Texts.read = 0
    assert lengths_of(Texts(), cache=file).tolist() == first.tolist()
    assert Texts.read < 100  # those of the fingerprint
    with pytest.raises(ValueError, match="`cache` must be of this data set of 3 samples"):
        lengths_of([{"input_ids": row} for row in ROWS], cache=file)
    file.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="`cache` must name a file of lengths"):
        lengths_of(Texts(), cache=file)


@pytest.mark.parametrize(
    ("dataset", "how", "message"),
    [
        (
            [{"x": [1]}],
            {},
            "`length` must name a field .* such as `len`, but got 'input_ids' for a sample with x",
        ),
        ([(1, 2)], {}, "but got 'input_ids' for a sample a tuple"),
        ([{"input_ids": []}], {}, "sample 0 has 0"),
        (datasets.Dataset.from_dict({"x": ROWS}), {}, "`length` must name a column, x, but got 'input_ids'"),
        ([{"input_ids": [1]}], {"num_workers": -1}, "`num_workers` must be"),
    ],
)
def test_what_has_no_length_is_named(dataset, how, message):
    with pytest.raises(ValueError, match=message):
        lengths_of(dataset, **how)
