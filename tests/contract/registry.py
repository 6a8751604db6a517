"""Every public callback, and what the contract suite needs to know of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from curation.callbacks import (
    ExactResume,
    HardBatchTraining,
    HardSampleSelection,
    RunMeter,
    SampleRecord,
    SelectionLedger,
    UniformSelection,
    UtilityDiversitySelection,
)
from helpers import data
from lightning.pytorch import Callback
from torch.utils.data import DataLoader, Sampler
from twins import HardSampleTwin, UniformTwin, UtilityDiversityTwin

from curation.batch import SampleIds
from curation.samplers.hard_batches import HardBatchSampler


@dataclass
class Entry:
    cls: type[Callback]
    arguments: dict[str, Any] = field(default_factory=dict)
    bad: dict[str, Any] = field(default_factory=dict)
    twin: Callable[[], UniformTwin] | None = None
    records: bool = False  # a selection, which has to stand beside it
    sampler: Callable[..., Sampler] | None = None  # of the training data, by data set and global batch size
    refuses: tuple[str, ...] = ()  # kinds of runs

    def make(self, **changes: Any) -> Callback:
        return self.cls(**{**self.arguments, **changes})

    def in_trainer(self) -> list[Callback]:
        return [self.make(), *([UniformSelection(keep=0.25)] if self.records else [])]

    @property
    def name(self) -> str:
        return "-".join([self.cls.__name__, *(str(self.arguments[k]) for k in ("rule",) if k in self.arguments)])

    @property
    def selects(self) -> bool:
        return "keep" in self.arguments

    def dataset(self, samples: Any) -> Any:
        return SampleIds(samples) if self.curates else samples

    def loader(self, samples: Any = None, processes: int = 1, **kwargs: Any) -> DataLoader:
        dataset = self.dataset(data() if samples is None else samples)
        how = {"shuffle": True} if self.sampler is None else {"sampler": self.sampler(dataset, 8 * processes)}
        return DataLoader(dataset, 8, **how, **kwargs)

    @property
    def curates(self) -> bool:
        return self.selects or self.records


CALLBACKS = {
    entry.name: entry
    for entry in (
        Entry(UniformSelection, {"keep": 0.25}, {"keep": 0.0}, UniformTwin),
        Entry(UtilityDiversitySelection, {"keep": 0.25}, {"alpha": -1.0}, UtilityDiversityTwin),
        *(
            Entry(
                HardSampleSelection,
                {"keep": 0.25, "rule": rule, **options},
                {"pressure": 0.5},
                partial(HardSampleTwin, rule, **options),
            )
            for rule, options in {
                "top": {},
                "rank": {},
                "cdf": {},
                "importance": {"score": "grad_norm"},
            }.items()
        ),
        Entry(ExactResume),
        Entry(HardBatchTraining, sampler=HardBatchSampler, refuses=("manual", "overfit_batches")),
        Entry(RunMeter, {"path": "run.json"}),
        Entry(SampleRecord, records=True),
        Entry(SelectionLedger, {"path": "ledger"}, records=True),
    )
}
NOT_CALLBACKS = {"OnlineSelection"}  # a base class
