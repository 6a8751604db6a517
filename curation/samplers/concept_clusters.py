"""Concepts for data without annotations: clusters of embeddings."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from curation.checks import check_integer
from curation.instances.feature_shards import FeatureShards
from curation.samplers.concept_index import ConceptIndex

LARGEST = 1e35  # differences and sums of larger numbers may be no fp32 numbers
PER_CENTRE = 256  # samples that centres are trained on
BLOCK = 2**22  # numbers that are read at a time


def cluster_concepts(embeddings: Any, k: int, iterations: int = 20, seed: int = 0) -> ConceptIndex:
    """Pseudo-concepts 0 to ``V - 1``, one for each sample: the nearest centre of k-means by Euclidean distance.

    Normalise the embeddings before for the cosine. The centres are trained on at most ``256 k`` samples, by faiss;
    the best of three starts is taken. Clusters are the same wherever the origin is and whatever the unit: the mean is
    subtracted first, and the deviations are scaled by a power of two. Clusters without a sample are left out, so that
    ``V < k`` where fewer than ``k`` samples differ. Embeddings on disk are read in blocks, three times over.

    Args:
        embeddings: Floating ``[N, D]``, a tensor, an array, a memory map or
            :class:`~curation.instances.FeatureShards`, of values up to 1e35; their deviations from the mean are
            clustered in fp32.
        k: Number of clusters, in [1, N].
        iterations: Iterations of k-means.
        seed: Seed of the first centres, in [0, 2^31); the same seed gives the same clusters.

    Raises:
        ImportError: If faiss is missing.
        ValueError: If the embeddings are empty, no finite matrix or too large, or another argument is out of its
            range.

    Example:
        >>> index = cluster_concepts(np.array([[0.0], [0.1], [9.0], [9.1]]), 2)
        >>> index[0] == index[1], index[0] == index[2]
        (array([ True]), array([False]))
    """
    try:
        import faiss
    except ImportError as error:
        raise ImportError("Clusters need faiss: `pip install 'lightning-curation[select]'`.") from error
    if isinstance(embeddings, Tensor):
        embeddings = embeddings.detach().cpu()
        embeddings = embeddings if embeddings.dtype == torch.float64 else embeddings.float()  # NumPy has no bf16
    points = embeddings if isinstance(embeddings, FeatureShards) else np.asarray(embeddings)
    if len(points.shape) != 2 or not all(points.shape):
        raise ValueError(
            f"Argument `embeddings` must be a matrix of finite numbers, but got shape {tuple(points.shape)}."
        )
    n, d = points.shape
    mean, largest = _centre(points)
    check_integer("k", k, 1, n + 1)
    check_integer("iterations", iterations, 1)
    check_integer("seed", seed, 0, 2**31)
    scale = np.frexp(largest)[1]  # squares of far larger or smaller numbers are no fp32 numbers

    def scaled(rows: slice | np.ndarray) -> np.ndarray:
        values = _floating(points[rows])
        return np.ascontiguousarray(np.ldexp(values - mean.astype(values.dtype), -scale), np.float32)

    trained = np.arange(n)
    if n > PER_CENTRE * k:  # as faiss draws them
        order = np.empty(n, np.int32)
        faiss.rand_perm(faiss.swig_ptr(order), n, seed)  # type: ignore[attr-defined]
        trained = order[: PER_CENTRE * k].astype(np.int64)
    places = np.argsort(np.argsort(trained))
    kmeans = faiss.Kmeans(d, k, niter=iterations, seed=seed, nredo=3, min_points_per_centroid=1)
    kmeans.train(scaled(np.sort(trained))[places])
    labels = np.concatenate([kmeans.index.search(scaled(block), 1)[1][:, 0] for block in _blocks(n, d)])
    filled, labels = np.unique(labels, return_inverse=True)
    return ConceptIndex.from_labels(labels, range(len(filled)))


def _blocks(n: int, d: int) -> list[slice]:
    step = max(1, BLOCK // d)
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def _floating(rows: np.ndarray) -> np.ndarray:
    return rows.astype(np.float64 if rows.dtype.kind in "iuO" or rows.dtype.itemsize > 4 else np.float32)


def _centre(points: Any) -> tuple[np.ndarray, float]:
    """The mean of each feature, fp64 ``[D]``, and the largest deviation of all.

    Raises:
        ValueError: If a value is not finite or too large.
    """
    n, d = points.shape
    total, low, high = np.zeros(d), np.full(d, np.inf), np.full(d, -np.inf)
    for block in _blocks(n, d):
        rows = _floating(points[block])
        finite = np.isfinite(rows).all(1)
        if not finite.all():
            row = block.start + int(np.argmin(finite))
            place = points.place(row) if isinstance(points, FeatureShards) else f"row {row}"
            raise ValueError(f"Argument `embeddings` must be a matrix of finite numbers, but {place} has others.")
        total += rows.sum(0, dtype=np.float64)
        low, high = np.minimum(low, rows.min(0)), np.maximum(high, rows.max(0))
    largest = max(-low.min(), high.max())
    if largest > LARGEST:
        raise ValueError(f"Argument `embeddings` must hold values of at most {LARGEST:g}, but has {largest:g}.")
    mean = (total / n).astype(rows.dtype)
    return total / n, max(float(np.max(high.astype(rows.dtype) - mean)), float(np.max(mean - low.astype(rows.dtype))))
