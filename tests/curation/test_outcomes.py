"""How a forward pass did on each sample, against plain Python."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from curation.scoring import IGNORED, losses_alone, per_sample_loss, row_outcomes

CLASSES = 4
logit = st.floats(-8, 8, width=16)
token = st.tuples(st.lists(logit, min_size=CLASSES, max_size=CLASSES), st.sampled_from([*range(CLASSES), IGNORED]))


def slow(logits: list[float], label: int) -> tuple[float, float, float, int, float]:
    """Loss, margin, probability, the largest other class and its probability."""
    odds = [math.exp(x) for x in logits]
    others = [c for c in range(CLASSES) if c != label]
    rival = max(others, key=lambda c: logits[c])
    p = odds[label] / sum(odds)
    return -math.log(p), logits[label] - logits[rival], p, rival, odds[rival] / sum(odds)


@given(st.lists(token, min_size=1, max_size=5))
def test_classes_equal_plain_python(rows):
    got = row_outcomes(torch.tensor([x for x, _ in rows]), torch.tensor([y for _, y in rows])).tolist()
    for (logits, label), values in zip(rows, got, strict=True):
        if label == IGNORED:
            assert all(math.isnan(value) for value in values)
            continue
        loss, margin, probability, _, rival_probability = slow(logits, label)
        expected = [loss, margin, probability, float(margin > 0), label, values[5], rival_probability, 0.0]
        assert values == pytest.approx(expected, rel=1e-4, abs=1e-5)
        rival = int(values[5])  # of two that are as large either may be named
        assert rival != label
        assert logits[rival] == max(x for c, x in enumerate(logits) if c != label)


@given(st.lists(st.lists(token, min_size=3, max_size=3), min_size=1, max_size=4))
def test_sequences_equal_means_over_scored_positions(rows):
    logits = torch.tensor([[x for x, _ in row] for row in rows])
    got = row_outcomes(logits, torch.tensor([[y for _, y in row] for row in rows])).tolist()
    for row, values in zip(rows, got, strict=True):
        scored = [slow(x, y) for x, y in row if y != IGNORED]
        if not scored:
            assert math.isnan(values[0])
            continue
        means = [sum(token[column] for token in scored) / len(scored) for column in range(3)]
        right = float(sum(token[1] > 0 for token in scored) > len(scored) / 2)
        assert values[:7] == pytest.approx([*means, right, -1, -1, 0], rel=1e-4, abs=1e-5)
        least = min(token[2] for token in scored)
        assert scored[int(values[7])][2] == pytest.approx(least, rel=1e-4)


def test_losses_are_those_of_the_criterion_and_half_precision_is_widened():
    logits, targets = torch.tensor([[2.0, 0.0]]), torch.tensor([1])
    assert row_outcomes(logits, targets, lambda *pair: 3 * per_sample_loss(*pair))[0, 0] == 3 * per_sample_loss(
        logits, targets
    )
    assert row_outcomes(logits, torch.tensor([IGNORED]), per_sample_loss)[0, 0].isnan()
    assert torch.equal(row_outcomes(logits.bfloat16(), targets), row_outcomes(logits, targets))


def test_of_losses_alone_everything_else_is_unknown():
    values = losses_alone(torch.tensor([0.5]))[0].tolist()
    assert values[0] == 0.5
    assert all(math.isnan(value) for value in values[1:3])
    assert values[3:] == [0, -1, -1, 0, 0]
