"""Concepts for data without annotations: clusters of embeddings."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from curation.checks import check_integer
from curation.samplers.concept_index import ConceptIndex

LARGEST = 1e35  # differences and sums of larger numbers may be no fp32 numbers


def cluster_concepts(embeddings: Any, k: int, iterations: int = 20, seed: int = 0) -> ConceptIndex:
    """Pseudo-concepts 0 to ``V - 1``, one for each sample: the nearest centre of k-means by Euclidean distance.

    Normalise the embeddings before for the cosine. The centres are trained on at most ``256 k`` samples, by faiss;
    the best of three starts is taken. Clusters are the same wherever the origin is and whatever the unit: the mean is
    subtracted first, and the deviations are scaled by a power of two. Clusters without a sample are left out, so that
    ``V < k`` where fewer than ``k`` samples differ.

    Args:
        embeddings: Floating ``[N, D]``, a tensor or an array, of values up to 1e35; their deviations from the mean
            are clustered in fp32.
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
    points = np.asarray(embeddings)
    points = points.astype(np.float64 if points.dtype.kind in "iuO" or points.dtype.itemsize > 4 else np.float32)
    if points.ndim != 2 or not points.size or not np.isfinite(points).all():
        raise ValueError(f"Argument `embeddings` must be a matrix of finite numbers, but got shape {points.shape}.")
    if np.abs(points).max() > LARGEST:
        raise ValueError(
            f"Argument `embeddings` must hold values of at most {LARGEST:g}, but has {np.abs(points).max():g}."
        )
    check_integer("k", k, 1, len(points) + 1)
    check_integer("iterations", iterations, 1)
    check_integer("seed", seed, 0, 2**31)
    points -= points.mean(0, dtype=np.float64).astype(points.dtype)
    scale = np.frexp(np.abs(points).max())[1]  # squares of far larger or smaller numbers are no fp32 numbers
    points = np.ascontiguousarray(np.ldexp(points, -scale), np.float32)
    kmeans = faiss.Kmeans(points.shape[1], k, niter=iterations, seed=seed, nredo=3, min_points_per_centroid=1)
    kmeans.train(points)
    filled, labels = np.unique(kmeans.index.search(points, 1)[1][:, 0], return_inverse=True)
    return ConceptIndex.from_labels(labels, range(len(filled)))
