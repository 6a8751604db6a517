"""Rules of dynamic data pruning: which samples a round visits, given the losses that training has computed.

Every rule is a function ``rule(losses, generator, *, progress, round, **own) -> (ids, weights)``:

- ``losses``: fp32 ``[N]`` on the CPU, the last loss of every sample; NaN for one that must be visited, because it was
  not seen yet or too long ago;
- ``generator``: a ``torch.Generator`` on the CPU, of the round;
- ``progress``: share of the fit that is done, in [0, 1]; ``round``: number of the round, 1 for the first that is
  pruned;
- ``ids``: int64 ``[n]``, distinct, in any order; ``weights``: fp32 ``[n]``, or None for equal ones.

A rule is a function of these alone, so that all processes draw the same. Every rule visits the samples without a
loss.
"""

import warnings

import numpy as np
import torch
from torch import Generator, Tensor

Plan = tuple[Tensor, Tensor | None]  # ids and weights of a round


def mean(losses: Tensor, generator: Generator, *, progress: float, round: int, prune: float = 0.5) -> Plan:
    """InfoBatch (arXiv 2303.04947): leave out a random share of the samples below the mean loss; the rest stand in.

    Of the ``l`` samples with ``loss < mean``, ``m = max(1, floor((1 - prune) l))`` at random are visited, each with
    weight ``l / m``; all others with weight 1. The weights sum to ``N``, so a round has the expected gradient of an
    epoch. (The paper's weight, ``1 / (1 - prune)``, has it only where ``(1 - prune) l`` is an integer.)

    Args:
        losses: fp32 ``[N]``, as in :mod:`curation.samplers.pruning_rules`.
        generator: Of the round.
        progress: Not used.
        round: Not used.
        prune: Share of the samples below the mean that is left out, in [0, 1).

    Returns:
        Ids int64 ``[n]``, and weights fp32 ``[n]``.

    Example:
        >>> ids, weights = mean(torch.tensor([1.0, 1, 1, 1, 6]), Generator(), progress=0, round=1)
        >>> len(ids), weights.sum()
        (3, tensor(5.))
    """
    finite = losses.isfinite()
    average = losses[finite] if not finite.all() else losses
    below = finite & (losses < average.double().mean().float())
    low = below.nonzero().flatten()
    m = max(1, int((1 - prune) * len(low)))
    kept = low[subset(len(low), m, generator)]
    high = (~below).nonzero().flatten()
    weights = torch.ones(len(high) + len(kept))
    weights[len(high) :] = len(low) / m
    return torch.cat([high, kept]), weights


def random(losses: Tensor, generator: Generator, *, progress: float, round: int, prune: float = 0.5) -> Plan:
    """RS2 (arXiv 2305.18424): a new random subset in every round; the control of every other rule.

    Args:
        losses: fp32 ``[N]``; the samples without one come first.
        generator: Of the round.
        progress: Not used.
        round: Not used.
        prune: Share of the samples that is left out, in [0, 1).

    Returns:
        Ids int64 ``[max(1, N - floor(prune N))]`` (more where more must be visited), and None.
    """
    n = max(1, len(losses) - int(prune * len(losses)))
    order = torch.randperm(len(losses), generator=generator)
    must = losses.isnan()
    if must.any():
        order = torch.cat([must.nonzero().flatten(), order[~must[order]]])
        n = max(n, int(must.sum()))
    return order[:n], None


def window(
    losses: Tensor,
    generator: Generator,
    *,
    progress: float,
    round: int,
    prune: float = 0.1,
    groups: int = 5,
    width: float = 0.9,
) -> Plan:
    """SeTa: a window of difficulty slides over groups of samples, from easy to hard, again and again.

    A random ``floor((1 - prune) N)`` are cut into ``groups`` clusters of losses by one-dimensional k-means, ordered
    by their centres; visited are ``w = round(width * groups)`` (4.5 gives 4) consecutive ones, from number
    ``(round - 1) mod (groups - w + 1)`` on.

    Args:
        losses: fp32 ``[N]``; samples without one are visited.
        generator: Of the round.
        progress: Not used.
        round: Number of the round, 1 the first.
        prune: Share that is left out at random, in [0, 1).
        groups: Number of clusters, at least 1.
        width: Share of the groups in the window, in (0, 1].

    Returns:
        Ids int64 ``[n]``, and None.
    """
    must = (~losses.isfinite()).nonzero().flatten()
    ids = losses.isfinite().nonzero().flatten()
    ids = ids[subset(len(ids), max(1, int((1 - prune) * len(ids))), generator)]
    values = losses[ids]
    ordered = torch.from_numpy(np.sort(values.numpy()))  # faster than torch's sort, which orders indices, too
    cuts = cluster_sorted(ordered, groups)
    w = max(1, int(np.round(width * groups)))
    start = (round - 1) % (groups - w + 1)
    first, last = cuts[start], cuts[start + w]
    if first == last:  # of a window of empty groups: losses are equal
        return torch.cat([must, ids]), None
    return torch.cat([must, ids[(values >= ordered[first]) & (values <= ordered[last - 1])]]), None


