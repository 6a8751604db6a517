"""Forecasts against simulation."""

import numpy as np
import pytest

from curation.rollouts.allocation import EqualTreatment, HardnessWeighted, Neyman, plan
from curation.rollouts.preflight import accuracies, forecast


@pytest.mark.parametrize("schedule", [None, EqualTreatment(), HardnessWeighted(std=True), Neyman("log", 12)])
@pytest.mark.parametrize("budget", [None, 10 * 5])
def test_a_forecast_is_what_simulation_gives(schedule, budget):
    p, n = np.array([0.02, 0.1, 0.3, 0.7, 0.99]), 4
    found = forecast(schedule, p, n, budget)
    draw, rows = np.random.default_rng(1), []
    for _ in range(20_000 if budget is None else 4000):
        seen = draw.binomial(n, p)
        extra = np.zeros(5, int) if schedule is None else plan(schedule, seen, n, budget)
        more = draw.binomial(extra, p)
        rows.append(((n + extra).mean(), (seen + more == 0).mean(), (seen + more == n + extra).mean()))
    mean = np.mean(rows, axis=0)
    tolerance = 0.1 if budget or isinstance(schedule, Neyman) else 0.02  # of 20 draws
    np.testing.assert_allclose(
        [found.rollouts, found.all_wrong, found.all_right], mean, rtol=tolerance, atol=tolerance / 2
    )


def test_no_success_is_not_no_chance():
    assert accuracies(np.array([0, 8, 4]), 8) == pytest.approx([0.5 / 9, 8.5 / 9, 0.5])
