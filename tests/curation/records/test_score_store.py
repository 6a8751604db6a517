"""The record of every sample, against dictionaries."""

import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from curation.records.score_store import ScoreStore

SIZE = 6
entry = st.tuples(st.integers(-1, SIZE - 1), st.floats(-100, 100, width=32), st.integers(0, 2))


@given(st.lists(st.lists(entry, min_size=1, max_size=8), max_size=8))
def test_the_record_equals_dictionaries(batches):
    store = ScoreStore(SIZE)
    scores, steps, seen, kept = {}, {}, {}, {}
    for step, batch in enumerate(batches):
        ids, values, times = (list(x) for x in zip(*batch, strict=True))
        store.update(torch.tensor(ids), torch.tensor(values), torch.tensor(times), step)
        for i in set(ids):
            scores[i] = max(v for j, v in zip(ids, values, strict=True) if i == j)
            steps[i] = step
        for i, t in zip(ids, times, strict=True):
            seen[i] = seen.get(i, 0) + 1
            kept[i] = kept.get(i, 0) + t
    for i in range(SIZE):
        assert store.steps[i] == steps.get(i, -1)
        assert store.seen[i] == seen.get(i, 0)
        assert store.kept[i] == kept.get(i, 0)
        got = float(store.scores[i])
        assert got == scores[i] if i in scores else math.isnan(got)


def test_state_goes_through_a_checkpoint():
    store = ScoreStore(4)
    store.update(torch.tensor([1, 3]), torch.tensor([0.5, 2.0]), torch.tensor([1, 0]), 9)
    file = io.BytesIO()
    torch.save(store.state_dict(), file)
    file.seek(0)
    other = ScoreStore(4)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert repr(other.state_dict()) == repr(store.state_dict())


def test_a_record_of_other_data_is_refused():
    with pytest.raises(ValueError, match="record in the checkpoint is of 4 samples, not 5"):
        ScoreStore(5).load_state_dict(ScoreStore(4).state_dict())
    with pytest.raises(ValueError, match="Argument `size` must be an integer >= 1, but got 0"):
        ScoreStore(0)


@pytest.mark.parametrize(
    ("ids", "scores", "error", "message"),
    [
        ([0, 4], 2, ValueError, "A sample id is 4, but the record is of 4 samples"),
        ([0, -2], 2, ValueError, "A sample id is -2, but the record is of 4 samples"),
        ([0, 1], 3, ValueError, r"`ids`, `scores` and `kept` must be \[B\], but got \[2\], \[3\], \[3\]"),
        ([0.0, 1.0], 2, TypeError, "`ids` must be int64, but got torch.float32"),
    ],
)
def test_ids_of_no_sample_are_refused_and_nothing_is_entered(ids, scores, error, message):
    store = ScoreStore(4)
    with pytest.raises(error, match=message):
        store.update(torch.tensor(ids), torch.ones(scores), torch.ones(scores), 0)
    assert not store.seen.any()
    assert store.scores.isnan().all()


def test_a_batch_of_no_candidates_changes_nothing():
    store = ScoreStore(4)
    store.update(torch.zeros(0, dtype=torch.int64), torch.zeros(0), torch.zeros(0), 0)
    assert not store.seen.any()
