"""Slow, obviously right twins of the rules: logits, an SVD, Python lists as memory."""

import itertools
import math
from fractions import Fraction

import numpy as np
import torch
import torch.nn.functional as F
from helpers import Proxy
from torch import Tensor

from curation.online.sketch import cosine_projection, sign_projection


class UniformTwin:
    """What every twin answers: scores of one rank's candidates, what was kept of them, and the end of a step."""

    def score(self, step: int, rank: int, logits: Tensor, targets: Tensor) -> Tensor:
        return torch.from_numpy(self.draw(step, rank, len(logits))).float()

    @staticmethod
    def draw(step: int, rank: int, size: int) -> np.ndarray:
        return np.random.default_rng((0, step, rank)).random(size)

    def choose(self, step: int, rank: int, scores: Tensor, k: int) -> tuple[list[int], list[float]]:
        """Rows, and what each weighs."""
        best = sorted(scores.argsort(descending=True, stable=True)[:k].tolist())
        return best, [1.0] * len(best)

    def keep(self, rows: list[int]) -> None:
        """Of the rank scored last."""

    def end_step(self) -> None:
        """Only now is what all ranks kept remembered."""


class UtilityDiversityTwin(UniformTwin):
    def __init__(self, alpha: float = 1.0, normalization: str = "length", seed: int = 0) -> None:
        self.alpha, self.normalization, self.seed = alpha, normalization, seed
        self.memory: list[Tensor] = []
        self.steps: list[list[tuple[list[float], list[int]]]] = []
        self.kept: list[Tensor] = []
        self.sets: list[tuple[list[float], list[int]]] = []

    def score(self, step, rank, logits, targets):
        scored = targets != -100
        if self.normalization == "paper":
            scored = torch.ones_like(scored)
        n = scored.sum(1)
        samples = [x[m] for x, m in zip(logits.double(), scored, strict=True)]
        u = torch.stack([torch.linalg.svdvals(x).sum() for x in samples])
        self.z = torch.stack([self.sketch(x) for x in samples])
        if self.normalization == "length":
            self.sets.append((u.tolist(), n.tolist()))
            u, self.z = u / n ** slow_length_trend(self.steps), self.z / n.sqrt()[:, None]
        d = torch.stack([(self.z - q).norm(dim=1) for q in self.memory[-1024:]] or [torch.zeros(len(u))]).mean(0)
        if self.normalization != "paper":
            u, d = ((t - t.mean()) / t.std(correction=0) if t.std(correction=0) > 1e-9 else t * 0 for t in (u, d))
        return u + self.alpha * d

    def sketch(self, logits: Tensor) -> Tensor:
        n, vocabulary = logits.shape
        if self.normalization == "paper":
            tokens, vocab = cosine_projection(8, n, self.seed + 2), cosine_projection(128, vocabulary, self.seed)
        else:
            tokens, vocab = sign_projection(8, 1024, self.seed + 2), sign_projection(128, vocabulary, self.seed)
        return (tokens[:, :n].double() @ logits @ vocab.double().T).flatten()

    def keep(self, rows):
        self.kept += list(self.z[rows])

    def end_step(self):
        self.memory += self.kept
        self.steps.append(self.sets)
        self.kept, self.sets = [], []


