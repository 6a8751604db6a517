"""Projections and the memory, against their definitions."""

from collections import deque

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.online.sketch import SketchMemory, cosine_projection, sign_projection, sketch


def test_the_sketch_preserves_squared_norms_in_expectation():
    logits = torch.randn(1, 12, 300)
    squared = torch.stack(
        [
            sketch(logits, sign_projection(8, 12, s), sign_projection(128, 300, s + 999)).square().sum()
            for s in range(400)
        ]
    )
    ratio = squared / logits.square().sum()
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / 400**0.5
    assert ratio.std() < 0.6


def test_sign_columns_do_not_depend_on_how_many_follow():
    short, long = sign_projection(8, 33, 5), sign_projection(8, 2048, 5)
    assert torch.equal(short, long[:, :33])
    assert not torch.equal(long, sign_projection(8, 2048, 6))


def test_projecting_the_head_gives_the_sketch_of_the_logits():
    hidden, weight = torch.randn(3, 7, 16), torch.randn(200, 16)
    tokens, vocab = sign_projection(8, 7, 0), sign_projection(128, 200, 1)
    torch.testing.assert_close(
        sketch(hidden, tokens, vocab @ weight), sketch(hidden @ weight.T, tokens, vocab), rtol=1e-4, atol=1e-4
    )


def test_paper_projection_is_the_transform_of_the_paper():
    """``sqrt(T/r1) S1 Re FFT_T(D1 sqrt(V/r2) S2 Re FFT_V(D2 L))`` by torch.fft, with the D and S of the matrices."""
    T, V, r1, r2 = 24, 90, 8, 16
    logits = torch.randn(T, V, dtype=torch.float64)

    def parts(rows, n, seed):
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:rows]
        g = torch.Generator().manual_seed(seed + 1)
        signs = torch.randint(0, 2, (n, 1), generator=g, dtype=torch.int8)[:, 0].double() * 2 - 1
        return order, signs

    S1, D1 = parts(r1, T, 3)
    S2, D2 = parts(r2, V, 7)
    inner = (V / r2) ** 0.5 * torch.fft.fft(logits * D2, dim=1).real[:, S2]
    outer = (T / r1) ** 0.5 * torch.fft.fft(inner * D1[:, None], dim=0).real[S1]
    got = sketch(logits[None], cosine_projection(r1, T, 3), cosine_projection(r2, V, 7))
    torch.testing.assert_close(got[0].double(), outer.flatten(), rtol=1e-4, atol=1e-2)


def test_paper_projection_keeps_its_size_on_short_axes():
    assert cosine_projection(8, 3, 0).shape == (8, 3)
    assert torch.equal(cosine_projection(8, 3, 0)[3:], torch.zeros(5, 3))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 6), st.lists(st.lists(st.booleans(), min_size=1, max_size=9), min_size=1, max_size=8))
def test_memory_equals_a_queue(capacity, pushes):
    memory, queue = SketchMemory(capacity, 3), deque(maxlen=capacity)
    generator = torch.Generator().manual_seed(len(pushes))
    for valid in pushes:
        new = torch.randn(len(valid), 3, generator=generator)
        new[torch.tensor(valid).logical_not()] = torch.nan
        memory.push(new)
        queue.extend(row for row in new[-capacity:] if not row.isnan().any())
        probe = torch.randn(4, 3, generator=generator)
        expected = torch.stack([(probe - q).norm(dim=1) for q in queue]).mean(0) if queue else torch.zeros(4)
        torch.testing.assert_close(memory.mean_distance(probe), expected)


def test_memory_skips_what_would_break_its_distances_and_restores_its_state():
    memory = SketchMemory(4, 2)
    memory.push(torch.tensor([[0.0, 1.0], [2.0, 1e30], [4.0, 5.0], [torch.inf, 0.0]]))
    twin = SketchMemory(4, 2)
    twin.load_state_dict(memory.state_dict())
    memory.push(torch.ones(1, 2))
    assert twin.pushed == 2
    probe = torch.zeros(1, 2)
    assert twin.mean_distance(probe).item() == pytest.approx((1.0 + 41**0.5) / 2)
