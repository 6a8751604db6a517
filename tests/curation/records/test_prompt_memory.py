"""The memory of prompts, against lists of all their outcomes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from twins import PromptMemoryTwin

from curation.records import PromptMemory

# ids may repeat; None is a prompt without answers
steps = st.lists(
    st.lists(st.tuples(st.integers(-1, 5), st.one_of(st.none(), st.integers(0, 8))), min_size=1, max_size=8),
    max_size=12,
)


@given(steps, st.sampled_from([0.0, 0.5, 1.0]))
def test_it_holds_what_follows_from_all_outcomes(batches, decay):
    memory, twin = PromptMemory(6, decay=decay), PromptMemoryTwin(6, 8, decay)
    visits, last = [0] * 6, [-1] * 6
    for step, batch in enumerate(batches):
        ids = torch.tensor([i for i, _ in batch])
        shares = torch.tensor([math.nan if wrong is None else wrong / 8 for _, wrong in batch])
        memory.update(ids, shares, 8, step)
        for i, wrong in {i: wrong for i, wrong in reversed(batch)}.items():
            if i >= 0 and wrong is not None:
                twin.groups[i].append(wrong / 8)
                visits[i], last[i] = visits[i] + 1, step
    assert memory.visits.tolist() == visits
    assert memory.last.tolist() == last
    assert memory.solved.tolist() == [twin.solved(i) for i in range(6)]
    assert memory.failed.tolist() == [twin.failed(i) for i in range(6)]
    for i in range(6):
        assert (float(memory.successes[i]), float(memory.trials[i])) == pytest.approx(twin.counts(i))
        assert math.isnan(memory.rate[i]) == (not twin.groups[i])


def test_one_answer_is_counted_as_one():
    memory = PromptMemory(2, decay=0.5)
    for _ in range(2):
        memory.update(torch.tensor([0, 1]), torch.tensor([0.0, 1.0]), 1, 0)
    assert memory.successes.tolist() == [1.5, 0]
    assert memory.trials.tolist() == [1.5, 1.5]


def test_exploration_moves_towards_the_share_that_is_wanted():
    memory = PromptMemory(8)
    shares = torch.tensor([0.0, 0.5, 0.5, 0.5, 0.5, 0.5, 1.0, math.nan])  # a seventh all right, a seventh all wrong
    memory.adapt(shares, target=0.3, by=0.01)  # a tenth and a fifth are wanted
    assert memory.explore.tolist() == pytest.approx([0.49, 0.51])
    for _ in range(100):
        memory.adapt(shares, target=0.3, by=0.01)
    assert memory.explore.tolist() == pytest.approx([0.05, 0.95])


def filled(decay=0.5):
    memory = PromptMemory(3, decay=decay)
    memory.update(torch.tensor([2, 0]), torch.tensor([0.0, 0.25]), 8, 4)
    memory.adapt(torch.tensor([0.0, 0.25]), 0.25, 0.01)
    return memory


def same(a, b):
    return all(torch.equal(a.state_dict()[name], b.state_dict()[name]) for name in a.state_dict())


def test_a_file_holds_all_of_it(tmp_path):
    memory, again = filled(), PromptMemory(3)
    memory.save(tmp_path / "memory.parquet", "abc", length=[1.0, 2.0, 3.0])
    table = again.read(tmp_path / "memory.parquet", "abc")
    assert same(memory, again)
    assert table["length"].to_pylist() == [1, 2, 3]
    assert table["pass_rate"].to_pylist()[2] == 1
    again.update(torch.tensor([1]), torch.tensor([1.0]), 8, 5)  # what was read can be written to
    assert not same(memory, again)


@pytest.mark.parametrize(("size", "prompts"), [(4, "abc"), (3, "def")])
def test_a_file_of_other_prompts_is_refused(tmp_path, size, prompts):
    filled().save(tmp_path / "memory.parquet", "abc")
    with pytest.raises(
        ValueError, match=f"is of other prompts: it has 3 of 'abc', and here are {size} of '{prompts}'"
    ):
        PromptMemory(size).read(tmp_path / "memory.parquet", prompts)


def test_what_is_no_memory_is_refused(tmp_path):
    (tmp_path / "x.parquet").write_text("x")
    for name in ("x.parquet", "none.parquet"):
        with pytest.raises(ValueError, match=f"must be a file of `PromptMemory`, but got '.*{name}'"):
            PromptMemory(3).read(tmp_path / name)


def test_wrong_arguments_are_named():
    memory = PromptMemory(3)
    with pytest.raises(ValueError, match=r"Argument `right` must be below `wrong`, 0.5, but got 0.5"):
        PromptMemory(3, right=0.5, wrong=0.5)
    with pytest.raises(ValueError, match="Argument `shares` must be "):
        memory.update(torch.tensor([0]), torch.tensor([0.0, 1.0]), 8, 0)
    with pytest.raises(ValueError, match="Argument `answers` must be an integer >= 1, but got 0"):
        memory.update(torch.tensor([0]), torch.tensor([0.0]), 0, 0)
    with pytest.raises(ValueError, match="is of 3 samples, not 4"):
        PromptMemory(4).load_state_dict(memory.state_dict())