def hide(
    losses: Tensor,
    generator: Generator,
    *,
    progress: float,
    round: int,
    prune: float = 0.3,
    confidence: float = 0.7,
) -> Plan:
    """KAKURENBO (arXiv 2310.10102): hide the samples of the lowest losses that are predicted right and surely.

    Of the ``floor(F N)`` lowest losses those are left out whose label has a probability of at least ``confidence``,
    which for a cross-entropy is ``exp(-loss)``; with more than .5 the prediction is right. ``F`` is ``prune`` times
    1, 1, .8, .6, .4 in the five parts of the fit. The paper's learning rate is that of ``lr_scale=1``.

    Args:
        losses: fp32 ``[N]``, cross-entropies; samples without one are visited.
        generator: Not used.
        progress: Share of the fit that is done, in [0, 1].
        round: Not used.
        prune: Largest share that is hidden, in [0, 1).
        confidence: Least probability of the label, in (0.5, 1].

    Returns:
        Ids int64 ``[n]``, and None.
    """
    share = prune * (1.0, 1.0, 0.8, 0.6, 0.4)[min(4, int(5 * progress))]
    m = int(share * len(losses))
    sure = (-losses).exp() >= confidence
    hidden = lowest(losses.nan_to_num(nan=torch.inf, posinf=torch.inf), m) & sure
    return _not_empty((~hidden).nonzero().flatten(), losses), None


def drop_high(
    losses: Tensor,
    generator: Generator,
    *,
    progress: float,
    round: int,
    prune: float = 0.3,
    warm_up: int = 2,
) -> Plan:
    """Leave out the highest losses after some rounds: for wrong labels, where no clean held-out data are at hand.

    In plain training the losses of wrong labels stay high at first (arXiv 1804.06872). Use it with ``smoothing`` and
    a ``review`` share, through which a sample comes back.

    Args:
        losses: fp32 ``[N]``; samples without one are visited.
        generator: Not used.
        progress: Not used.
        round: Number of the round; those up to ``warm_up`` visit everything.
        prune: Share of the samples that is left out, in [0, 1).
        warm_up: Number of rounds that visit everything.

    Returns:
        Ids int64 ``[n]``, and None.
    """
    if round <= warm_up:
        return torch.arange(len(losses)), None
    n = max(1, len(losses) - int(prune * len(losses)), int(losses.isnan().sum()))
    return lowest(losses.nan_to_num(nan=-torch.inf, posinf=torch.inf), n).nonzero().flatten(), None


def proportional(
    losses: Tensor,
    generator: Generator,
    *,
    progress: float,
    round: int,
    prune: float = 0.6,
    floor: float = 0.1,
    weighted: bool = False,
) -> Plan:
    """Visit a sample with a probability in proportion to its loss, and all samples with at least ``floor``.

    The probability is ``p = min(1, max(floor, c loss))``, with ``c`` such that ``sum(p) = (1 - prune) N``; the draw
    is systematic, so that a round has that many samples (arXiv 1803.00942 draws batches in proportion to gradient
    norms). With ``weighted`` a sample has the weight ``1 / p``, and a round the expected gradient of an epoch;
    without, hard samples weigh more than easy ones, which is faster where labels are right.

    Args:
        losses: fp32 ``[N]``; samples without one are visited. Negative ones count as 0, with a warning.
        generator: Of the round.
        progress: Not used.
        round: Not used.
        prune: Share of the samples that is left out, in [0, 1).
        floor: Least probability, in [0, 1 - prune].
        weighted: Whether visited samples weigh ``1 / p``.

    Returns:
        Ids int64 ``[n]``, and weights fp32 ``[n]`` or None.
    """
    must = ~losses.isfinite()
    rest = (~must).nonzero().flatten()
    if len(rest) == 0:
        return torch.arange(len(losses)), None
    least, most = losses[rest].aminmax()
    if least < -0.1 * most.clamp(min=0):  # not by rounding
        warnings.warn(
            "The rule `proportional` needs losses that are not negative: negative ones count as 0. Use `mean`, which "
            "does not mind.",
            stacklevel=2,
        )
    wanted = max(1.0, (1 - prune) * len(losses) - int(must.sum()))
    p = inclusion_probabilities(losses[rest], min(wanted, len(rest)), floor)
    shuffled = torch.randperm(len(rest), generator=generator)  # neighbours in a data set may be alike
    total = p[shuffled].cumsum(0)
    start = torch.rand((), generator=generator, dtype=torch.float64)
    taken = (total - start).ceil().diff(prepend=(-start).ceil()[None]) > 0
    chosen = rest[shuffled[taken]]
    ids = torch.cat([must.nonzero().flatten(), chosen])
    if not weighted:
        return ids, None
    return ids, torch.cat([torch.ones(int(must.sum())), (1 / p[shuffled[taken]]).float()])


