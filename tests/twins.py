"""Slow, obviously right twins of the rules: logits, an SVD, Python lists as memory."""

import math

import numpy as np
import torch
from torch import Tensor

from curation.online.sketch import cosine_projection, sign_projection


class UniformTwin:
    """What every twin answers: scores of one rank's candidates, what was kept of them, and the end of a step."""

    def score(self, step: int, rank: int, logits: Tensor, scored: Tensor) -> Tensor:
        return torch.from_numpy(np.random.default_rng((0, step, rank)).random(len(logits))).float()

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

    def score(self, step, rank, logits, scored):
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
