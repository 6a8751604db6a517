"""The comparison of steps that select with full ones."""

import pytest

from curation.online.break_even import AGAIN_AFTER, PAIRS, BreakEven


def run(controller, steps, full, selecting):
    modes = []
    for _ in range(steps):
        modes.append(controller.selects)
        controller.add(selecting if controller.selects else full)
    return modes


@pytest.mark.parametrize(("full", "selecting"), [(3.0, 2.0), (2.0, 3.0)])
def test_the_faster_step_is_taken_after_the_comparison(full, selecting):
    controller = BreakEven()
    modes = run(controller, 2 * PAIRS + AGAIN_AFTER, full, selecting)
    assert modes[: 2 * PAIRS] == [True, False] * PAIRS
    assert set(modes[2 * PAIRS :]) == {selecting < full}
    assert controller.predicted_speedup == pytest.approx(full / selecting)
    assert controller.realised_speedup == pytest.approx(max(1.0, full / selecting))


def test_it_compares_again_and_changes_its_mind():
    controller = BreakEven()
    run(controller, 2 * PAIRS + AGAIN_AFTER, full=2.0, selecting=3.0)
    assert not controller.selects or controller.compares
    modes = run(controller, 2 * PAIRS + 5, full=3.0, selecting=2.0)
    assert modes == [True, False] * PAIRS + [True] * 5


def test_the_first_pair_and_a_slow_step_do_not_decide():
    controller = BreakEven()
    seconds = [90.0, 1.0, 2.0, 3.0, 50.0, 3.0, 2.0, 3.0]
    assert [controller.add(s) for s in seconds] == [False] * 7 + [True]
    assert controller.predicted_speedup == 1.5


@pytest.mark.parametrize("at", [0, 3, 2 * PAIRS, 100])
def test_it_goes_on_from_its_state(at):
    whole, first, second = BreakEven(), BreakEven(), BreakEven()
    expected = run(whole, 700, 2.0, 3.0)
    got = run(first, at, 2.0, 3.0)
    second.load_state_dict(first.state_dict())
    assert got + run(second, 700 - at, 2.0, 3.0) == expected
    assert second.state_dict() == whole.state_dict()
