"""The estimator of every scope, and states that were saved before each had its own."""

import pytest
import torch

from curation.callbacks.experts.estimators import GLOBAL, LOCAL, DeferredEstimator, make_estimator
from curation.experts.window import Window

COUNTS = torch.tensor([[3, 1, 4]])
PAIRS = [("global", name) for name in GLOBAL] + [(scope, "running") for scope in LOCAL]


def saved():
    """A state with the windows of all processes and of one, and the counts of a window that was looked at before."""
    every, single = Window(), Window()
    every.add(2 * COUNTS, 4)
    single.add(COUNTS, 4)
    return {"window": every.state_dict(), "own": single.state_dict(), "exact": (8 * COUNTS, 4)}


@pytest.mark.parametrize(("scope", "name"), PAIRS)
def test_old_states_are_read_and_new_ones_come_back(scope, name):
    first, second = make_estimator(scope, name), make_estimator(scope, name)
    first.load_state_dict(saved(), torch.device("cpu"))
    assert torch.equal(first.window.counts, 2 * COUNTS)
    assert not first.window.closed
    second.load_state_dict(first.state_dict(), torch.device("cpu"))
    assert str(second.state_dict()) == str(first.state_dict())
    if scope == "rank":
        assert torch.equal(second.process_window.counts, COUNTS)
    if name == "prepass":
        assert torch.equal(second.whole[0], 8 * COUNTS)
        assert second.whole[1] == 4
    second.close_window()
    assert second.window.closed


@pytest.mark.parametrize("scope", LOCAL)
@pytest.mark.parametrize("name", [name for name in GLOBAL if name != "running"])
def test_estimates_of_later_micro_batches_are_for_the_global_scope_alone(scope, name):
    with pytest.raises(ValueError, match=f"`estimator` must be 'running' with the scope '{scope}', but got '{name}'"):
        make_estimator(scope, name)


def test_only_the_estimators_that_need_them_ask_for_inputs_and_sequences():
    made = {pair: make_estimator(*pair) for pair in PAIRS}
    assert [type(estimator) for estimator in made.values() if estimator.stores_inputs] == [DeferredEstimator]
    assert [scope for (scope, _), estimator in made.items() if estimator.uses_sequences] == ["sequence"]
