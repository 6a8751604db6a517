import itertools
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.instances import graph as graph_module
from curation.instances import hashing
from curation.instances.graph import Graph, exact, group_neighbours, hierarchical_small_world, mini_batch, nearest_of


def points(n, d=5, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def slow_group_neighbours(x, groups, k):
    """The sorted distances to, and the ids of, the nearest of the group."""
    found = {}
    for group in groups.tolist():
        rows = [i for i in group if i >= 0]
        for i in rows:
            near = sorted(((x[i] - x[j]).square().sum().item(), j) for j in rows if j != i)
            found[i] = near[:k]
    return [found[i] for i in range(len(x))]


def assert_is(graph, expected, k):
    for i, near in enumerate(expected):
        ids, distances = graph.ids[i], graph.distances[i]
        m = len(near)
        assert (ids[m:] == -1).all()
        assert distances[m:].isinf().all()
        torch.testing.assert_close(distances[:m], torch.tensor([d for d, _ in near]), rtol=1e-3, atol=1e-4)
        assert i not in ids.tolist()
        assert len(set(ids[:m].tolist())) == m


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 6), st.integers(0, 99))
def test_group_neighbours_are_the_nearest_of_the_group(n, size, k, seed):
    x = points(n, seed=seed)
    order = torch.randperm(n, generator=generator(seed))
    groups = torch.nn.functional.pad(order, (0, -n % size), value=-1).view(-1, size)
    assert_is(group_neighbours(x, groups, k), slow_group_neighbours(x, groups, k), k)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 90), st.integers(2, 90), st.integers(1, 30), st.integers(0, 99), st.sampled_from([1, 2]))
def test_the_compiled_loop_equals_the_sort(n, size, k, seed, threads):
    """On grids, where many distances are equal, and with further groups, neighbours of which are known."""
    x = points(n, 3, seed).mul(2).round() if seed % 2 else points(n, 3, seed)
    graphs = {insert: None for insert in (graph_module._insertion(), graph_module._insert_sorted)}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for insert in graphs:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(graph_module, "_insertion", lambda insert=insert: insert)
                for view in range(3):
                    order = torch.randperm(n, generator=generator(seed + view))
                    groups = torch.nn.functional.pad(order, (0, -n % size), value=-1).view(-1, size)
                    graphs[insert] = group_neighbours(x, groups, k, graphs[insert])
    finally:
        torch.set_num_threads(before)
    fast, slow = graphs.values()
    torch.testing.assert_close(fast.distances, slow.distances, rtol=1e-5, atol=1e-5)
    assert ((fast.ids < 0) == (slow.ids < 0)).all()
    of_ids = (x[:, None] - x[fast.ids.clamp(min=0)]).square().sum(-1).masked_fill(fast.ids < 0, torch.inf)
    torch.testing.assert_close(fast.distances, of_ids, rtol=1e-4, atol=1e-4)
    ordered = fast.ids.sort(dim=1).values
    assert not ((ordered.diff(dim=1) == 0) & (ordered[:, 1:] >= 0)).any()
    if not seed % 2:
        assert (fast.ids == slow.ids).all()


def test_without_numba_the_neighbours_are_the_same(monkeypatch):
    x = points(500)
    expected = hashing.multi_view(x, 7, 3, 32, generator())
    monkeypatch.setattr(graph_module, "_insertion", graph_module._insertion.__wrapped__)
    monkeypatch.setitem(sys.modules, "numba", None)
    assert graph_module._insertion() is graph_module._insert_sorted
    assert (hashing.multi_view(x, 7, 3, 32, generator()).ids == expected.ids).all()


def test_the_distances_are_those_of_the_ids():
    x = points(300)
    graph = hashing.multi_view(x, 7, 3, 32, generator())
    of_ids = (x[:, None] - x[graph.ids]).square().sum(-1)
    torch.testing.assert_close(graph.distances, of_ids, rtol=1e-3, atol=1e-4)
    assert (graph.distances.diff(dim=1) >= 0).all()


def test_the_nearest_of_two_graphs_are_the_nearest_of_their_union():
    x = points(60)
    one, other = (hashing.single_level(x, 4, 16, generator(s)) for s in (1, 2))
    union = nearest_of(one, other)
    for i in range(60):
        both = {*one.ids[i].tolist(), *other.ids[i].tolist()}
        nearest = sorted(both, key=lambda j: (x[i] - x[j]).square().sum().item())[:4]
        assert union.ids[i].tolist() == nearest


@pytest.mark.parametrize("build", [exact, hierarchical_small_world])
def test_the_references_are_brute_force_on_few_samples(build):
    x = points(200)
    distances = torch.cdist(x, x).fill_diagonal_(torch.inf)
    assert (build(x, 5).ids == distances.topk(5, largest=False).indices).float().mean() > 0.99


