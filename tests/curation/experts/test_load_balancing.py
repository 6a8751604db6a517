"""Counts, fractions and losses by definition; a window of micro-batches gives the gradient of one large batch."""

import pytest
import torch
from mixture import EXPERTS, Mixture, Tokens, error, routed, slow_counts, slow_gradients

from curation.experts import load_balancing as lb


def random_choices(n=30, experts=6, k=2, seed=0):
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, experts, generator=draw)
    return logits, logits.topk(k, dim=-1).indices, torch.rand(n, generator=draw) < 0.7


def test_counts_are_those_of_the_tokens_that_count():
    _, indices, mask = random_choices()
    indices[3, 1] = -1
    expected = [sum(int(mask[t]) * int(e == i) for t in range(30) for e in indices[t]) for i in range(6)]
    assert lb.expert_counts(indices, 6, mask).tolist() == expected
    assert lb.expert_counts(indices, 6).sum() == 59
    assert lb.expert_counts(indices, 6).dtype == torch.int64


def test_the_loss_is_one_where_all_is_balanced_and_the_number_of_experts_over_k_where_all_is_not():
    even, single = torch.full((8,), 1 / 8), torch.eye(8)[0]
    assert float(lb.load_balancing_loss(even, even)) == pytest.approx(1)
    assert float(lb.load_balancing_loss(single, single)) == pytest.approx(8)
    two = lb.expert_fractions(torch.tensor([5, 5, 0, 0, 0, 0, 0, 0]))
    assert float(lb.load_balancing_loss(two, two)) == pytest.approx(4)  # 8 / k: fractions are divided by k


def test_fractions_have_no_gradient():
    f = torch.full((4,), 0.25, requires_grad=True)
    p = torch.full((4,), 0.25, requires_grad=True)
    lb.load_balancing_loss(f, p).backward()
    assert f.grad is None
    assert p.grad.tolist() == [1.0] * 4


def test_a_loss_below_one_is_no_sign_of_balance():
    f, p = torch.tensor([0.7, 0.1, 0.1, 0.1]), torch.tensor([0.1, 0.3, 0.3, 0.3])
    assert float(lb.load_balancing_loss(f, p)) < 1
    assert float(lb.excess_loss(f, p)) == pytest.approx(float(lb.load_balancing_loss(f, p)) - 1, abs=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_a_sequence_is_balanced_by_its_own_fractions(masked):
    logits, indices, mask = random_choices()
    mask = mask if masked else torch.ones(30, dtype=torch.bool)
    mask[10:20] = False  # a sequence without a token that counts
    p = lb.probabilities(logits)
    expected = []
    for rows in (slice(0, 10), slice(20, 30)):
        f = lb.expert_fractions(lb.expert_counts(indices[rows], 6, mask[rows]))
        expected.append(lb.load_balancing_loss(f, p[rows][mask[rows]].mean(0)))
    torch.testing.assert_close(lb.sequence_loss(p, indices, 3, mask), sum(expected) / 2)


def test_probabilities_and_z_loss():
    logits, _, mask = random_choices()
    torch.testing.assert_close(lb.probabilities(logits.bfloat16()), logits.bfloat16().float().softmax(-1))
    sigmoids = logits.sigmoid()
    torch.testing.assert_close(lb.probabilities(logits, "sigmoid"), sigmoids / sigmoids.sum(-1, keepdim=True))
    torch.testing.assert_close(lb.probabilities(logits.softmax(-1), "none"), logits.softmax(-1))
    by_hand = [float(row.exp().sum().log() ** 2) for row, counted in zip(logits, mask, strict=True) if counted]
    assert float(lb.z_loss(logits, mask)) == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-5)


@pytest.mark.parametrize("padding", [float("nan"), float("inf"), float("-inf")])
def test_padding_may_be_anything(padding):
    logits, indices, mask = random_choices()
    expected, masked = [], []
    for values in (logits.clone(), logits.masked_fill(~mask[:, None], padding)):
        values.requires_grad_()
        loss = lb.z_loss(values, mask)
        loss.backward()
        losses = lb.sequence_loss(lb.probabilities(values), indices, 3, mask)
        (expected if not expected else masked).extend([loss, losses, values.grad])
    for first, second in zip(expected, masked, strict=True):
        torch.testing.assert_close(first, second)


