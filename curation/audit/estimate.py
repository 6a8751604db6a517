"""How many labels are wrong, with an interval; refused where the margins do not say."""

from dataclasses import dataclass

import numpy as np

from curation.checks import check_number, check_seed

LEAST = 20  # threshold samples
RESAMPLES = 200
BINS = 256  # of the margins, for the mixture
APART = 4.0  # least distance of two components in deviations
SLACKS = (0.1, 1.0)  # of the bounds
BEGIN = 0.1  # of the threshold samples lie below the first point at which shares are compared


class UnsupportedError(ValueError):
    """The margins do not say how many labels are wrong."""


@dataclass(frozen=True)
class WrongLabels:
    """An estimate of the number of wrong labels.

    Attributes:
        count: The estimate, a number of samples.
        low: Lower end of the 95 % interval.
        high: Upper end.
        method: How it was made.
    """

    count: float
    low: float
    high: float
    method: str


def below_threshold(margins: np.ndarray, threshold: np.ndarray, quantile: float = 0.99) -> np.ndarray:
    """Samples whose mean margin is below a quantile of the threshold samples' (arXiv 2001.10528, sec. 4).

    Args:
        margins: ``[N]``, mean margins; NaN is not below.
        threshold: ``[M]``, those of samples with wrong labels.
        quantile: In [0, 1]; 0.99 in the paper, which finds most wrong labels and many right ones.

    Returns:
        bool ``[N]``.

    Example:
        >>> below_threshold(np.array([-2.0, 3.0]), np.array([-3.0, -1.0]))
        array([ True, False])
    """
    check_number("quantile", quantile, "[0, 1]")
    return margins <= np.quantile(threshold, quantile)


def estimate_wrong(margins: np.ndarray, threshold: np.ndarray | None = None, seed: int = 0) -> WrongLabels:
    """The number of wrong labels, by threshold samples where there are any, else by a mixture of two components.

    Args:
        margins: ``[N]``, mean margins of the samples that are not threshold samples; NaN is left out.
        threshold: ``[M]``, mean margins of the threshold samples.
        seed: Seed of the bootstrap.

    Raises:
        UnsupportedError: If the margins do not say; see the two functions.
    """
    if threshold is not None:
        return wrong_by_threshold_samples(margins, threshold, seed)
    return wrong_by_mixture(margins, seed)


