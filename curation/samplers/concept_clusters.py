"""Concepts for data without annotations: clusters of embeddings."""

from typing import Any

import numpy as np
from torch import Tensor

from curation.samplers.concept_choice import check_integer
from curation.samplers.concept_index import ConceptIndex


def cluster_concepts(embeddings: Any, k: int, iterations: int = 20, seed: int = 0) -> ConceptIndex:
    """Pseudo-concepts 0 to ``k - 1``, one for each sample: the nearest centre of k-means by Euclidean distance.

    Normalise the embeddings before for the cosine. The centres are trained on at most ``256 k`` samples, by faiss;
    the best of three starts is taken.

    Args:
        embeddings: Floating ``[N, D]``, a tensor or an array; computed in fp32.
        k: Number of clusters, in [1, N].
        iterations: Of k-means.
        seed: Of the first centres; the same one gives the same clusters.

    Raises:
        ImportError: If faiss is missing.
        ValueError: If the embeddings are empty or no finite matrix, or ``k`` is out of its range.
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
    for name, value, least in (("k", k, 1), ("iterations", iterations, 1), ("seed", seed, 0)):
        check_integer(name, value, least)
    if k > len(points):
        raise ValueError(f"Argument `k` must be in [1, {len(points)}], the number of samples, but got {k!r}.")
    kmeans = faiss.Kmeans(points.shape[1], k, niter=iterations, seed=seed, nredo=3, min_points_per_centroid=1)
    kmeans.train(points)
    return ConceptIndex.from_labels(kmeans.index.search(points, 1)[1][:, 0], range(k))
