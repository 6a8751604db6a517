"""The picture of a selection ledger: how often samples were kept, and how long ago."""

from typing import Any

import numpy as np


def draw_ledger(seen: np.ndarray, kept: np.ndarray, last: np.ndarray) -> Any:
    """How often samples were kept, beside the same number of random choices, and how long ago.

    Args:
        seen: Times that each sample was a candidate, int64 ``[N]``; the arguments are the three arrays of
            :meth:`curation.records.ledger.Ledger.counts`.
        kept: Times that it was kept, int64 ``[N]``.
        last: Step at which it was last kept, int64 ``[N]``; -1 for never.

    Returns:
        A ``matplotlib.figure.Figure``.
    """
    from matplotlib.figure import Figure

    end = last.max()
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    repeats, age = figure.subplots(1, 2)
    bins = bin_edges(int(kept.max()))
    repeats.hist(kept, bins=bins, label="this selection")
    chance = np.random.default_rng(0).binomial(seen, kept.sum() / seen.sum())
    repeats.hist(chance, bins=bins, histtype="step", color="black", label="chance, at the same rate")
    repeats.set(xlabel="times kept", ylabel="samples", title=f"never kept: {(kept == 0).mean():.1%}")
    repeats.legend(frameon=False)
    age.hist(end - last[last >= 0], bins=bin_edges(int(end)))
    age.set(xlabel="steps since last kept", ylabel="samples", title="age, of those that were kept")
    for axes in (repeats, age):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def bin_edges(largest: int) -> np.ndarray:
    """Edges of at most 60 bins of ``[0, largest]`` that hold equally many whole numbers each.

    Example:
        >>> bin_edges(2).tolist()
        [-0.5, 0.5, 1.5, 2.5]
    """
    width = -(-(largest + 1) // 60)
    return np.arange(0, largest + width + 1, width) - 0.5