def wrong_by_threshold_samples(margins: np.ndarray, threshold: np.ndarray, seed: int = 0) -> WrongLabels:
    """The number of samples that look like the threshold samples.

    A share ``a`` of wrong labels whose margins are distributed as the threshold samples' gives ``F(t) >= a G(t)`` for
    the distributions ``F`` of all samples and ``G`` of the threshold samples, with equality where no right label has
    so low a margin. Best bin estimation (arXiv 2111.00980, eq. 3) takes ``F / G`` at the point ``t`` where an upper
    bound, ``F / G`` and ``s / G`` times the slack of both empirical distributions, is least. With ``s = 1`` that is a
    point with many threshold samples, where hard samples with right labels may add to the estimate; with ``s = 0.1``
    one with few of them. The estimate is the mean of both, and the interval that of 200 bootstrap resamples with one
    or the other. It assumes that labels are wrong in the way of the threshold samples
    (:func:`~curation.audit.scores.errors_are_learned` says where not). Where samples that are hard are wrong more
    often, as with labels that people gave, it is too low.

    Args:
        margins: ``[N]``, mean margins of the samples that are not threshold samples; NaN is left out.
        threshold: ``[M]``, mean margins of the threshold samples.
        seed: Seed of the bootstrap.

    Raises:
        UnsupportedError: If there are fewer than 20 threshold samples, or more than half of the samples look like
            them, as before a model has learned anything.
    """
    check_seed(seed)
    margins, threshold = margins[np.isfinite(margins)], np.sort(threshold[np.isfinite(threshold)])
    n, m = len(margins), len(threshold)
    if m < LEAST or not n:
        raise UnsupportedError(f"there are {m} threshold samples, and {LEAST} are needed")
    bins = np.bincount(np.searchsorted(threshold, margins), minlength=m + 1)
    share = float(np.mean([_best_share(bins, np.ones(m), slack) for slack in SLACKS]))
    if share > 0.5:
        raise UnsupportedError(
            f"{share:.0%} of the samples look like the threshold samples: the model has not learned"
        )
    generator = np.random.default_rng(seed)
    shares = [
        _best_share(generator.multinomial(n, bins / n), generator.multinomial(m, np.full(m, 1 / m)), slack)
        for slack in SLACKS
        for _ in range(RESAMPLES // 2)
    ]
    return _estimate(share, shares, n, f"{m} threshold samples")


def _best_share(bins: np.ndarray, weights: np.ndarray, slack: float) -> float:
    """``F / G`` at the threshold sample where its upper bound is least.

    Args:
        bins: Samples below the first threshold sample, between it and the second, and so on: ``[M + 1]``.
        weights: How often each threshold sample counts, ``[M]``.
        slack: Factor of the slack of the distributions in the bound.
    """
    n, m = bins.sum(), weights.sum()
    below, of_threshold = np.cumsum(bins)[:-1] / n, np.cumsum(weights) / m
    slack *= np.sqrt(np.log(4 / 0.1) / 2) * (n**-0.5 + m**-0.5)
    bound = np.where(of_threshold >= BEGIN, (below + slack) / np.maximum(of_threshold, BEGIN), np.inf)
    best = int(bound.argmin())
    return float(min(1.0, below[best] / of_threshold[best]))


def wrong_by_mixture(margins: np.ndarray, seed: int = 0) -> WrongLabels:
    """The size of the lower of two normal components of the mean margins, fitted by expectation maximisation.

    The interval is that of 200 bootstrap resamples. Components that overlap are not told apart by their sizes: on
    Fashion-MNIST and Letter with planted errors they lay 1.7 to 3.3 deviations apart, and the lower was up to twice
    as large as the number of wrong labels. So the estimate is refused below 4.

    Args:
        margins: ``[N]``, mean margins; NaN is left out.
        seed: Seed of the bootstrap.

    Raises:
        UnsupportedError: If the means of the components are not 4 root mean squared deviations apart, or there are
            fewer than 20 samples.
    """
    check_seed(seed)
    margins = margins[np.isfinite(margins)]
    n = len(margins)
    if n < LEAST:
        raise UnsupportedError(f"there are {n} samples, and {LEAST} are needed")
    counts, edges = np.histogram(margins, BINS)
    centres = (edges[1:] + edges[:-1]) / 2
    share, means, deviations = _fit_mixture(counts, centres, 300)
    apart = abs(means[1] - means[0]) / np.sqrt(np.square(deviations).mean())
    if not apart >= APART:
        raise UnsupportedError(
            f"two components of the margins are {apart:.1f} deviations apart, and {APART:.0f} are needed; threshold "
            "samples give an estimate"
        )
    generator = np.random.default_rng(seed)
    resampled = (generator.multinomial(n, counts / n) for _ in range(RESAMPLES))
    return _estimate(share, [_fit_mixture(c, centres, 50)[0] for c in resampled], n, "mixture")


def _fit_mixture(counts: np.ndarray, x: np.ndarray, steps: int) -> tuple[float, np.ndarray, np.ndarray]:
    """Weight of the lower of two normal components, means ``[2]`` and deviations ``[2]``, of counts at ``x``."""
    n = counts.sum()
    cumulative = np.cumsum(counts) / n
    weights = np.array([0.5, 0.5])
    means = x[np.searchsorted(cumulative, [0.05, 0.75]).clip(max=len(x) - 1)].astype(float)
    least = np.ptp(x) / len(x) + 1e-12  # of the deviations: a bin
    deviations = np.full(2, np.ptp(x) / 8 + least)
    for _ in range(steps):
        logs = np.log(weights / deviations)[:, None] - ((x - means[:, None]) / deviations[:, None]) ** 2 / 2
        densities = np.exp(logs - logs.max(0))
        parts = densities / densities.sum(0) * counts
        sizes = parts.sum(1) + 1e-9
        means = (parts * x).sum(1) / sizes
        deviations = np.sqrt((parts * (x - means[:, None]) ** 2).sum(1) / sizes).clip(min=least)
        weights = sizes / n
    return float(weights[means.argmin()]), means, deviations


def _estimate(share: float, resampled: list[float], n: int, method: str) -> WrongLabels:
    low, high = np.quantile(resampled, [0.025, 0.975]).tolist()
    return WrongLabels(share * n, min(low, share) * n, max(high, share) * n, method)
