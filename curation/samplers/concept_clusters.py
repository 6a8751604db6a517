"""Concepts for data without annotations: clusters of embeddings."""

from typing import Any

import numpy as np
from torch import Tensor

from curation.checks import check_integer
from curation.samplers.concept_index import ConceptIndex


def cluster_concepts(embeddings: Any, k: int, iterations: int = 20, seed: int = 0) -> ConceptIndex:
    """Pseudo-concepts 0 to ``k - 1``, one for each sample: the nearest centre of k-means by Euclidean distance.

    Normalise the embeddings before for the cosine. The centres are trained on at most ``256 k`` samples, by faiss;
    the best of three starts is taken.

    Args:
        embeddings: Floating ``[N, D]``, a tensor or an array; computed in fp32.
        k: Number of clusters, in [1, N].
        iterations: Iterations of k-means.
        seed: Seed of the first centres, in [0, 2^31); the same seed gives the same clusters.

    Raises:
        ImportError: If faiss is missing.
        ValueError: If the embeddings are empty or no finite matrix, or another argument is out of its range.

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
        embeddings = embeddings.detach().float().cpu()  # NumPy has no bf16
    points = np.ascontiguousarray(embeddings, dtype=np.float32)
    if points.ndim != 2 or not points.size or not np.isfinite(points).all():
        raise ValueError(f"Argument `embeddings` must be a matrix of finite numbers, but got shape {points.shape}.")
    check_integer("k", k, 1, len(points) + 1)
    check_integer("iterations", iterations, 1)
    check_integer("seed", seed, 0, 2**31)
    kmeans = faiss.Kmeans(points.shape[1], k, niter=iterations, seed=seed, nredo=3, min_points_per_centroid=1)
    kmeans.train(points)
    return ConceptIndex.from_labels(kmeans.index.search(points, 1)[1][:, 0], range(k))
