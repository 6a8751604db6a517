"""Clusters of embeddings, beside scikit-learn's."""

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.metrics import adjusted_rand_score

from curation.instances import FeatureShards
from curation.samplers import concept_clusters
from curation.samplers.concept_clusters import cluster_concepts


def inertia(points, labels):
    return sum(((points[labels == c] - points[labels == c].mean(0)) ** 2).sum() for c in np.unique(labels))


def test_as_tight_as_those_of_scikit_learn():
    points = load_digits().data
    index = cluster_concepts(points, 30)
    assert (index.sizes == 1).all()
    assert len(index.names) == 30
    theirs = KMeans(30, n_init=1, max_iter=20, random_state=0).fit(points).labels_
    assert inertia(points, index.ids) <= 1.02 * inertia(points, theirs)
    assert (cluster_concepts(points, 30).ids == index.ids).all()
    assert (cluster_concepts(points, 30, seed=1).ids != index.ids).any()


def test_planted_clusters_are_found_in_any_dtype():
    draw = np.random.default_rng(0)
    planted = draw.integers(0, 5, 500)
    points = torch.from_numpy(10 * np.eye(8)[planted] + draw.normal(size=(500, 8)))
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        assert adjusted_rand_score(planted, cluster_concepts(points.to(dtype), 5).ids) > 0.99


@given(st.lists(st.integers(-4096, 4096), min_size=8, max_size=8), st.integers(-90, 90), st.booleans())
def test_clusters_do_not_depend_on_the_origin_or_the_unit(offset, power, is_wide):
    draw = np.random.default_rng(0)
    planted = draw.integers(0, 5, 300)
    points = np.round((10 * np.eye(8)[planted] + draw.normal(size=(300, 8))) * 512) / 512
    moved = np.ldexp(points + offset, power).astype(np.float64 if is_wide else np.float32)
    assert adjusted_rand_score(planted, cluster_concepts(moved, 5).ids) > 0.99


def test_clusters_without_a_sample_are_no_concepts():
    points = np.repeat([[0.0, 1.0], [5.0, 1.0], [9.0, 1.0]], 4, axis=0)
    index = cluster_concepts(points, 6)
    assert list(index.names) == [0, 1, 2]
    assert index.frequencies.tolist() == [4, 4, 4]
    assert list(cluster_concepts(np.ones((4, 2)), 3).names) == [0]


def at_once(points, k, seed):
    """Clusters by faiss, which draws what it trains on from all points."""
    points = points - points.mean(0, dtype=np.float64).astype(points.dtype)
    points = np.ascontiguousarray(np.ldexp(points, -np.frexp(np.abs(points).max())[1]), np.float32)
    kmeans = faiss.Kmeans(points.shape[1], k, niter=20, seed=seed, nredo=3, min_points_per_centroid=1)
    kmeans.train(points)
    return np.unique(kmeans.index.search(points, 1)[1][:, 0], return_inverse=True)[1]


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_clusters_of_files_are_those_of_an_array(tmp_path, monkeypatch, kind):
    draw = np.random.default_rng(0)
    points = (draw.normal(size=(2000, 6)) + 10 * draw.integers(0, 3, (2000, 1)) + 50).astype(kind)
    np.save(tmp_path / "a.npy", points[:700])
    np.save(tmp_path / "b.npy", points[700:])
    for k in (4, 12):  # more samples than are trained on, and fewer
        expected = at_once(points, k, seed=5).tolist()
        for block in (2**22, 100):
            monkeypatch.setattr(concept_clusters, "BLOCK", block)
            for source in (points, torch.from_numpy(points), FeatureShards(tmp_path)):
                assert cluster_concepts(source, k, seed=5).ids.tolist() == expected
    np.save(tmp_path / "b.npy", np.full((2, 6), np.nan))
    with pytest.raises(ValueError, match=r"a matrix of finite numbers, but row 0 of '.*b\.npy' has others"):
        cluster_concepts(FeatureShards(tmp_path), 2)


def test_rubbish_is_named(monkeypatch):
    for k in (4,):
        with pytest.raises(ValueError, match=rf"Argument `k` must be an integer in \[1, 4\), but got {k}"):
            cluster_concepts(np.zeros((3, 2)), k)
    for bad in (np.zeros(3), np.zeros((0, 2)), np.zeros((3, 0)), np.full((3, 2), np.nan), np.array([[np.inf, 0]])):
        with pytest.raises(ValueError, match="`embeddings` must be a matrix of finite numbers"):
            cluster_concepts(bad, 1)
    with pytest.raises(ValueError, match=r"`embeddings` must hold values of at most 1e\+35, but has 1e\+36"):
        cluster_concepts(np.array([[1.0, -1e36]]), 1)
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(ImportError, match=r"lightning-curation\[select\]"):
        cluster_concepts(np.zeros((3, 2)), 1)
