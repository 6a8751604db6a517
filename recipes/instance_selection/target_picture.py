"""What a selection for a target keeps, as a picture: of which classes, and how near to the examples."""

from typing import Any

import numpy as np

SHOWN = 4096  # rows of each kind whose similarities are drawn
BARS = 20  # classes that are named


def draw_target(
    x: np.ndarray, y: np.ndarray | None, indices: np.ndarray, examples: np.ndarray, names: list[str] | None = None
) -> Any:
    """The share of each class that is kept, and the similarities of rows to their nearest example.

    Args:
        x: Features ``[N, D]`` of the pool.
        y: Labels, int64 ``[N]``; None where there are none.
        indices: Positions of the kept rows, int64 ``[m]``.
        examples: Features ``[M, D]`` of the examples.
        names: Names of the classes; None for their labels.

    Returns:
        A ``matplotlib.figure.Figure``.
    """
    from matplotlib.figure import Figure

    classes = y is not None and y.dtype.kind != "f"
    figure = Figure(figsize=(10 if classes else 6, 4), layout="constrained")
    histogram, *bars = figure.subplots(1, 2 if classes else 1, squeeze=False)[0]
    draw = np.random.default_rng(0)
    edges = None
    for name, rows, colour in (("all", np.arange(len(x)), "0.6"), ("kept", indices, "#0072b2")):
        rows = rows if len(rows) <= SHOWN else draw.choice(rows, SHOWN, replace=False)
        near = nearest(np.asarray(x[np.sort(rows)], np.float32), np.asarray(examples, np.float32))
        edges = np.linspace(near.min(), 1, 41) if edges is None else edges
        histogram.hist(near, edges, density=True, color=colour, alpha=0.6, label=name)
    histogram.set(xlabel="cosine similarity to the nearest example", ylabel="density")
    histogram.legend(title="rows", frameon=False, loc="upper left")
    histogram.set_title(f"{len(indices):,} of {len(x):,} rows kept for {len(examples):,} examples", loc="left")
    if classes:
        assert y is not None
        labels, sizes = np.unique(y, return_counts=True)
        kept = (y[indices][:, None] == labels).sum(0) / sizes
        order = np.argsort(-kept, kind="stable")[: min(BARS, int((kept > 0).sum()))]
        titles = [names[labels[i]] if names else str(labels[i]) for i in order]
        bars[0].barh(titles, kept[order], color="#0072b2")
        bars[0].axvline(len(indices) / len(x), color="black", linewidth=0.8, linestyle="--")
        bars[0].invert_yaxis()
        bars[0].set(xlabel="share that is kept; dashed: of all rows", xlim=(0, 1))
        bars[0].set_title(f"{len(order)} of {len(labels)} classes", loc="left")
    return figure


def nearest(x: np.ndarray, examples: np.ndarray) -> np.ndarray:
    """Cosine similarity of each row to its nearest example, fp32 ``[N]``."""
    unit = [values / np.linalg.norm(values, axis=1, keepdims=True) for values in (x, examples)]
    return (unit[0] @ unit[1].T).max(1)
