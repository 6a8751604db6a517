import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.instances import coverage, hashing
from curation.instances.coverage import cover, cover_and_count
from curation.instances.graph import Graph


def graph_of(n, k, seed):
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))
    return hashing.multi_view(x, k, 2, 16, torch.Generator().manual_seed(seed))


def slow_cover(graph, weights, m):
    n = len(graph.ids)
    similarity = np.zeros((n, n))
    values = graph.similarities().numpy()
    for j in range(n):
        similarity[j, j] = 1
        for e, i in enumerate(graph.ids[j].tolist()):
            if i >= 0:
                similarity[i, j] = values[j, e]
    covered, chosen, gains = np.zeros(n), [], []
    for _ in range(m):
        best = None
        for j in range(n):
            gain = (weights.numpy() * np.maximum(similarity[:, j] - covered, 0)).sum()
            if j not in chosen and (best is None or gain > best[0] + 1e-12):
                best = gain, j
        chosen.append(best[1])
        gains.append(best[0])
        covered = np.maximum(covered, similarity[:, best[1]])
    return chosen, gains


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 40), st.integers(1, 8), st.integers(0, 999), st.booleans(), st.data())
def test_the_choice_is_that_of_the_plain_greedy(n, k, seed, weighted, data):
    graph = graph_of(n, k, seed)
    weights = (
        torch.rand(n, generator=torch.Generator().manual_seed(seed)).double() if weighted else torch.ones(n).double()
    )
    m = data.draw(st.integers(0, n))
    chosen, gains = cover(graph, weights, m)
    _, expected = slow_cover(graph, weights, m)
    assert len(set(chosen.tolist())) == m
    np.testing.assert_allclose(gains, expected, atol=1e-9)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.integers(1, 8), st.integers(0, 999), st.data())
def test_a_choice_stands_for_what_it_covers_best(n, k, seed, data):
    graph = graph_of(n, k, seed)
    weights = torch.rand(n, generator=torch.Generator().manual_seed(seed)).double()
    chosen, _, stand_for = cover_and_count(graph, weights, data.draw(st.integers(1, n)))
    values, expected = graph.similarities().numpy(), np.zeros(len(chosen))
    for i in range(n):
        alike = [1.0 if i == j else max(values[j, graph.ids[j].numpy() == i], default=0.0) for j in chosen.tolist()]
        if max(alike) > 0:
            expected[int(np.argmax(alike))] += weights[i]
    np.testing.assert_allclose(stand_for, expected, atol=1e-9)


def test_python_and_numba_choose_the_same():
    graph, weights = graph_of(80, 6, 0), torch.ones(80).double()
    chosen, gains, owners = np.empty(30, np.int64), np.empty(30), np.full(80, -1)
    coverage._cover(graph.ids.numpy(), graph.similarities().numpy(), weights.numpy(), chosen, gains, owners)
    assert cover(graph, weights, 30)[0].tolist() == chosen.tolist()


def test_what_weighs_nothing_need_not_be_covered():
    graph = graph_of(60, 5, 1)
    weights = (torch.arange(60) < 30).float()
    chosen, gains = cover(graph, weights, 60)
    reach = {j: {j, *graph.ids[j].tolist()} for j in range(60)}
    assert all(
        any(i < 30 for i in reach[j] if i >= 0) for j, gain in zip(chosen.tolist(), gains, strict=True) if gain
    )


def test_duplicates_are_chosen_last():
    x = torch.cat([torch.zeros(30, 2), torch.eye(2) * 9, -torch.eye(2) * 9])
    graph = hashing.multi_view(x, 33, 1, 64, torch.Generator())
    assert len({max(i, 29) for i in cover(graph, torch.ones(34), 5)[0].tolist()}) == 5


def test_what_the_compiled_loop_cannot_trust_is_refused():
    graph, ones = graph_of(6, 2, 0), torch.ones(6)
    for ids in (graph.ids + 4, graph.ids - 9):
        with pytest.raises(ValueError, match=r"Argument `graph` must have neighbours in \[-1, 6\)"):
            cover(Graph(ids, graph.distances), ones, 1)
    with pytest.raises(ValueError, match="Argument `graph` must have neighbours"):
        cover(Graph(graph.ids, graph.distances[:, :1]), ones, 1)
    for weights in (ones[:5], ones * torch.nan, -ones, ones * torch.inf):
        with pytest.raises(ValueError, match=r"Argument `weights` must be \[6\] finite numbers >= 0"):
            cover(graph, weights, 1)


def test_without_numba_the_extra_is_named(monkeypatch):
    coverage._greedy.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "numba", None)
    with pytest.raises(ImportError, match=r"lightning-curation\[select\]"):
        cover(graph_of(4, 2, 0), torch.ones(4), 1)
    monkeypatch.undo()
    assert len(cover(graph_of(4, 2, 0), torch.ones(4), 1)[0]) == 1
