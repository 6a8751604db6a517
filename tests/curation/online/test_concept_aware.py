"""The greedy choice on the device, against the one on the host."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from twins import slow_diverse

from curation.online.concept_aware import diverse_rows

weights = st.sampled_from([0.0, 0.1, 1 / 3, 1.0, 1.5, 7.0])


@settings(deadline=None)
@given(st.lists(st.sets(st.integers(0, 5), max_size=4), min_size=1, max_size=12),
       st.lists(weights, min_size=6, max_size=6), st.data())  # fmt: skip
def test_equals_brute_force(rows, targets, d):
    k = d.draw(st.integers(0, len(rows)))
    padded = torch.tensor([[*sorted(row), *[-1] * (4 - len(row))] for row in rows])
    chosen = diverse_rows(padded, k, torch.tensor(targets, dtype=torch.float64))
    assert chosen.tolist() == slow_diverse(rows, k, targets, np.zeros(len(rows)), None)


def test_more_rows_than_there_are_is_refused():
    with pytest.raises(ValueError, match=r"Argument `k` must be an integer in \[0, 3\), but got 3"):
        diverse_rows(torch.zeros(2, 1, dtype=torch.int64), 3, torch.ones(1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nothing_waits_for_the_device():
    concepts = torch.randint(-1, 50, (256, 6), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        diverse_rows(concepts, 64, torch.ones(50, device="cuda", dtype=torch.float64))
    finally:
        torch.cuda.set_sync_debug_mode("default")
