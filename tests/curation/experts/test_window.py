"""The fractions of an accumulation window, and the estimate of its micro-batches to come."""

import pytest
import torch
from mixture import Mixture, error, slow_counts, slow_gradients

from curation.experts import load_balancing as lb
from curation.experts.window import Window


def test_the_fractions_of_a_window():
    counts = [torch.tensor([[3, 1, 2], [2, 2, 2]]) * i for i in (1, 2, 3)]
    running, warm = Window(), Window(warm=True)
    for window in (running, warm):
        for done, c in enumerate(counts, 1):
            expected = lb.expert_fractions(sum(counts[:done])[:, :-1])
            torch.testing.assert_close(window.add(c, 3), expected)
        window.closed = True
    other, average = torch.tensor([[0, 4, 2], [4, 0, 2]]), sum(counts) / 3
    torch.testing.assert_close(running.add(other, 3), lb.expert_fractions(other[:, :-1]))
    expected = lb.expert_fractions((other + 2 * (average + (average - other) / 6))[:, :-1])
    torch.testing.assert_close(warm.add(other, 3), expected)
    assert warm.counts.tolist() == other.tolist()
    warm.closed = True
    warm.add(other, 1)
    torch.testing.assert_close(warm.average, (average + other) / 2)
    again = Window(warm=True)
    again.load_state_dict(warm.state_dict(), torch.device("cpu"))
    torch.testing.assert_close(again.add(other, 3), warm.add(other, 3))


def drifting(cycle, seed):
    """Windows of 8 micro-batches: domains in a cycle, at random, or mixed."""
    draw = torch.Generator().manual_seed(seed)
    for _ in range(12):
        domains = torch.arange(8) % 4 if cycle == "cycle" else torch.randint(0, 4, (8,), generator=draw)
        batches = []
        for domain in domains:
            domain_of_row = torch.randint(0, 4, (4, 1), generator=draw) if cycle == "mixed" else domain
            ids = torch.randint(0, 3, (4, 16), generator=draw) + 3 * domain_of_row
            batches.append({"input_ids": ids, "attention_mask": torch.ones(4, 16, dtype=torch.long)})
        yield [batches]


@pytest.mark.parametrize(("cycle", "bar"), [("cycle", 0.4), ("random", 0.7), ("mixed", 0.85)])
def test_the_window_before_makes_up_for_what_is_still_to_come(cycle, bar):
    module, errors = Mixture(supervised=0.0), {"running": [], "warm": []}
    for seed in range(3):
        kept = {"running": Window(), "warm": Window(warm=True)}
        for window in drifting(cycle, seed):
            counts = [torch.nn.functional.pad(slow_counts(module, batch), (0, 1)).long() for batch in window[0]]
            exact = slow_gradients(module, window, 1.0, "exact")
            for rule, window_of_rule in kept.items():
                fractions = [window_of_rule.add(c, 8) for c in counts]
                window_of_rule.closed = True
                if kept["warm"].average is not None:
                    errors[rule].append(error(slow_gradients(module, window, 1.0, fractions), exact))
    running, warm = (torch.tensor(values).mean() for values in errors.values())
    assert warm <= bar * running