class HardSampleTwin(UniformTwin):
    STEPS = 6  # of the fit in the contract suite, over which the selection pressure falls

    def __init__(self, rule: str, score: str = "loss") -> None:
        self.rule, self.score_name = rule, score
        self.pool: list[float] = []
        self.seen: list[float] = []

    def score(self, step, rank, logits, targets):
        self.n = (targets != -100).sum(1).tolist()
        scores = []
        for x, t in zip(logits, targets, strict=True):
            x = x[t != -100].detach().requires_grad_()
            loss = F.cross_entropy(x, t[t != -100])
            if self.score_name == "grad_norm":
                (gradient,) = torch.autograd.grad(loss, x)
                scores.append(gradient.norm())
            else:
                scores.append(loss.detach())
        return torch.stack(scores)

    def choose(self, step, rank, scores, k):
        values, u = scores.tolist(), self.draw(step, rank, len(scores)).tolist()
        pool = self.pool[-1024:] + values
        self.seen += values + [math.nan] * (8 - len(values))
        order = sorted(range(len(values)), key=lambda i: -values[i])
        if self.rule == "top":
            keys = values
        elif self.rule == "rank":
            pressure = 100 ** (1 - step / self.STEPS)
            odds = [pressure ** (-order.index(i) / len(values)) for i in range(len(values))]
            keys = [-math.log(1 / u[i]) / odds[i] for i in range(len(values))]  # an exponential clock for each row
        elif self.rule == "proportional":
            odds = [max(value, 0.1 * sum(values) / len(values)) for value in values]
            keys = [-math.log(1 / u[i]) / odds[i] for i in range(len(values))]
        elif self.rule == "drop_high":
            keys = [-1.0 if i in order[: math.floor(0.3 * len(values) + 0.5)] else u[i] for i in range(len(values))]
        elif self.rule == "selective_backprop":
            keys = []
            for i, value in enumerate(values):
                p = (sum(x <= value for x in pool) / sum(math.isfinite(x) for x in pool)) ** 3
                keys.append(min(p / max(1 - p, 1e-12), 1e12) * (1 - u[i]) / u[i])
        else:
            values = [value * n for value, n in zip(values, self.n, strict=True)]
            keys = [values[i] / u[i] for i in range(len(values))]
        best = sorted(sorted(range(len(values)), key=lambda i: -keys[i])[:k])
        if self.rule != "importance" or len(values) <= k:
            return best, [1.0] * len(best)
        threshold = sorted(keys)[-k - 1]
        share = sum(self.n[i] for i in best) / sum(self.n)
        return best, [share * max(1, threshold / values[i]) for i in best]

    def end_step(self):
        self.pool += self.seen
        self.seen = []


class ProxyTwin(UniformTwin):
    """Two SGD steps of the proxy in four, with momentum, on the candidates of both ranks."""

    def __init__(self) -> None:
        self.proxy, self.momentum, self.batches, self.step = Proxy(), {}, [], 0

    def score(self, step, rank, logits, targets):
        self.batches.append(self.batch)
        with torch.no_grad():
            logits, targets = self.proxy.eval().score_step(self.batch)
        losses = []
        for x, t in zip(logits, targets, strict=True):
            losses.append(F.cross_entropy(x[t != -100], t[t != -100]))
        return torch.stack(losses)

    def end_step(self):
        if self.step % 2 == 0:
            self.proxy.zero_grad()
            for batch in self.batches:
                logits, targets = self.proxy.train().score_step(batch)
                F.cross_entropy(logits.flatten(0, 1), targets.flatten()).div(len(self.batches)).backward()
            for name, p in self.proxy.named_parameters():
                if p.grad is not None:
                    self.momentum[name] = 0.9 * self.momentum.get(name, 0) + p.grad
                    p.data -= 0.1 * 0.9**self.step * self.momentum[name]
        self.batches, self.step = [], self.step + 1


def slow_hard_batches(count: int, delta: float, loss_of, steps: int, max_age: int | None = None) -> list[int]:
    """The mini-batches that the delta rule trains on; ``loss_of(step, batch)`` is asked for each as it is trained."""
    losses: dict[int, float] = {}
    left_out = dict.fromkeys(range(count), 0)
    visited: list[int] = []
    chosen = list(range(count))
    while True:
        for batch in chosen:
            if len(visited) == steps:
                return visited
            losses[batch] = loss_of(len(visited), batch)
            visited.append(batch)
        k = max(1, int(delta * count))
        hardest = sorted(range(count), key=lambda b: (-losses[b] if math.isfinite(losses[b]) else math.inf, b))[:k]
        old = [b for b in range(count) if max_age is not None and left_out[b] >= max_age]
        chosen = sorted({*hardest, *old})
        left_out = {b: 0 if b in chosen else left_out[b] + 1 for b in range(count)}


