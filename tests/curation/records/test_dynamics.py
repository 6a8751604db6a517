"""Moments of every sample over its visits, against lists of the visits, and the file that holds them."""

import io
import itertools
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from curation.records import DynamicsStore, SampleDynamics
from curation.records.dynamics import COLUMNS
from curation.tables import write_table

SIZE, CLASSES = 5, 3
value = st.floats(-8, 8, width=16)
visit = st.tuples(
    st.integers(-1, SIZE - 1),  # id
    st.one_of(value, st.just(float("nan"))),  # loss
    value,  # margin
    st.floats(0, 1, width=16),  # probability
    st.booleans(),  # right
    st.integers(0, CLASSES - 1),  # label
    st.integers(0, CLASSES - 1),  # rival
    st.sampled_from([0.0, 0.25, 0.5]),  # its probability, exact in sums
    st.integers(0, 9),  # worst
)
steps = st.lists(st.lists(visit, min_size=1, max_size=6), max_size=8)


def entered(batches):
    """Visits of each sample in their order: the first row of an id in a step, unless its loss is not a number."""
    visits = {i: [] for i in range(SIZE)}
    for batch in batches:
        seen = set()
        for i, *values in batch:
            if i >= 0 and i not in seen and values[0] == values[0]:
                visits[i].append(values)
            seen.add(i)
    return visits


def fill(store, batches):
    for batch in batches:
        ids, *columns = zip(*batch, strict=True)
        outcomes = torch.tensor(columns, dtype=torch.float32).T
        store.update(torch.tensor(ids), outcomes)
    return store


@given(steps)
def test_the_record_equals_lists_of_visits(batches):
    store = fill(DynamicsStore(SIZE), batches)
    dynamics = SampleDynamics.of_store(store)
    for i, visits in entered(batches).items():
        assert dynamics["visits"][i] == len(visits)
        if not visits:
            assert np.isnan(dynamics["margin"][i])
            assert dynamics["suggested"][i] == dynamics["label"][i] == -1
            continue
        loss, margin, probability, right, label, rival, weight, worst = zip(*visits, strict=True)
        for name, column in (("loss", loss), ("margin", margin), ("probability", probability)):
            assert dynamics[name][i] == pytest.approx(statistics.fmean(column), abs=1e-4)
            assert dynamics[f"{name}_deviation"][i] == pytest.approx(statistics.pstdev(column), abs=1e-3)
        assert dynamics["rival_probability"][i] == pytest.approx(statistics.fmean(weight), abs=1e-4)
        assert dynamics["last_loss"][i] == loss[-1]
        assert dynamics["right"][i] == sum(right)
        assert dynamics["forgotten"][i] == sum(a and not b for a, b in itertools.pairwise(right))
        assert (dynamics["label"][i], dynamics["worst"][i]) == (label[-1], worst[-1])
        votes = {c: sum(w for r, w in zip(rival, weight, strict=True) if r == c) for c in range(CLASSES)}
        best = max(votes, key=votes.get)
        if votes[best] > sum(votes.values()) / 2:  # else any may be named
            assert dynamics["suggested"][i] == best


@given(steps)
def test_a_saved_record_goes_on_to_the_bit(batches):
    half = fill(DynamicsStore(SIZE), batches[: len(batches) // 2])
    file = io.BytesIO()
    torch.save(half.state_dict(), file)
    file.seek(0)
    resumed = DynamicsStore(SIZE)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    fill(resumed, batches[len(batches) // 2 :])
    assert repr(resumed.state_dict()) == repr(fill(DynamicsStore(SIZE), batches).state_dict())


def test_bytes_of_a_sample_are_those_that_are_stated():
    store = DynamicsStore(3)
    assert sum(column.element_size() for column in store.state_dict().values()) == 61


def test_a_file_gives_the_record_back(tmp_path):
    batch = [(2, 0.5, 1.0, 0.75, True, 1, 2, 0.25, 0), (0, 1.5, -1.0, 0.25, False, 0, 2, 0.5, 0)]
    dynamics = SampleDynamics.of_store(fill(DynamicsStore(SIZE), [batch]), "abc")
    dynamics.save(tmp_path / "dynamics.parquet")
    again = SampleDynamics.load(tmp_path / "dynamics.parquet")
    assert (again.fingerprint, again.kind, again.classes, len(again)) == ("abc", "classes", 3, SIZE)
    for name in COLUMNS:
        np.testing.assert_array_equal(again[name], dynamics[name])


@pytest.mark.parametrize(("margin", "kind"), [(0.5, "sequences"), (float("nan"), "losses")])
def test_records_without_classes_say_what_they_are(margin, kind):
    store = fill(DynamicsStore(SIZE), [[(1, 0.5, margin, margin, True, -1, -1, 0.0, 3)]])
    assert SampleDynamics.of_store(store).kind == kind


def test_what_is_no_record_is_refused(tmp_path):
    with pytest.raises(ValueError, match="A file of `TrainingDynamics` is needed, but there is no such file"):
        SampleDynamics.load(tmp_path / "none.parquet")
    write_table(tmp_path / "other.parquet", {"x": np.arange(3)})
    with pytest.raises(ValueError, match=r"that is another: .*other\.parquet"):
        SampleDynamics.load(tmp_path / "other.parquet")
    with pytest.raises(ValueError, match=r"Argument `columns` must hold \[3\] of 'right', but got None"):
        SampleDynamics({"visits": np.zeros(3)})
    with pytest.raises(ValueError, match=r"Argument `outcomes` must be \[1, 8\], but got \[1, 2\]"):
        DynamicsStore(3).update(torch.tensor([0]), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="A sample id is 7, but the record is of 3 samples"):
        DynamicsStore(3).update(torch.tensor([7]), torch.zeros(1, 8))
