"""What a selection is worth, as text and as a picture: the accuracy that a probe retains when it is trained on it."""

from typing import Any

import numpy as np

from curation.evaluation.retention import Retention

LARGEST_TSNE = 5000  # samples
NAMED_CLASSES = 20  # more classes are summed up


def kept_report(y: np.ndarray, indices: np.ndarray) -> list[str]:
    """How many samples were kept, and of which classes.

    Args:
        y: Labels of all samples, int64 ``[N]``, or numbers, of which nothing more is said.
        indices: Positions of the kept samples, int64 ``[m]``.
    """
    lines = [f"{len(indices):,} of {len(y):,} samples kept, reduction {1 - len(indices) / len(y):.1%}"]
    if y.dtype.kind == "f":
        return lines
    classes, sizes = np.unique(y, return_counts=True)
    counts = (y[indices][:, None] == classes).sum(0)
    kept = ", ".join(f"{c}: {count} of {size}" for c, count, size in zip(classes, counts, sizes, strict=True))
    if len(classes) > NAMED_CLASSES:
        kept = f"{counts.min()} to {counts.max()} of {sizes.min()} to {sizes.max()}, in {len(classes)} classes"
    return [*lines, f"kept per class: {kept}"]


def retention_report(y: np.ndarray, indices: np.ndarray, retained: Retention, probe: str) -> str:
    """What was kept, per class, and what a probe that is trained on it retains, beside random samples.

    Args:
        y: Labels of all samples, int64 ``[N]``, or numbers.
        indices: Positions of the kept samples, int64 ``[m]``.
        retained: The accuracies that :func:`curation.evaluation.retention.retention` measured.
        probe: Name of the probe.
    """
    mean, low, high = retained.difference()
    verdict = "better than random" if low > 0 else "worse than random" if high < 0 else "no different from random"
    rows = [("all samples", [retained.full], retained.of_selected * 0 + 1, 0.0)] + [
        (name, accuracies, shares, retained.reduction)
        for name, accuracies, shares in (
            ("selected", retained.selected, retained.of_selected),
            ("stratified random", retained.random, retained.of_random),
        )
    ]
    interval = f"interval of {len(retained.selected)} selections" if retained.redrawn else "prediction interval"
    lines = [
        *kept_report(y, indices),
        f"{probe}, mean and standard deviation of {len(retained.selected)} seeds:",
        f"{'trained on':18} {'R²' if y.dtype.kind == 'f' else 'accuracy':>8} {'retention':>16} {'effectiveness':>14}",
        *(
            f"{name:18} {np.mean(accuracies):8.4f} {shares.mean():7.4f} ± {shares.std(ddof=1):.4f} "
            f"{np.mean(accuracies) * reduction:14.4f}"
            for name, accuracies, shares, reduction in rows
        ),
        f"retention, selected minus random: {mean:+.4f}, 95 % {interval} {low:+.4f} to {high:+.4f}: {verdict}",
    ]
    return "\n".join(lines)


def draw_retention(x: np.ndarray, y: np.ndarray, indices: np.ndarray, retained: Retention | None) -> Any:
    """Kept samples among those left out, in two dimensions, beside what they retain.

    Args:
        x: Features ``[N, D]``; up to 5,000 samples are drawn by t-SNE, more by their two principal components.
        y: Labels, int64 ``[N]``, or numbers.
        indices: Positions of the kept samples, int64 ``[m]``.
        retained: The accuracies of the probes; None where there are none.

    Returns:
        A ``matplotlib.figure.Figure``.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11 if retained else 8, 5), layout="constrained")
    scatter, *bars = figure.subplots(1, 2, width_ratios=[2.6, 1]) if retained else [figure.subplots()]
    _draw_samples(scatter, x, y, np.isin(np.arange(len(y)), indices))
    if retained:
        _draw_shares(bars[0], retained)
    return figure


def two_dimensions(x: np.ndarray) -> tuple[np.ndarray, str]:
    """Points in the plane, fp32 ``[N, 2]``, and the method: ``"t-SNE"`` of up to 5,000 samples, or ``"PCA"``."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    components = PCA(min(50, *x.shape), random_state=0).fit_transform(x)
    # t-SNE needs more samples than twice its perplexity, and samples that differ.
    if 60 < len(x) <= LARGEST_TSNE and components.std() > 0:
        return TSNE(random_state=0).fit_transform(components), "t-SNE"
    return components[:, :2], "PCA"


def _draw_samples(axes: Any, x: np.ndarray, y: np.ndarray, is_kept: np.ndarray) -> None:
    from matplotlib import colormaps

    classes, labels = np.unique(y, return_inverse=True)
    points, method = two_dimensions(x)
    palette = colormaps["tab10" if len(classes) <= 10 else "tab20" if len(classes) <= 20 else "gist_rainbow"]
    colours = palette(labels if len(classes) <= NAMED_CLASSES else labels / len(classes))
    kept = int(is_kept.sum())
    small, large = (float(np.clip(area / n, *limits)) for area, n, limits in (
        (30000, len(y), (1.5, 8)), (16000, kept, (7, 45))))  # fmt: skip
    ring = {"edgecolors": "black", "linewidths": 0.02 * large**0.5 + 0.3}
    axes.scatter(*points[~is_kept].T, s=small, c=colours[~is_kept], alpha=0.25, linewidths=0)
    axes.scatter(*points[is_kept].T, s=large, c=colours[is_kept], **ring)
    axes.set_title(f"{kept:,} kept (ringed) of {len(y):,} samples, {method}", loc="left")
    axes.axis("off")
    if len(classes) <= NAMED_CLASSES:
        for i, name in enumerate(classes):
            axes.scatter([], [], s=30, color=palette(i), label=str(name))
        axes.legend(title="class", frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), handletextpad=0.1)


def _draw_shares(axes: Any, retained: Retention) -> None:
    for i, (shares, colour) in enumerate(((retained.of_selected, "C0"), (retained.of_random, "0.6"))):
        axes.bar(i, shares.mean(), yerr=shares.std(ddof=1), color=colour, width=0.7, capsize=6)
        axes.text(i, shares.mean() / 2, f"{shares.mean():.1%}", ha="center", color="white", fontsize=13)
    axes.axhline(1, color="black", linewidth=1, linestyle="--")
    axes.text(1.45, 1.01, "all samples", ha="right", va="bottom", fontsize=9)
    axes.set(
        xticks=[0, 1], xticklabels=["selected", "stratified\nrandom"], ylabel="accuracy / accuracy of all samples"
    )
    axes.set_title(f"retention, {len(retained.selected)} seeds", loc="left")
    axes.margins(y=0.1)
    axes.spines[["top", "right"]].set_visible(False)
