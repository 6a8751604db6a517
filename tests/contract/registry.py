"""Every public callback, and what the contract suite needs to know of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from curation.callbacks import ExactResume, UniformSelection, UtilityDiversitySelection
from lightning.pytorch import Callback


class UniformTwin:
    """The slow twin of a rule: scores of one rank's candidates, and what is remembered of the kept ones."""

    def __init__(self) -> None:
        self.queue: list[torch.Tensor] = []

    def score(self, step: int, rank: int, logits: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.random.default_rng((0, step, rank)).random(len(logits))).float()

    def push(self, logits: torch.Tensor) -> None:
        self.queue += list(logits)


class UtilityDiversityTwin(UniformTwin):
    """For one position and a vocabulary below 128 the sketch is the logits, up to a sign."""

    def score(self, step, rank, logits):
        def z(x):
            return (x - x.mean()) / x.std(correction=0) if x.std(correction=0) > 1e-9 else torch.zeros_like(x)

        utility = logits.norm(dim=1)
        distances = [(logits - q).norm(dim=1) for q in self.queue[-1024:]]
        return z(utility) + z(torch.stack(distances).mean(0) if distances else torch.zeros(len(logits)))


@dataclass
class Entry:
    cls: type[Callback]
    arguments: dict[str, Any] = field(default_factory=dict)
    bad: dict[str, Any] = field(default_factory=dict)
    twin: Callable[[], UniformTwin] | None = None

    def make(self, **changes: Any) -> Callback:
        return self.cls(**{**self.arguments, **changes})

    @property
    def selects(self) -> bool:
        return "keep" in self.arguments


CALLBACKS = {
    entry.cls.__name__: entry
    for entry in (
        Entry(UniformSelection, {"keep": 0.25}, {"keep": 0.0}, UniformTwin),
        Entry(UtilityDiversitySelection, {"keep": 0.25}, {"alpha": -1.0}, UtilityDiversityTwin),
        Entry(ExactResume),
    )
}
NOT_CALLBACKS = {"OnlineSelection"}  # a base class