def signal(
    losses: Tensor,
    generator: Generator,
    *,
    progress: float,
    round: int,
    prune: float = 0.8,
    right: float = 0.02,
    wrong: float = 0.89,
) -> Plan:
    """Leave out most prompts of rewards whose answers were all right, or all wrong: they have no advantage.

    A loss is here the share of wrong answers to a prompt. Of those with at most ``right`` or at least ``wrong`` (the
    bounds of GRESO, arXiv 2506.02177) a random ``floor(prune n)`` are left out; the others are tested again. With
    ``smoothing`` of the sampler one lucky or unlucky group does not decide.

    Args:
        losses: fp32 ``[N]``, in [0, 1]; prompts without one are visited.
        generator: Of the round.
        progress: Not used.
        round: Not used.
        prune: Share of the prompts without signal that is left out, in [0, 1).
        right: Largest share of wrong answers of a prompt that is solved.
        wrong: Least share of wrong answers of one that is too hard.

    Returns:
        Ids int64 ``[n]``, and None.

    Example:
        >>> signal(torch.tensor([0.0, 0.5, 1.0, 0.25]), Generator(), progress=0, round=1, prune=0.9)[0].tolist()
        [1, 3, 0]
    """
    silent = (losses <= right) | (losses >= wrong)
    idle = silent.nonzero().flatten()
    again = idle[subset(len(idle), len(idle) - int(prune * len(idle)), generator)]
    return torch.cat([(~silent).nonzero().flatten(), again]), None


RULES = {
    "signal": signal,
    "mean": mean,
    "window": window,
    "hide": hide,
    "drop_high": drop_high,
    "random": random,
    "proportional": proportional,
}


def inclusion_probabilities(sizes: Tensor, n: float, floor: float = 0.0) -> Tensor:
    """Probabilities ``min(1, max(floor, c size))`` that sum to ``n``.

    Args:
        sizes: Floating ``[N]``; those below a millionth of the largest count as that.
        n: Expected number of samples, in (0, N].
        floor: Least probability; at most ``n / N`` is used.

    Returns:
        fp64 ``[N]``.

    Example:
        >>> inclusion_probabilities(torch.tensor([1.0, 1, 2, 40]), 2.0)
        tensor([0.2500, 0.2500, 0.5000, 1.0000], dtype=torch.float64)
    """
    sizes = sizes.double()
    sizes = sizes.clamp(min=float(sizes.max().clamp(min=1e-30)) * 1e-6)
    floor = min(floor, n / len(sizes))
    ordered = np.sort(sizes.numpy())
    sums = np.concatenate([[0.0], np.cumsum(ordered)])

    def total(c: float) -> float:
        """Sum of the probabilities with a factor ``c``."""
        under, below = np.searchsorted(ordered, [floor / c, 1 / c])
        return floor * under + c * (sums[below] - sums[under]) + len(ordered) - below

    low, high = 0.0, 1 / float(ordered[0])
    for _ in range(100):
        c = (low + high) / 2
        low, high = (c, high) if total(c) < n else (low, c)
    return (sizes * high).clamp(floor, 1)


def cluster_sorted(values: Tensor, groups: int) -> list[int]:
    """One-dimensional k-means of sorted values, begun at equal numbers in all groups.

    Args:
        values: Floating ``[N]``, ascending.
        groups: Number of groups; more than ``N`` leave some empty.

    Returns:
        ``groups + 1`` ascending positions: group ``g`` is ``values[cuts[g]:cuts[g + 1]]``.

    Example:
        >>> cluster_sorted(torch.tensor([0.0, 0.1, 0.2, 5.0]), 2)
        [0, 3, 4]
    """
    values = values.double()
    sums = torch.cat([values.new_zeros(1), values.cumsum(0)])
    cuts = torch.linspace(0, len(values), groups + 1).round().long()
    for _ in range(100):
        counts = cuts.diff()
        used = counts > 0
        centres = (sums[cuts[1:]] - sums[cuts[:-1]])[used] / counts[used]
        inner = torch.searchsorted(values, (centres[1:] + centres[:-1]) / 2, right=True)
        new = torch.cat([cuts[:1], inner, cuts[-1:].expand(groups - len(inner))])
        if torch.equal(new, cuts):
            break
        cuts = new
    return cuts.tolist()


def subset(size: int, n: int, generator: Generator) -> Tensor:
    """``n`` of ``size`` positions at random."""
    return torch.randperm(size, generator=generator)[:n]


def lowest(values: Tensor, m: int) -> Tensor:
    """Whether a value is one of the ``m`` lowest, of equal ones the first: bool ``[N]``, without a sort."""
    if m == 0:
        return torch.zeros(len(values), dtype=torch.bool)
    limit = values.kthvalue(m).values
    taken, equal = values < limit, values == limit
    return taken | (equal & (equal.cumsum(0) <= m - taken.sum()))


def _not_empty(ids: Tensor, losses: Tensor) -> Tensor:
    """The ids; the sample of the highest loss where there are none."""
    return ids if len(ids) else losses.argmax()[None]
