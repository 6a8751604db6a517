"""Threshold samples, corrections and conflicting pairs."""

import numpy as np
import pytest
import torch
from helpers import data
from hypothesis import given
from hypothesis import strategies as st

from curation.audit import CorrectedDataset, Corrections, ThresholdSamples, conflicting_pairs, label_of
from curation.instances.selection_index import fingerprint
from curation.tables import write_table

PAIRS = [(str(i), i % 3) for i in range(30)]


@given(st.integers(0, 50), st.sampled_from([0.1, 0.5]))
def test_threshold_samples_have_wrong_labels_and_others_their_own(seed, share):
    samples = ThresholdSamples(PAIRS, 3, share, seed=seed)
    assert len(samples.ids) == round(30 * share)
    assert len(samples) == 30
    for i in range(30):
        assert samples[i][0] == PAIRS[i][0]
        assert (samples[i][1] != PAIRS[i][1]) == (i in samples.ids)
        assert samples[i][1] in range(3)
        assert samples[i - 30] == samples[i]


def test_wrong_labels_are_drawn_from_all_others_and_a_spare_class_is_of_its_own():
    many = [("x", 1)] * 3000
    drawn = np.bincount([y for _, y in ThresholdSamples(many, 4, 0.999)], minlength=4)
    assert drawn[1] == 3
    assert (drawn[[0, 2, 3]] > 900).all()
    spare = ThresholdSamples(PAIRS, 3, 0.5, spare=True)
    assert {spare[i][1] for i in spare.ids.tolist()} == {3}
    with pytest.raises(ValueError, match=r"Argument `share` must choose a sample of 30, but got 0.01"):
        ThresholdSamples(PAIRS, 3, 0.01)


@pytest.mark.parametrize(
    "sample", [("x", torch.tensor(2)), {"x": 1, "label": 2}, {"labels": np.int64(2), "y": 0}, ["x", 2, "more"]]
)
def test_a_label_keeps_its_type(sample):
    changed = CorrectedDataset([sample], Corrections(np.ones(1), np.array([5])))[0]
    assert label_of(changed) == 5
    assert type(label_of(changed)) is type(label_of(sample))
    assert label_of(sample) == 2
    assert len(changed) == len(sample)


def test_weights_are_added_and_labels_replaced(tmp_path):
    weights, labels = np.ones(64), np.full(64, -1)
    weights[3], labels[5] = 0.25, 2
    Corrections(weights, labels, fingerprint(data())).save(tmp_path / "corrections.parquet")
    corrected = CorrectedDataset(data(), tmp_path / "corrections.parquet")
    for i, (x, y) in enumerate(data()):
        got = corrected[i]
        assert torch.equal(got[0], x)
        assert int(got[1]) == (2 if i == 5 else int(y))
        assert got[2] == weights[i]
    assert len(CorrectedDataset(data(), Corrections(np.ones(64), labels))[5]) == 2
    mapping = CorrectedDataset([{"text": "a"}], Corrections(np.array([0.5]), np.array([-1])))
    assert mapping[0] == {"text": "a", "weight": 0.5}


def test_corrections_of_other_data_are_refused(tmp_path):
    corrections = Corrections(np.ones(64), np.full(64, -1), fingerprint(data(seed=2)))
    with pytest.raises(ValueError, match="`corrections` must be of this data set, but its samples are others"):
        CorrectedDataset(data(), corrections)
    with pytest.raises(ValueError, match=r"must be of the 30 samples of the data set, but is of\s+64"):
        CorrectedDataset(PAIRS, corrections)
    with pytest.raises(ValueError, match="there is no such file"):
        CorrectedDataset(PAIRS, tmp_path / "none.parquet")
    write_table(tmp_path / "other.parquet", {"x": np.arange(3)})
    with pytest.raises(ValueError, match="that is another"):
        CorrectedDataset(PAIRS, tmp_path / "other.parquet")
    for weights in ([-1.0], [np.nan]):
        with pytest.raises(ValueError, match=r"Argument `weights` must be \[N\], finite and not negative"):
            Corrections(np.array(weights), np.array([1]))
    with pytest.raises(TypeError, match=r"A sample must be a tuple \(x, y, ...\) or a mapping .* but is a dict with"):
        CorrectedDataset([{"text": "a"}], Corrections(np.ones(1), np.array([1])))[0]


def test_conflicting_pairs_are_those_of_all_distances():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(120, 4)).astype(np.float32)
    x[60:70] = x[:10] + 1e-3
    y = generator.integers(0, 3, 120)
    pairs, distances = conflicting_pairs(x, y, neighbours=3, quantile=0.05)
    edges = {}
    for i in range(120):
        lengths = np.linalg.norm(x - x[i], axis=1)
        lengths[i] = np.inf
        for j in np.argsort(lengths)[:3]:
            edges[i, int(j)] = lengths[j]
    longest = sorted(edges.values())[round(0.05 * (len(edges) - 1))]
    expected = {tuple(sorted(e)) for e, length in edges.items() if length <= longest and y[e[0]] != y[e[1]]}
    assert {tuple(pair) for pair in pairs.tolist()} == expected
    assert len(expected) >= 3
    assert distances.tolist() == sorted(distances.tolist())
    with pytest.raises(ValueError, match=r"Argument `features` must be \[2, D\], but got \[3, 1\]"):
        conflicting_pairs(np.zeros((3, 1)), np.zeros(2))