@pytest.mark.parametrize("build", [exact, hierarchical_small_world])
def test_among_duplicates_no_sample_is_its_own_neighbour(build):
    graph = build(torch.zeros(50, 3), 4)
    assert (graph.ids != torch.arange(50)[:, None]).all()
    assert (graph.distances == 0).all()


def test_a_mini_batch_has_every_class_as_often_as_the_data_set():
    y = torch.tensor([0] * 90 + [1] * 30)
    x = torch.cat([torch.zeros(90, 2), torch.ones(30, 2)])
    graph = mini_batch(x, y, 39, 40, generator())  # everything else of the batch is a neighbour
    for i in range(120):
        members = [i, *graph.ids[i].tolist()]
        assert [sum(int(y[j]) == c for j in members) for c in (0, 1)] == [30, 10]


def test_similarities_and_what_is_left_out():
    graph = Graph(torch.tensor([[1, 2], [0, -1], [0, 1]]), torch.tensor([[1.0, 3.0], [1.0, torch.inf], [3.0, 2.0]]))
    expected = torch.exp(-torch.tensor([[1.0, 3.0], [1.0, torch.inf], [3.0, 2.0]]) / 2)
    torch.testing.assert_close(graph.similarities(), expected)
    assert graph.closest(0.5).ids.tolist() == [[1, -1], [0, -1], [-1, 1]]
    assert graph.closest(1.0).ids.tolist() == graph.ids.tolist()
    assert graph.homophily(torch.tensor([0, 0, 1])) == 2 / 5


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.integers(1, 40), st.integers(0, 99))
def test_buckets_hold_every_sample_once_and_no_more_than_their_capacity(n, capacity, seed):
    x = points(n, seed=seed)
    found = hashing.buckets(x, hashing.bits(n, capacity), generator(seed))
    assert found.shape[1] <= capacity
    assert sorted(found[found >= 0].tolist()) == list(range(n))


def test_buckets_are_those_of_a_slow_hash():
    """One median after the other, within each part."""
    x = points(64)
    directions = torch.randn(5, 3, generator=generator())
    parts = [list(range(64))]
    for bit in range(3):
        halves = []
        for part in parts:
            ordered = sorted(part, key=lambda i: (x[i] @ directions[:, bit]).item())
            halves += [ordered[: len(part) // 2], ordered[len(part) // 2 :]]
        parts = halves
    found = hashing.buckets(x, 3, generator())
    assert [sorted(row) for row in found.tolist()] == [sorted(part) for part in parts]


def test_duplicates_do_not_overfill_a_bucket():
    found = hashing.buckets(torch.zeros(1000, 4), hashing.bits(1000, 100), generator())
    assert found.shape == (16, 63)


def test_more_views_find_more_of_the_neighbours():
    x = points(4000, 16)
    true = torch.cdist(x, x).fill_diagonal_(torch.inf).topk(10, largest=False).indices
    recalls = [
        (hashing.multi_view(x, 10, views, 256, generator()).ids[:, :, None] == true[:, None]).any(2).float().mean()
        for views in (1, 2, 4, 8)
    ]
    assert all(more > 1.15 * fewer for fewer, more in itertools.pairwise(recalls))


def test_multi_level_ranks_by_the_levels_that_agree():
    x, k = points(120, 4), 6
    draws = generator(3)
    hashes = []
    for length in (2, 3, 4):
        groups = hashing.buckets(x, length, draws)
        hashes.append({i: b for b, group in enumerate(groups.tolist()) for i in group})
    graph = hashing.multi_level(x, k, 32, generator(3))
    for i in range(120):
        distance = lambda j, i=i: (x[i] - x[j]).square().sum().item()  # noqa: E731
        candidates = set()
        for h in hashes:
            candidates |= set(sorted((j for j in range(120) if h[j] == h[i] and j != i), key=distance)[:k])
        alike = lambda j, i=i: sum(2**level * (h[i] == h[j]) for level, h in enumerate(hashes))  # noqa: E731
        expected = sorted(candidates, key=lambda j: (-alike(j), distance(j)))[:k]
        assert set(graph.ids[i].tolist()) == set(expected)


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("name", ["single_level", "multi_level", "multi_view"])
def test_fewer_samples_than_neighbours(n, name):
    x = points(n)
    graph = getattr(hashing, name)(
        x, 10, **({"views": 2} if name == "multi_view" else {}), capacity=4, generator=generator()
    )
    assert graph.ids.shape == (n, 10)
    assert (graph.ids < n).all()
    assert graph.distances[:, n - 1 :].isinf().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_finds_the_same_neighbours():
    x = points(2000)
    here, there = (hashing.multi_view(x.to(d), 10, 4, 256, generator()) for d in ("cpu", "cuda"))
    assert (here.ids == there.ids.cpu()).float().mean() > 0.99
