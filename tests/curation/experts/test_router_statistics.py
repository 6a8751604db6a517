"""The statistics of a router over several calls, and what is measured from them."""

import pytest
import torch
from torch import nn

from curation.experts import load_balancing as lb
from curation.experts.router_statistics import balance_metrics, router_statistics, stack_counts
from curation.experts.routers import Router


def gate(experts=4, k=2, scores="softmax"):
    return Router("gate", nn.Linear(8, experts), k, scores)


def draw(n, experts=4, seed=0):
    return torch.randn(n, experts, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("masked", [False, True])
def test_several_calls_are_as_one_call_with_all_tokens(masked):
    first, second = draw(6), draw(6, seed=1)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]) if masked else None
    both = None if mask is None else torch.cat([mask, mask])
    split = router_statistics(gate(), [first, second], mask, z=True)
    whole = router_statistics(gate(), [torch.cat([first, second])], both, z=True)
    assert split.counts.tolist() == whole.counts.tolist()
    assert int(split.tokens) == int(whole.tokens) == (6 if masked else 12)
    torch.testing.assert_close(split.probabilities, whole.probabilities)
    torch.testing.assert_close(split.z_loss, whole.z_loss)
    assert float(split.sequence_loss) == 0


def test_each_row_of_the_mask_is_a_sequence():
    logits, mask = draw(6), torch.tensor([[1, 1, 1], [1, 1, 0]])
    flat, p = mask.flatten().bool(), draw(6).softmax(-1)
    expected = lb.sequence_loss(p, logits.topk(2).indices, 2, flat)
    torch.testing.assert_close(router_statistics(gate(), [logits], mask, sequences=True).sequence_loss, expected)
    for bad in (None, mask.flatten()):
        with pytest.raises(ValueError, match=r"Argument `mask` must give \[B, T\] with the scope 'sequence'"):
            router_statistics(gate(), [logits], bad, sequences=True)
    with pytest.raises(ValueError, match=r"one value for each token, but it gives \[3\] .* gate saw 6 tokens"):
        router_statistics(gate(), [logits], mask[0])


def test_probabilities_are_found_out_once():
    router, p = gate(), draw(6).softmax(-1)
    torch.testing.assert_close(router.probabilities(p), p)
    assert router.scores == "none"
    router = gate()
    torch.testing.assert_close(router.probabilities(draw(6)), p)
    torch.testing.assert_close(router.probabilities(p), p.softmax(-1))


def test_tokens_that_do_not_count_may_be_no_numbers():
    logits, mask = draw(6), torch.arange(6) < 4
    expected = logits.softmax(-1).masked_fill(~mask[:, None], 0)
    logits[4:] = float("nan")
    torch.testing.assert_close(gate().probabilities(logits, mask), expected)


def test_layers_of_several_widths():
    wide, narrow = router_statistics(gate(), [draw(6)]), router_statistics(gate(2, 1), [draw(5, 2)])
    stacked = stack_counts([wide, narrow])
    assert stacked.tolist() == [[*wide.counts.tolist(), 6], [*narrow.counts.tolist(), 0, 0, 5]]
    f = lb.expert_fractions(stacked[:, :-1])
    metrics = balance_metrics(f, [wide, narrow])
    loads = [4 * float(f[0].max()), 2 * float(f[1].max())]
    assert float(metrics["max_load"]) == pytest.approx(max(loads))
    dead = (float((f[0] == 0).sum()) / 4 + float((f[1, :2] == 0).sum()) / 2) / 2
    assert float(metrics["dead"]) == pytest.approx(dead)
    excess = [lb.load_balancing_loss(f[0], wide.probabilities) - 1]
    excess.append(lb.load_balancing_loss(f[1, :2], narrow.probabilities) - 1)
    assert float(metrics["excess_loss"]) == pytest.approx(float(sum(excess)) / 2, abs=1e-6)
