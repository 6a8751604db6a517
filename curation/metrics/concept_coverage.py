"""Coverage and balance of the concepts that a model was trained on."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from curation.checks import check_integer

NAMED = 30  # concepts whose names a picture shows


class ConceptCoverage(Metric):
    """Coverage, normalised entropy, and distance to a target, of the concepts that were seen.

    With ``n_c`` samples of concept ``c`` and ``p = n / sum(n)``:

    - ``coverage``: the share of concepts with ``n_c > 0``;
    - ``entropy``: ``-sum p log p / log V``, 1 where all concepts are seen equally often;
    - ``target_distance``: ``sum |p - q| / 2`` in [0, 1], the total variation distance to the target ``q``.

    Args:
        num_concepts: Number of concepts, ``V``.
        targets: Weights of the target, floating ``[V]``; None for equal weights.
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If ``num_concepts`` is not an integer >= 1, or ``targets`` has another length, a negative weight
            or no positive one.

    Example:
        >>> metric = ConceptCoverage(4)
        >>> metric.update(torch.tensor([[0, 1], [1, -1]]))  # -1 where a sample has fewer concepts
        >>> {name: round(value.item(), 3) for name, value in metric.compute().items()}
        {'coverage': 0.5, 'entropy': 0.459, 'target_distance': 0.5}
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    counts: Tensor
    targets: Tensor

    def __init__(self, num_concepts: int, targets: Tensor | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_integer("num_concepts", num_concepts, 1)
        weights = torch.ones(num_concepts) if targets is None else torch.as_tensor(targets, dtype=torch.float32)
        if weights.shape != (num_concepts,):
            raise ValueError(f"Argument `targets` must have shape [{num_concepts}], but got {list(weights.shape)}.")
        if not (weights.isfinite().all() and (weights >= 0).all() and weights.any()):
            raise ValueError(f"Argument `targets` must be finite, >= 0 and not all 0, but got {weights}.")
        self.num_concepts = num_concepts
        self.add_state("counts", torch.zeros(num_concepts, dtype=torch.int64), dist_reduce_fx="sum")
        self.register_buffer("targets", weights / weights.sum(), persistent=False)

    def update(self, concepts: Tensor) -> None:
        """Count concepts: integers of any shape below ``num_concepts``, negative ones are left out.

        Raises:
            ValueError: If the concepts are no integers.
        """
        if concepts.is_floating_point() or concepts.is_complex() or concepts.dtype == torch.bool:
            raise ValueError(f"Argument `concepts` must be integers, but got {concepts.dtype}.")
        flat = concepts.flatten().long()
        self.counts.index_add_(0, flat.clamp(min=0), (flat >= 0).long())

    def compute(self) -> dict[str, Tensor]:
        """The three values, fp32 scalars; NaN entropy and distance where nothing was seen."""
        fractions = self.counts / self.counts.sum()
        entropy = torch.special.entr(fractions).sum() / torch.log(fractions.new_tensor(max(self.num_concepts, 2)))
        return {
            "coverage": self.counts.gt(0).float().mean(),
            "entropy": entropy,
            "target_distance": (fractions - self.targets).abs().sum() / 2,
        }


def plot_concepts(corpus: Any, trained: Any, targets: Any, names: Sequence[Any] | None = None) -> Any:
    """Plot the fractions of the concepts in the corpus, in training and in the target, by frequency in the corpus.

    Args:
        corpus: Number of samples of the corpus with each concept, ``[V]``.
        trained: Number of samples trained on with each concept, ``[V]``.
        targets: Weights of the target, ``[V]``.
        names: Names of the concepts, ``[V]``, which are shown where there are at most 30.

    Returns:
        A ``matplotlib`` figure.

    Raises:
        ImportError: If matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("A picture needs matplotlib: `pip install 'lightning-curation[recipes]'`.") from error
    order = np.argsort(-np.asarray(corpus), kind="stable")
    fractions = {name: np.asarray(counts, float)[order] / max(np.sum(counts), 1e-12)
              for name, counts in (("corpus", corpus), ("trained on", trained), ("wanted", targets))}  # fmt: skip
    few = names is not None and len(order) <= NAMED
    places = np.arange(1, len(order) + 2) if few else np.geomspace(1, len(order) + 1, 40).astype(int)
    edges = np.unique(places) - 1  # each point is a mean over such ranks
    thirds = (0, -(-len(order) // 10), -(-len(order) // 2), len(order))
    figure = Figure(figsize=(11, 4), layout="constrained")
    lines, bars = figure.subplots(1, 2, width_ratios=(3, 2))
    for i, (name, fraction) in enumerate(fractions.items()):
        style = {"color": ("0.45", "C0", "C1")[i], "label": name, "linestyle": ("-", "-", "--")[i]}
        means = np.add.reduceat(fraction, edges[:-1]) / np.diff(edges)
        lines.plot((edges[:-1] + edges[1:] + 1) / 2, np.where(means > 0, means, np.nan), marker=".", **style)
        heights = [fraction[a:b].sum() for a, b in itertools.pairwise(thirds)]
        bars.bar(np.arange(3) + 0.27 * (i - 1), heights, 0.25, color=style["color"], label=name)
    lines.set(xscale="log", yscale="log", xlabel="rank of the concept in the corpus", ylabel="share of occurrences")
    if few and names is not None:
        lines.set(xscale="linear", xticks=range(1, len(order) + 1), xlabel="concepts, the most frequent first")
        lines.set_xticklabels([str(names[i]) for i in order], rotation=40, ha="right")
    figure.legend(*lines.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    names = ("head\n(first tenth)", "middle", "tail\n(last half)")
    bars.set(xticks=range(3), xticklabels=names, ylabel="share of occurrences")
    for axes in (lines, bars):
        axes.spines[["top", "right"]].set_visible(False)
    return figure