def slow_length_trend(steps: list[list[tuple[list[float], list[int]]]]) -> float:
    """The weighted least-squares slope of log u on log n, candidate set by candidate set, with its prior of 2/3."""
    above, below = 2 / 3, 1.0
    for age, candidate_sets in enumerate(reversed(steps)):
        for utilities, counts in candidate_sets:
            pairs = zip(counts, utilities, strict=True)
            logs = [(math.log(n), math.log(u)) for n, u in pairs if u > 0 and math.isfinite(u)]
            for x, y in logs:
                dx, dy = x - sum(p[0] for p in logs) / len(logs), y - sum(p[1] for p in logs) / len(logs)
                above += 0.99**age * dx * dy
                below += 0.99**age * dx * dx
    return above / below


def tags(i: int) -> list[int]:
    """Concepts of a sample."""
    return [i % 3, 5 + i % 7] if i % 5 else []


class ConceptAwareTwin(UniformTwin):
    """Of a data set of 38 samples; the batch it is asked for is that of ``samples``."""

    samples: list[int]

    def score(self, step: int, rank: int, logits: Tensor, targets: Tensor) -> Tensor:
        return torch.zeros(len(logits))

    def choose(self, step: int, rank: int, scores: Tensor, k: int) -> tuple[list[int], list[float]]:
        k = min(k, len(self.samples))
        chosen = slow_diverse([set(tags(i)) for i in self.samples], k, [1.0] * 12, [0.0] * len(self.samples), None)
        return sorted(chosen), [1.0] * k


def slow_diverse(rows, k: int, targets, penalties, cap: int | None) -> list[int]:
    """Concept-aware batches by brute force: every gain of every candidate before every choice."""
    frequency = [sum(c in row for row in rows) for c in range(len(targets))]
    chosen: list[int] = []
    growth, limit = 1, cap or math.inf
    while len(chosen) < k:
        n = [sum(c in rows[i] for i in chosen) for c in range(len(targets))]

        def gain(i: int, n=n, growth=growth) -> float:
            total = 0.0
            for c in sorted(rows[i]):
                if n[c] < growth * targets[c]:
                    total += (growth * targets[c] - n[c]) / (growth * targets[c]) + 1 / frequency[c]
            return total / max(len(rows[i]), 1)

        left = [i for i in range(len(rows)) if i not in chosen and all(n[c] < limit for c in rows[i])]
        better = [i for i in left if gain(i) > 0]
        if not left:
            limit, growth = limit + cap, 1
        elif not better and any(targets[c] > 0 for i in left for c in rows[i]):
            growth += 1
        else:
            chosen.append(min(better or left, key=lambda i: (penalties[i] - gain(i), i)))
    return chosen


def slow_pruning(rule: str, losses: list[float], generator, progress: float, number: int, prune: float):
    """A round of dynamic pruning: a dictionary from id to weight. Losses that are no numbers must be visited."""
    n = len(losses)
    known = [i for i in range(n) if math.isfinite(losses[i])]
    if rule == "mean":
        mean = float(torch.tensor(math.fsum(losses[i] for i in known) / len(known))) if known else 0.0
        low = [i for i in known if losses[i] < mean]
        m = max(1, math.floor((1 - prune) * len(low)))
        order = torch.randperm(len(low), generator=generator).tolist()
        kept = [low[j] for j in order[:m]]
        return {i: 1.0 for i in range(n) if i not in low} | {i: len(low) / m for i in kept}
    if rule == "random":
        order = torch.randperm(n, generator=generator).tolist()
        must = [i for i in range(n) if math.isnan(losses[i])]
        order = must + [i for i in order if i not in must]
        return dict.fromkeys(order[: max(1, n - int(prune * n), len(must))], 1.0)
    if rule == "signal":
        right, wrong = torch.tensor([0.02, 0.89]).tolist()  # as losses are, in fp32
        silent = [i for i in range(n) if losses[i] <= right or losses[i] >= wrong]
        order = torch.randperm(len(silent), generator=generator).tolist()
        again = [silent[j] for j in order[: len(silent) - math.floor(prune * len(silent))]]
        return dict.fromkeys([i for i in range(n) if i not in silent] + again, 1.0)
    if rule == "hide":
        share = prune * (1.0, 1.0, 0.8, 0.6, 0.4)[min(4, int(5 * progress))]
        lowest = sorted(range(n), key=lambda i: (losses[i] if i in known else math.inf, i))[: int(share * n)]
        left = [i for i in range(n) if not (i in lowest and bool(torch.tensor(-losses[i]).exp() >= 0.7))]
        return dict.fromkeys(left or [max(range(n), key=lambda i: (losses[i], -i))], 1.0)
    if rule == "drop_high":
        order = sorted(range(n), key=lambda i: (-math.inf if math.isnan(losses[i]) else losses[i], i))
        most = max(1, n - int(prune * n), sum(map(math.isnan, losses)))
        return dict.fromkeys(order if number <= 2 else order[:most], 1.0)
    raise NotImplementedError(rule)


