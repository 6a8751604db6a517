"""Every way to name the samples that stay gives the same samples, or says what is wrong."""

import re

import numpy as np
import pytest
import torch
from stand_ins import EverySecond

from curation.instances import CoverageInstanceSelector, SelectionIndex, check_selection, read_selection

KEPT = [3, 5, 8]


def fitted():
    x, y = np.arange(10.0)[:, None] ** 2, np.repeat([0, 1], 5)
    return CoverageInstanceSelector(0.4, random_state=0).fit(x, y)


def mask():
    return np.isin(np.arange(10), KEPT)


@pytest.fixture
def ways(tmp_path):
    index = SelectionIndex(KEPT, [0.1, 0.2, 0.3], [2, 1, 0], size=10)
    index.save(tmp_path / "kept.parquet")
    np.save(tmp_path / "indices.npy", np.array([8, 5, 3]))
    np.save(tmp_path / "mask.npy", mask())
    return {
        "list": [8, 5, 3],
        "tuple": (8, 5, 3),
        "array": np.array([8, 5, 3], np.uint8),
        "tensor": torch.tensor([8, 5, 3]),
        "mask": mask(),
        "mask of Python": mask().tolist(),
        "mask of torch": torch.from_numpy(mask()),
        "index": index,
        "file": tmp_path / "kept.parquet",
        "file of indices": str(tmp_path / "indices.npy"),
        "file of a mask": tmp_path / "mask.npy",
    }


def test_every_way_names_the_same_samples(ways):
    for way, selection in ways.items():
        index = read_selection("index", check_selection("index", selection), 10)
        assert index.indices.tolist() == KEPT, way
        assert index.indices.dtype == np.int64
        if "mask" not in way:  # of which the order is that of the samples
            assert index.first(1).tolist() == [8], way


def test_a_fitted_selector_gives_its_choice_and_its_ranking():
    selector, bare = fitted(), EverySecond(1).fit(np.zeros((10, 1)))
    index = read_selection("index", check_selection("index", selector), 10)
    assert index.indices.tolist() == selector.sample_indices_.tolist()
    for m in range(1, 5):
        assert index.first(m).tolist() == sorted(selector.ranking_[:m])
    np.testing.assert_array_equal(index.scores, selector.scores_[index.indices])
    assert read_selection("index", check_selection("index", bare), 10).indices.tolist() == [1, 3, 5, 7, 9]
    kept = check_selection("index", selector)
    selector.fit(np.arange(40.0)[:, None], np.zeros(40))
    assert len(kept.indices) == 4  # what it chose when it was given


@pytest.mark.parametrize(
    "selection", [3, True, 1.5, None, [], ["x"], [0.5], [[1, 2]], torch.zeros(3), np.zeros(0, bool), {"a": 1}]
)
def test_what_names_no_samples_is_refused(selection):
    with pytest.raises(ValueError, match=f"^Argument `index` must be a path, .*{re.escape(repr(selection))}"):
        check_selection("index", selection)


def test_a_selector_that_was_not_fitted_is_refused():
    with pytest.raises(ValueError, match=r"Argument `index` must be fitted, .* but got CoverageInstanceSelector"):
        check_selection("index", CoverageInstanceSelector())


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ([3, 5, 3], r"must hold different samples of \[0, 10\), at least one, but got \[3 5 3\]"),
        ([3, 10], r"must hold different samples of \[0, 10\), .* but got \[ 3 10\]"),
        ([-1, 3], "must hold different samples"),
        ([False] * 10, "must hold different samples .* at least one"),
        ([True] * 9, "must be of the 10 training samples, but got one of 9"),
        (SelectionIndex([0], [0.0], [0], size=11), "must be of the 10 training samples, but got one of 11"),
        ("nowhere.npy", "must name a selection, but of 'nowhere.npy': there is no such file"),
        ("numbers.npy", "must name a selection, but of 'numbers.npy': Argument `index` must be a path"),
        ("text.npy", "must name a selection, but of 'text.npy'"),
        ("nine.npy", "must be of the 10 training samples, but got 'nine.npy' of 9"),
    ],
)
def test_a_selection_of_other_samples_is_refused(selection, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("numbers.npy", np.ones(3))
    np.save("nine.npy", np.ones(9, bool))
    (tmp_path / "text.npy").write_text("no array")
    with pytest.raises(ValueError, match=f"^Argument `index` {message}"):
        read_selection("index", check_selection("index", selection), 10)