def test_what_does_not_fit_is_named():
    p, indices = torch.full((4, 2), 0.5), torch.tensor([[0], [1], [0], [1]])
    for call, message in (
        (lambda: lb.expert_counts(indices, 1), "`indices` must be below 1, but has 1"),
        (lambda: lb.expert_counts(indices.float(), 2), r"`indices` must be int64 \[N, k\], but got torch.float32"),
        (lambda: lb.expert_counts(indices, 2, torch.ones(1) > 0), r"`mask` must be bool \[4\], but got \[1\]"),
        (lambda: lb.sequence_loss(p, indices, 3), "`sequences` must divide the tokens .* 4 and 4, but got 3"),
        (lambda: lb.sequence_loss(p, indices, 0), "`sequences` must be an integer >= 1, but got 0"),
        (lambda: lb.z_loss(p, torch.ones(1) > 0), r"`mask` must be bool \[4\], but got \[1\]"),
        (
            lambda: lb.probabilities(p, "relu"),
            "`scores` must be 'softmax', .*'sqrtsoftplus' or 'none', but got 'relu'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_sequence_of_probabilities_of_any_dtype(dtype):
    logits, indices, mask = random_choices()
    p = lb.probabilities(logits)
    loss = lb.sequence_loss(p.to(dtype), indices, 3, mask).float()
    torch.testing.assert_close(loss, lb.sequence_loss(p, indices, 3, mask), rtol=1e-2, atol=0)


def test_a_mask_of_integers_counts_what_is_not_zero():
    assert lb.expert_counts(torch.tensor([[0, 1], [1, 1]]), 2, torch.tensor([2, 0])).tolist() == [1, 1]


# ---------------------------------------------------------------------- windows


def windows(ranks, size, ragged):
    """Micro-batches of 2 rows for each rank, another domain in each."""
    batches = Tokens(2 * ranks * size, 2, ragged).batches(2)
    return [batches[rank::ranks] for rank in range(ranks)]


def one_batch(window):
    flat = [batch for rank in window for batch in rank]
    return [[{name: torch.cat([batch[name] for batch in flat]) for name in flat[0]}]]


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_fractions_of_the_window_and_weights_by_tokens_give_the_gradient_of_one_batch(ranks, size, ragged):
    module, window = Mixture(supervised=0.0).double(), windows(ranks, size, ragged)
    expected = slow_gradients(module, one_batch(window), 1.0, "exact")
    flat = [batch for rank in window for batch in rank]
    counts = [
        torch.stack([lb.expert_counts(chosen, EXPERTS, mask) for _, chosen, mask in routed(module, batch)])
        for batch in flat
    ]
    f, tokens = lb.expert_fractions(sum(counts)), sum(batch["attention_mask"].sum() for batch in flat)
    total = 0
    for batch in flat:
        weight = ranks * size * batch["attention_mask"].sum() / tokens
        means = torch.stack([p[mask].mean(0) for p, _, mask in routed(module, batch)])
        total = total + weight * lb.load_balancing_loss(f, means).sum() / size / ranks
    names, parameters = zip(*module.named_parameters(), strict=True)
    gradients = torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True)
    assert error(dict(zip(names, gradients, strict=True)), expected) < 1e-6
    if ranks * size > 1:
        assert error(slow_gradients(module, window, 1.0, "micro"), expected) > 0.05


# ---------------------------------------------------------------------- what others get wrong


def test_pooling_the_counts_of_layers_hides_that_each_has_collapsed():
    """Four layers, each on a pair of its own: pooled, all is balanced, and there is no gradient."""
    logits = torch.full((4, 10, 8), -9.0)
    for layer in range(4):
        logits[layer, :, 2 * layer : 2 * layer + 2] = 9.0
    logits.requires_grad_()
    p = logits.softmax(-1)
    counts = torch.stack([lb.expert_counts(row.topk(2, dim=-1).indices, 8) for row in logits])
    pooled = lb.load_balancing_loss(lb.expert_fractions(counts.sum(0)), p.flatten(0, 1).mean(0))
    ours = lb.load_balancing_loss(lb.expert_fractions(counts), p.mean(1))
    assert float(pooled) == pytest.approx(1, abs=1e-4)
    assert ours.tolist() == pytest.approx([4.0] * 4, abs=1e-3)


def test_weights_by_tokens_are_needed_where_they_are_unequal():
    module, window = Mixture(supervised=0.0).double(), windows(2, 4, True)
    expected = slow_gradients(module, window, 1.0, "exact")
    flat = [[batch for rank in window for batch in rank]]
    fractions = lb.expert_fractions(sum(slow_counts(module, batch) for batch in flat[0]))
    assert error(slow_gradients(module, flat, 1.0, [fractions] * 8), expected) > 0.01