def slow_probabilities(sizes: list[float], n: float, floor: float) -> list[float]:
    """Probabilities min(1, max(floor, c size)) that sum to n, by bisection of c."""
    least = max(*sizes, 1e-30) * 1e-6
    sizes, floor = [max(size, least) for size in sizes], min(floor, n / len(sizes))
    low, high = 0.0, 1 / least
    for _ in range(400):
        c = (low + high) / 2
        low, high = (c, high) if sum(min(1, max(floor, c * s)) for s in sizes) < n else (low, c)
    return [min(1, max(floor, high * s)) for s in sizes]


def slow_clusters(values: list[float], groups: int) -> list[int]:
    """One-dimensional k-means of sorted values from equal numbers: the group of each value."""
    n = len(values)
    cuts = [round(Fraction(g * n, groups)) for g in range(groups + 1)]
    group = [next(g for g in range(groups) if cuts[g] <= i < cuts[g + 1]) for i in range(n)]
    for _ in range(100):
        members = [[v for v, g in zip(values, group, strict=True) if g == number] for number in range(groups)]
        centres = [sum(m) / len(m) for m in members if m]
        edges = [(a + b) / 2 for a, b in itertools.pairwise(centres)]
        new = [sum(v > edge for edge in edges) for v in values]
        if new == group:
            break
        group = new
    return group


class PromptMemoryTwin:
    """The outcomes of every prompt as lists of shares of wrong answers, oldest first; nothing is kept up to date."""

    def __init__(self, size: int, answers: int, decay: float, right: float = 0.02, wrong: float = 0.98) -> None:
        self.groups: list[list[float]] = [[] for _ in range(size)]
        self.answers, self.decay, self.right, self.wrong = answers, decay, right, wrong

    def counts(self, i: int) -> tuple[float, float]:
        """Right answers and answers, a group weighing less by ``decay`` for each one after it."""
        weights = [self.decay**age for age in range(len(self.groups[i]))][::-1]
        right = sum(w * self.answers * (1 - share) for w, share in zip(weights, self.groups[i], strict=True))
        return right, sum(w * self.answers for w in weights)

    def streak(self, i: int, silent) -> int:
        return len(list(itertools.takewhile(silent, reversed(self.groups[i]))))

    def solved(self, i: int) -> int:
        return self.streak(i, lambda share: share <= self.right)

    def failed(self, i: int) -> int:
        return self.streak(i, lambda share: share >= self.wrong)


def slow_prompts(
    rule: str, twin: PromptMemoryTwin, explore: list[float], generator, must: list[bool], prune: float
) -> list[int]:
    """The prompts that a round visits."""
    n = len(twin.groups)
    if rule == "streaks":
        draws = torch.rand(n, generator=generator, dtype=torch.float64).tolist()
        p = [max(min(explore[0] ** twin.solved(i), explore[1] ** twin.failed(i)), 1 - prune) for i in range(n)]
        return [i for i in range(n) if must[i] or draws[i] < p[i]] or list(range(n))
    if rule == "thompson":
        beta = np.random.default_rng(int(torch.randint(2**63 - 1, (), generator=generator))).beta
        counts = [twin.counts(i) for i in range(n)]
        distances = [abs(beta(1 + right, 1 + made - right) - 0.5) for right, made in counts]
        order = sorted(range(n), key=lambda i: (not must[i], distances[i]))
        return order[: max(1, n - math.floor(prune * n), sum(must))]
    done = [i for i in range(n) if twin.solved(i) >= 2 and not must[i]]
    order = torch.randperm(len(done), generator=generator).tolist()
    again = [done[j] for j in order[: len(done) - math.floor(prune * len(done))]]
    return [i for i in range(n) if i not in done] + again
