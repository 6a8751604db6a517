"""The pictures of an audit: the map of dataset cartography, and the histogram of margins."""

from typing import Any

import numpy as np

from curation.recipes.audit.audit import Audit

POINTS = 20_000  # of the map


def draw_audit(audit: Audit) -> Any:
    """Confidence by variability, coloured by how often the prediction was right; and margins, or losses.

    Args:
        audit: The audit.

    Returns:
        A ``matplotlib.figure.Figure``.
    """
    from matplotlib.figure import Figure

    known = audit.dynamics.kind != "losses"
    figure = Figure(figsize=(10, 4) if known else (5, 4), layout="constrained")
    axes = figure.subplots(1, 2 if known else 1, squeeze=False)[0]
    if known:
        _draw_map(figure, axes[0], audit)
    _draw_histogram(axes[-1], audit)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_map(figure: Any, ax: Any, audit: Audit) -> None:
    dynamics, samples = audit.dynamics, audit.order
    if len(samples) > POINTS:
        samples = np.random.default_rng(0).permutation(samples)[:POINTS]
    right = dynamics["right"][samples] / dynamics["visits"][samples]
    x, y = dynamics["probability_deviation"], dynamics["probability"]
    points = ax.scatter(x[samples], y[samples], c=right, s=4, linewidths=0, cmap="viridis", rasterized=True)
    figure.colorbar(points, ax=ax, label="share of visits with a right prediction")
    chosen = samples[audit.suspects[samples]]
    if len(chosen):
        label = f"{int(audit.suspects.sum()):,} suspects"
        ax.scatter(x[chosen], y[chosen], s=9, facecolors="none", edgecolors="#c22", linewidths=0.4, label=label)
        ax.legend(frameon=False, loc="upper right")
    ax.set(
        xlabel="deviation of the label's probability", ylabel="mean probability of the label", title="map of the data"
    )
    ax.set_ylim(-0.02, 1.02)


def _draw_histogram(ax: Any, audit: Audit) -> None:
    classes = audit.dynamics.kind == "classes"
    values = audit.dynamics["margin" if classes else "loss"]
    others = values[audit.order]
    if len(others):
        low, high = np.quantile(others, [0.001, 0.999])
        bins = np.linspace(low, max(high, low + 1e-6), 61)
        ax.hist(np.clip(others, bins[0], bins[-1]), bins, color="#7aa", label="samples")
        if audit.suspects.any():
            chosen = np.clip(values[audit.suspects], bins[0], bins[-1])
            ax.hist(chosen, bins, color="#c22", alpha=0.7, label="suspects")
        threshold = values[audit.is_threshold & np.isfinite(values)]
        if len(threshold):
            scale = np.full(len(threshold), 1.0)
            ax.hist(
                np.clip(threshold, bins[0], bins[-1]), bins, weights=scale, histtype="step", color="black",
                label=f"{len(threshold):,} threshold samples",
            )  # fmt: skip
        ax.set_yscale("symlog", linthresh=10)
        ax.legend(frameon=False)
    ax.set(
        xlabel="mean margin" if classes else "mean loss", ylabel="samples (logarithmic)", title="what is suspicious"
    )
