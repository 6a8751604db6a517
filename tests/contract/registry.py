"""Every public callback, and what the contract suite needs to know of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from curation.callbacks import ExactResume, UniformSelection, UtilityDiversitySelection
from lightning.pytorch import Callback
from twins import UniformTwin, UtilityDiversityTwin


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
